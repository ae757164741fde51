"""The run folder: a fresh one each run, the old one after a restart, and lines that a full disk does not break."""

import errno
import io
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from trainer import run_folder
from trainer.config import RunConfig


def test_runs_that_start_in_the_same_second_get_a_folder_each(tmp_path):
    run = RunConfig(root=str(tmp_path), name="r")
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: run_folder.choose(run, ("", 0)), range(16)))
    assert len(set(folders)) == 16
    assert all((folder / "checkpoints").is_dir() and folder.parent == tmp_path / "r" for folder in folders)


def test_a_restart_finds_the_folder_of_its_first_start(tmp_path):
    run = RunConfig(root=str(tmp_path), name="r")
    folders = {run_id: run_folder.choose(run, (run_id, 0)) for run_id in ("a", "b")}
    for run_id, folder in folders.items():
        run_folder.Status(folder, run_id).update("running")
    assert {run_id: run_folder.choose(run, (run_id, 1)) for run_id in folders} == folders
    assert run_folder.choose(run, ("a", 0)) not in folders.values()


@pytest.mark.parametrize("where", ["root", "dir"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, where):
    (tmp_path / "file").touch()
    run = RunConfig(**{where: str(tmp_path / "file" / "below")})
    with pytest.raises(ValueError, match=r"cannot be made \(Not a directory\): set run.root or run.dir"):
        run_folder.choose(run, ("", 0))


class Full(io.FileIO):
    """A file on a disk that fills up in the middle of a line."""

    def write(self, data):
        return super().write(data[: len(data) // 2])


class Broken(io.FileIO):
    def write(self, data):
        raise OSError(errno.EIO, "Input/output error")


def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    path = tmp_path / "metrics.jsonl"
    run_folder.append_json_line(path, {"step": 1, "auc": float("nan")})
    monkeypatch.setattr("builtins.open", lambda path, *_, **__: Full(path, "a"))
    run_folder.append_json_line(path, {"step": 2})
    monkeypatch.undo()
    run_folder.append_json_line(path, {"step": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "auc": None}, {"step": 3}]
    assert f"warning: {path} has lost a line (No space left on device)" in capsys.readouterr().out
    monkeypatch.setattr("builtins.open", lambda path, *_, **__: Broken(path, "a"))
    with pytest.raises(OSError, match="Input/output"):
        run_folder.append_json_line(path, {"step": 4})
