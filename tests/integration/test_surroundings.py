"""What a job does where its surroundings fail it: a slow rank, a full disk, ranks that come late or not at all, too
little grace, an old model that is damaged. (Failure matrix, rows R12, R24, R26 and R30.)"""

import contextlib
import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import tiny, warm
from tests.helpers.faulty import LAST, Job
from trainer.checkpoint import committed, verify


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_slow_rank_is_reported_and_nothing_fails(click_log, tmp_path):
    slow, wait = "rank=1,phase=step_begin,action=sleep=0.5", "phase=step_begin,action=sleep=0.1"
    end = Job(click_log, tmp_path / "run").launch(faults=f"{wait};{slow}")
    assert end.code == 0 and end.status["state"] == "finished", end.stderr
    told = [line["ranks"] for line in lines_of(tmp_path / "run") if "ranks" in line]
    assert len(told) >= 8 and {facts["slowest"] for facts in told[1:]} == {1}
    # Other work on the machine adds to all of these times, but takes nothing from the sleeps.
    assert all(facts["ratio"] > 1 and facts["own_seconds"] > 0.5 for facts in told[1:])
    assert all(facts["input_wait_seconds"] < facts["own_seconds"] for facts in told[1:])
    assert len(re.findall("warning: rank 1 of 2 holds the others up", end.stderr)) == 1


def test_equal_ranks_are_not_warned_of(click_log, tmp_path):
    end = Job(click_log, tmp_path / "run").launch(faults="phase=step_begin,action=sleep=0.4")
    assert end.code == 0, end.stderr
    assert [line for line in lines_of(tmp_path / "run") if "ranks" in line]
    assert "holds the others up" not in end.stderr


def test_a_save_that_does_not_fit_into_the_grace_is_told_once(click_log, tmp_path):
    job = Job(click_log, tmp_path / "run", launcher=("-m", "launch.run", "--grace", "1"))
    end = job.launch(faults="rank=0,phase=during_write,action=sleep=2")
    assert end.code == 0, end.stderr
    (seconds,) = re.findall(
        r"warning: the last checkpoint took (\d+) s, but .* gets 1 s .*clicktrainer train --grace \d+,", end.stderr
    )
    assert 2 <= int(seconds) < 30


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
    """A file system of its own; skips where this user may not mount one."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs"]
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left") as full:
        while True:
            file.write(bytes(4096))
    assert full.value.errno == errno.ENOSPC


def wait_for(found, process):
    while not found():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_full_disk_ends_no_run_and_harms_no_checkpoint(click_log, tmp_path):
    """It fills up within the save of step 8, past the check of what is free, and there is room again later."""
    with small_disk(tmp_path / "disk", 64) as disk:
        run = disk / "run"
        full, room = tmp_path / "full", tmp_path / "room"
        job = Job(click_log, run)
        process = job.start(
            faults=f"rank=0,step=8,phase=during_write,action=wait={full};phase=step_begin,step=10,action=wait={room}"
        )
        parts = lambda: list((run / "checkpoints").glob(".tmp-step-8-*"))  # noqa: E731
        wait_for(parts, process)
        fill(disk / "ballast")
        before = {path: path.read_bytes() for path in (run / "checkpoints" / "step-4").iterdir()}
        full.touch()
        wait_for(lambda: not parts(), process)
        job.reach(10, process, already=True)
        (disk / "ballast").unlink()
        room.touch()
        end = job.end(process)
        assert end.code == 0 and end.status["state"] == "finished", end.stderr
        (told,) = re.findall(r"warning: checkpoint step-8 could not be written to .*", end.stderr)
        assert "No space left" in told and "earlier checkpoints are untouched" in told
        assert end.steps == [12, LAST]
        assert [verify(path) for path in committed(run / "checkpoints")] == [None, None]
        assert before, "step-4 was there, whole, while the disk was full"
        steps = [line["step"] for line in lines_of(run) if line["split"] == "train"]
        assert steps[-1] == LAST and sorted(set(steps)) == steps


def alone(rank, root, run, port, seconds=3, *overrides):
    """Starts one rank of two, by hand."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    arguments = tiny.arguments(root, f"run.dir={run}", f"rendezvous_timeout_seconds={seconds}", *overrides)
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.train", *arguments],
        env={**os.environ, "PYTHONPATH": str(tiny.REPOSITORY), "OMP_NUM_THREADS": "1", **place, **address},
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def test_ranks_that_do_not_meet_end_by_themselves_in_one_line(click_log, tmp_path):
    """By ``rendezvous_timeout_seconds``: gloo's own time-out is 30 minutes, twice what is waited for here."""
    with socket.create_server(("localhost", 0)) as taken:
        started = {
            "rank 0 did not meet all 2 ranks at": alone(0, click_log, tmp_path / "a", free_port()),
            "rank 1 did not meet all 2 ranks at": alone(1, click_log, tmp_path / "b", free_port()),
            "is in use by another program: set MASTER_PORT": alone(
                0, click_log, tmp_path / "c", taken.getsockname()[1]
            ),
        }
        for expected, process in started.items():
            _, stderr = process.communicate(timeout=warm.PATIENCE)
            assert process.returncode == 1, "another start may help"
            (line,) = stderr.splitlines()
            assert line.startswith("error: ") and expected in line
    assert not list(tmp_path.iterdir()), "no run folder was made"


def test_ranks_that_start_apart_share_one_run_folder(click_log, tmp_path):
    overrides = (f"run.root={tmp_path}", "run.dir=null", "steps=2", "model.hidden_units=[8]", "log_every_steps=1")
    port = free_port()
    late = alone(1, click_log, tmp_path, port, 60, *overrides)
    time.sleep(2)
    for process in (alone(0, click_log, tmp_path, port, 60, *overrides), late):
        _, stderr = process.communicate(timeout=warm.PATIENCE)
        assert process.returncode == 0, stderr
    (run,) = tmp_path.glob("*/*")
    assert [line["step"] for line in lines_of(run) if line["split"] == "train"] == [1, 2]


def test_a_damaged_model_to_start_from_is_found_before_anything_is_built(click_log, tmp_path):
    old = tmp_path / "old" / "checkpoints" / "step-5"
    old.mkdir(parents=True)
    (old / "MANIFEST.json").write_text("{}")
    job = Job(click_log, tmp_path / "run")
    end = job.launch(f"warm_start.path={tmp_path / 'old'}", faults="phase=build,action=kill9")
    (line,) = end.errors
    assert "old/checkpoints/step-5: not a whole checkpoint (MANIFEST.json" in line
    assert end.status["state"] == "failed" and not end.status["retryable"]
