"""The run folder: a fresh one each run, the old one after a restart, and lines that a full disk does not break."""

import errno
import io
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from launch.ranks import Outcome
from trainer.config.job import RunConfig
from trainer.runtime import run_folder


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
    monkeypatch.setattr("builtins.open", lambda path, *_, **__: Full(path, "a+"))
    run_folder.append_json_line(path, {"step": 2})
    monkeypatch.undo()
    run_folder.append_json_line(path, {"step": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "auc": None}, {"step": 3}]
    assert f"warning: {path} has lost a line (No space left on device)" in capsys.readouterr().err
    before = path.read_bytes()
    monkeypatch.setattr("builtins.open", lambda path, *_, **__: Broken(path, "a+"))
    run_folder.append_json_line(path, {"step": 4})
    monkeypatch.undo()
    run_folder.append_json_line(tmp_path, {"step": 4})
    assert path.read_bytes() == before
    said = capsys.readouterr().err
    assert "has lost a line (Input/output error)" in said and "has lost a line (Is a directory)" in said


def test_a_line_comes_after_one_that_a_crash_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    run_folder.append_json_line(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"ste\n{"step": 2}\n'


@pytest.mark.parametrize("damaged", [b"", bytes(200), b"[]", b"\xff\xfe", b"[" * 200_000, None])
def test_a_damaged_status_stops_nothing(tmp_path, damaged, capsys):
    run = RunConfig(root=str(tmp_path), name="r")
    folder, path = run_folder.choose(run, ("a", 0)), tmp_path / "r" / "b" / "status.json"
    path.parent.mkdir()
    run_folder.Status(folder, "a").update("running")
    path.mkdir() if damaged is None else path.write_bytes(damaged)
    assert run_folder.choose(run, ("a", 1)) == folder
    assert capsys.readouterr().err == "", "another run's damage is not this run's matter"
    assert run_folder.read_status(path.parent) == {}
    assert f"warning: {path} cannot be read" in capsys.readouterr().err
    if damaged is not None:
        run_folder.Status(path.parent, "b").end("failed", secondary=True, reason="r")
        assert run_folder.read_status(path.parent)["state"] == "failed"


def test_a_run_that_could_not_report_its_end_is_seen_by_its_lock(tmp_path):
    run_folder.Status(tmp_path, "a").update("running")
    assert run_folder.read_status(tmp_path)["state"] == "running", "it has no lock to go by"
    with run_folder.lock(tmp_path):
        assert run_folder.read_status(tmp_path)["state"] == "running"
    assert run_folder.read_status(tmp_path)["state"] == "killed"
    run_folder.Status(tmp_path, "a").update("finished")
    assert run_folder.read_status(tmp_path)["state"] == "finished"


def test_two_ranks_errors_are_both_reported(tmp_path):
    status = run_folder.Status(tmp_path, "a")
    status.update("running")
    status.end("failed", rank=0, reason="'a.parquet': storage failed", retryable=True)
    status.end("failed", rank=1, reason="the loss is nan", retryable=False)
    status.end("failed", rank=2, reason="the loss is nan", retryable=False)
    status.end("failed", secondary=True, rank=None, reason="lost contact with another rank", retryable=True)
    found = run_folder.read_status(tmp_path)
    assert (found["reason"], found["rank"]) == ("'a.parquet': storage failed; rank 1: the loss is nan", 0)
    assert found["retryable"] is False
    status.update("running")
    assert "reason" not in run_folder.read_status(tmp_path)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (None, ("failed", "killed by SIGKILL")),  # no rank could say anything
        ({"secondary": True, "rank": None, "reason": "lost contact"}, ("failed", "killed by SIGKILL")),
        ({"rank": 1, "reason": "no room"}, ("failed", "no room")),
    ],
)
def test_a_launcher_reports_an_end_where_no_rank_knew(tmp_path, before, expected):
    run = RunConfig(dir=str(tmp_path))
    assert run_folder.of_launch(run, "a") is None
    run_folder.Status(tmp_path, "a").update("running")
    if before:
        run_folder.Status(tmp_path, "a").end("failed", **before)
    assert run_folder.of_launch(run, "b") is None, "another launch's run is not ours to tell of"
    outcome = Outcome(run, "a")
    outcome.record("failed", rank=0, reason="killed by SIGKILL")
    found = run_folder.read_status(tmp_path)
    assert (found["state"], found["reason"]) == expected
    assert not outcome.is_mistake()
    run_folder.Status(tmp_path, "a").end("failed", rank=1, reason="a mistake", retryable=False)
    assert outcome.is_mistake()
