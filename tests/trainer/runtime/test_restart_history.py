"""A run that keeps failing at the same step gives up; every other start goes ahead."""

import errno
import os
from types import SimpleNamespace

import pytest

from trainer.runtime import restart_history, run_folder, session
from trainer.runtime.restart_history import RestartHistory, Start


@pytest.fixture
def start(tmp_path, monkeypatch):
    """One start of a launch, up to some step; it says how it ended, or (None) does not."""

    def start(launch, restarts, step, state=None):
        monkeypatch.setattr(restart_history, "launch_id", lambda: (launch, restarts))
        this = RestartHistory(tmp_path)
        this.begin()
        for number in range(max(1, step - 2), step + 1):
            this.record(number)
        if state is not None:
            this.end(state)

    return start


def history(path):
    return restart_history.read(path / restart_history.NAME)


def test_each_start_leaves_a_line(start, tmp_path):
    start("a launch of mine", 0, 12, "preempted")
    start("x" * 99, 0, 12_345_678_901)
    start("", 0, 0, "failed")
    assert history(tmp_path) == [
        Start("alaunchofmine", 0, 12, "preempted"),
        Start("x" * 40, 0, 12_345_678_901, "running"),
        Start("-", 0, 0, "failed"),
    ]
    assert (tmp_path / restart_history.NAME).read_text().splitlines()[0].split() == [
        "alaunchofmine",
        "0",
        "12",
        "preempted",
    ]


def test_three_failures_at_one_step_are_enough(start, tmp_path):
    for restarts in range(3):
        start("a", restarts, 10)
    with pytest.raises(
        ValueError, match=r"failed 3 times in a row in step 10 \(start 1: running, step 10; start 2: ru"
    ):
        start("a", 3, 10)
    assert len(history(tmp_path)) == 3
    start("a", 0, 10)  # started anew by someone, under the same name
    start("b", 3, 10)


def test_failures_before_the_first_step_count_too(start):
    for restarts in range(3):
        start("a", restarts, 0, "failed")
    with pytest.raises(ValueError, match="before the first step"):
        start("a", 3, 0)


@pytest.mark.parametrize(
    "ends",
    [
        [(10, None), (10, None)],
        [(10, None), (10, None), (11, None)],  # it gets on
        [(9, None), (10, None), (10, None)],
        [(10, None), (10, None), (10, "preempted")],
        [(10, None), (10, "finished"), (10, None)],
    ],
)
def test_other_histories_do_not_stop_a_restart(start, ends):
    for restarts, (step, state) in enumerate(ends):
        start("a", restarts, step, state)
    start("a", len(ends), 10)


def test_a_start_that_torchrun_stopped_since_another_rank_failed_counts(start):
    for restarts, state in enumerate(["failed", "stopped", "stopped"]):
        start("a", restarts, 6, state)
    with pytest.raises(ValueError, match="failed 3 times in a row in step 6"):
        start("a", 3, 6)


def test_status_is_of_all_those_starts_and_not_of_the_last_ones_rank(start, tmp_path, monkeypatch):
    for restarts in range(3):
        start("a", restarts, 6, "failed")
    status = run_folder.Status(tmp_path, "a")
    status.end("failed", reason="killed", rank=1, step=6)
    monkeypatch.setattr(restart_history, "launch_id", lambda: ("a", 3))
    monkeypatch.setattr(session, "from_first", lambda work: work())
    with pytest.raises(ValueError, match="failed 3 times in a row in step 6"):
        session.Session(tmp_path, SimpleNamespace(rank=0, world_size=2))
    status.end(
        "failed", unless_known=True, retryable=True, rank=0, reason="rank 0 failed with exit code 2"
    )  # a launcher
    known = run_folder.read_status(tmp_path)
    assert (known["rank"], known["step"], known["retryable"]) == (None, 6, False) and "3 times" in known["reason"]


def test_starts_that_a_scheduler_stopped_and_began_again_do_not_count(start):
    """Slurm's requeue is a new start under the same name."""
    for _ in range(3):
        start("a", 0, 0, "stopped")
    start("a", 1, 0)


def test_what_other_launches_did_does_not_count(start):
    start("a", 0, 10)
    start("b", 1, 10)
    start("b", 2, 10)
    start("b", 3, 10)
    with pytest.raises(ValueError, match="failed 3 times"):
        start("b", 4, 10)


def test_the_step_outlives_a_kill(tmp_path):
    child = os.fork()
    if child == 0:
        this = RestartHistory(tmp_path)
        this.begin()
        this.record(41)
        this.record(42)
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert history(tmp_path)[0].step == 42


def test_a_half_written_line_is_no_start(start, tmp_path):
    start("a", 0, 5)
    with open(tmp_path / restart_history.NAME, "a") as file:
        file.write("a   ")
    start("a", 1, 6)
    assert [(a.restarts, a.step) for a in history(tmp_path)] == [(0, 5), (1, 6)]


@pytest.mark.parametrize("damage", ["zeros", "empty", "garbage", "truncated", "absent", "a folder"])
def test_a_damaged_record_stops_no_start(start, tmp_path, damage, capsys):
    path = tmp_path / restart_history.NAME
    start("a", 0, 5)
    start("a", 1, 5)
    whole = path.read_bytes()
    damaged = {"zeros": bytes(len(whole)), "empty": b"", "garbage": os.urandom(300), "truncated": whole[:-10]}
    path.unlink()
    if damage in damaged:
        path.write_bytes(damaged[damage])
    elif damage == "a folder":
        path.mkdir()
    start("a", 2, 7, "failed")
    said = capsys.readouterr().err
    kept = [Start("a", 0, 5, "running")] if damage == "truncated" else []
    if damage == "a folder":
        assert path.is_dir() and f"warning: {path} cannot be kept (Is a directory)" in said
    else:
        assert history(tmp_path) == [*kept, Start("a", 2, 7, "failed")]
        assert ("is damaged: what it held" in said) == (damage in ("zeros", "garbage", "truncated"))


def test_a_step_that_cannot_be_written_ends_no_run(start, tmp_path, monkeypatch, capsys):
    this = RestartHistory(tmp_path)
    this.begin()

    def full(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(restart_history.os, "pwrite", full)
    this.record(1)
    this.record(2)
    this.end("finished")
    assert this.step == 2
    assert capsys.readouterr().err.count("cannot be kept (Input/output error)") == 1


def test_other_ranks_know_the_step_and_write_nothing(tmp_path):
    this = RestartHistory(tmp_path)
    this.record(8)
    this.end("finished")
    assert this.step == 8 and history(tmp_path) == []
