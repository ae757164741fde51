"""Which checkpoint is newest, and which may go."""

import json
import re

import pytest

from tests.helpers.made_checkpoints import FILE, commit, table, whole
from trainer.checkpoint import (
    clean,
    committed,
    local,
    newest,
    place_of,
    prune,
    read_best,
    remove,
    write_best,
)
from trainer.checkpoint.local import fresh
from trainer.checkpoint.paths import Attempt


@pytest.fixture
def checkpoints(tmp_path):
    """step-2, step-9 and step-10."""
    for step in (2, 9, 10):
        commit(tmp_path / f"step-{step}", [whole("tables/a/weight", table())])
    return tmp_path


def names(path):
    return sorted(it.name for it in path.iterdir())


def test_committed_ones_are_found_newest_first_by_number(checkpoints):
    for name in ("step-x", "step-", "step-07", "step-11.old", ".tmp-step-12-0123abcd", "step-1٣"):
        (checkpoints / name).mkdir()
    (checkpoints / "step-12").write_text("a file")
    (checkpoints / "step-13").symlink_to(checkpoints / "step-2")
    assert [path.name for path in committed(checkpoints)] == ["step-10", "step-9", "step-2"]
    assert committed(checkpoints / "nowhere") == []


def test_damaged_ones_are_passed_over_aloud_or_stop_the_run(checkpoints, capfd):
    assert newest(checkpoints) == checkpoints / "step-10" and capfd.readouterr() == ("", "")
    (checkpoints / "step-10" / FILE).write_bytes(b"")
    (checkpoints / "step-9" / "MANIFEST.json").unlink()
    assert newest(checkpoints) == checkpoints / "step-2"
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and re.match(rf"WARNING: checkpoint .*step-10 is damaged .*{FILE} has 0 bytes", lines[0])
    assert re.match(r"WARNING: checkpoint .*step-9 .*MANIFEST.json", lines[1])
    with pytest.raises(ValueError, match=r"step-10: not a whole .*restore it, delete it, or set checkpoint.on_corrupt"):
        newest(checkpoints, "error")
    (checkpoints / "step-2" / FILE).unlink()
    assert newest(checkpoints) is None


def test_pruning_keeps_the_newest_and_the_best(checkpoints):
    for step in (11, 12):
        (checkpoints / f"step-{step}").mkdir()
    write_best(checkpoints, {"step": 2, "metric": "valid.auc", "value": 0.8})
    assert read_best(checkpoints) == {"step": 2, "metric": "valid.auc", "value": 0.8}
    assert prune(checkpoints, 2) == ["step-10", "step-9"]
    assert names(checkpoints) == ["best.json", "step-11", "step-12", "step-2"]
    (checkpoints / "best.json").unlink()
    assert prune(checkpoints, 2) == ["step-2"]
    assert prune(checkpoints, 2) == []


@pytest.mark.parametrize("content", ["", "[]", "{", '{"step": "../x", "metric": "m", "value": 1}', '{"step": 1}'])
def test_a_damaged_note_of_the_best_names_none(tmp_path, content):
    assert read_best(tmp_path) is None
    (tmp_path / "best.json").write_text(content)
    assert read_best(tmp_path) is None


def test_a_removed_checkpoint_is_never_seen_in_half(checkpoints, monkeypatch):
    seen = []
    monkeypatch.setattr(local.shutil, "rmtree", lambda path: seen.append((path.name, names(checkpoints))))
    remove(checkpoints / "step-9")
    name, there = seen[0]
    assert re.fullmatch(r"\.trash-step-9-[0-9a-f]{8}", name) and there == [name, "step-10", "step-2"]


def test_cleaning_takes_away_what_saves_left_behind(checkpoints):
    tmp, trash = fresh(checkpoints, "tmp", "step-11"), fresh(checkpoints, "trash", "step-1")
    for path in (tmp, trash):
        path.mkdir()
        (path / "half").write_text("")
    clean(checkpoints)
    assert names(checkpoints) == ["step-10", "step-2", "step-9"]
    tmp.mkdir()
    for path in (tmp, checkpoints / "step-9", checkpoints / "nothing"):
        place_of(path).discard(Attempt(path, "", checkpoints / "step-11"))
    assert names(checkpoints) == ["step-10", "step-2", "step-9"]


def test_free_space_is_that_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(local.shutil, "disk_usage", lambda path: type("Usage", (), {"free": len(str(path))}))
    assert place_of(tmp_path).free_bytes(tmp_path) == len(str(tmp_path))


def test_best_is_whole_or_not_at_all(tmp_path):
    write_best(tmp_path, {"step": 1, "metric": "valid.auc", "value": 0.5})
    write_best(tmp_path, {"step": 3, "metric": "valid.auc", "value": 0.6})
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 3 and names(tmp_path) == ["best.json"]
