"""Trials as processes (of a program that trains nothing): failures, side by side, stopped and gone on with."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from launch.sweep import picture, results, space, trials
from launch.sweep.grid import Grid
from launch.sweep.shares import Share
from launch.sweep.trials import Trial
from tests.helpers import sweep_fakes as fakes
from tests.helpers import warm

REPOSITORY = Path(__file__).resolve().parents[2]
RATES = "lr=1e-4,1e-3,1e-2,1e-1"


def grid(root, text=RATES):
    return Grid(space.parse([text])[1], root)


def notes(trial):
    return [json.loads(line) for line in (trial.folder / "notes.jsonl").read_text().splitlines()]


def test_failed_trials_are_recorded_and_end_nothing(tmp_path, capsys):
    search = grid(tmp_path)
    fakes.sweep(search, [Share()], fakes.command({1: "mistake", 2: "killed"}))
    first, mistake, killed, last = search.trials()
    assert [trial.state for trial in search.trials()] == ["complete", "failed", "failed", "complete"]
    assert mistake.reason == "batch_size is 7: no"
    assert "exit code 137" in killed.reason and "output.txt" in killed.reason
    assert first.value == pytest.approx(fakes.auc(1e-4)) and last.value == pytest.approx(fakes.auc(1e-1))
    assert trials.best(search.trials(), "valid.auc").number == 0
    assert [trial.number for trial in trials.ranked(search.trials(), "valid.auc")] == [0, 3, 1, 2]
    assert "trial 1 (lr=0.001): failed (batch_size is 7: no)" in capsys.readouterr().err
    assert fakes.signals_are_as_before()


def test_a_secret_that_is_swept_is_written_nowhere_and_still_given_to_the_run(tmp_path, capsys):
    for _ in range(2):
        search = grid(tmp_path, "logging.api_key=hunter22,hunter23")
        trial = search.next()
        assert trial.overrides == ["logging.api_key=hunter22"] and "hunter" not in str(trial)
        search.tell(trial)
    assert json.loads((trial.folder / "trial.json").read_text())["values"] == {"logging.api_key": "<redacted>"}
    done = [replace(trial, state="complete", value=0.7), replace(search.next(), state="complete", value=0.6)]
    dimensions = space.parse(["logging.api_key=hunter22,hunter23"])[1]
    results.leave(tmp_path, done, dimensions, [], [], "valid.auc")
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert not any(b"hunter" in content for content in [*written, capsys.readouterr().out.encode()])
    assert [label for _, label in picture.axis_of(dimensions[0], done).ticks] == ["<redacted>"] * 2


def test_the_same_sweep_again_runs_nothing_twice(tmp_path):
    fakes.sweep(grid(tmp_path), [Share()], fakes.command({1: "mistake"}))
    again = grid(tmp_path)
    assert again.next() is None
    assert [trial.state for trial in again.trials()] == ["complete", "failed", "complete", "complete"]
    assert all(trial.seconds is not None for trial in again.trials())


def test_trials_side_by_side_have_a_share_each(tmp_path):
    search = grid(tmp_path, "lr=" + ",".join(f"1e-{n}" for n in range(1, 7)))
    fakes.sweep(search, [Share(cores=(0,)), Share(gpus=("GPU-a",), cores=(1,))], fakes.command(seconds=0.3))
    used = {}
    for trial in search.trials():
        (_, began, share), (_, ended, _) = notes(trial)
        used.setdefault(share, []).append((began, ended))
    assert set(used) == {"0", "GPU-a,1"}
    for spans in used.values():
        assert all(end <= begin for (_, end), (begin, _) in zip(sorted(spans), sorted(spans)[1:]))
    spans = [sorted(spans)[0] for spans in used.values()]
    assert max(begin for begin, _ in spans) < min(end for _, end in spans), "the first two overlap"


def test_a_signal_lets_trials_save_and_the_same_sweep_goes_on_with_them(tmp_path):
    search = grid(tmp_path)
    started = tmp_path / f"{tmp_path.name}-0001" / "metrics.jsonl"

    def stop():
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    runner = fakes.sweep(search, [Share(), Share()], fakes.command(evaluations=2, seconds=5))
    thread.join()
    assert runner.stopped == signal.SIGTERM
    assert [trial.state for trial in search.trials()] == ["open"] * 4
    assert [note[0] for note in notes(search.trials()[1])] == ["started", "stopped"]
    assert not search.trials()[2].folder.exists()
    again = grid(tmp_path)
    fakes.sweep(again, [Share()])
    assert [trial.state for trial in again.trials()] == ["complete"] * 4
    assert [note[0] for note in notes(again.trials()[1])] == ["started", "stopped", "started", "ended"]


def test_a_run_that_ended_before_its_sweep_could_tell_is_not_run_again(tmp_path):
    search = grid(tmp_path)
    trial = search.trials()[2]
    trial.folder.mkdir()
    (trial.folder / "status.json").write_text('{"state": "finished"}')
    (trial.folder / "metrics.json").write_text('{"valid": {"auc": 0.75}}')
    fakes.sweep(search, [Share()])
    assert search.trials()[2].value == 0.75 and not (trial.folder / "notes.jsonl").exists()


def test_evaluations_of_a_run_that_went_on_from_a_checkpoint(tmp_path):
    lines = [(10, "valid", 0.5), (15, "train", 0.9), (20, "valid", 0.6), (20, "valid", 0.61), (30, "valid", None)]
    text = "".join(
        json.dumps({"step": s, "rows_trained": s, "split": split, "auc": auc}) + "\n" for s, split, auc in lines
    )
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 40, "spl')
    assert trials.evaluations(tmp_path, "valid.auc") == [0.5, 0.61]
    assert trials.evaluations(tmp_path / "absent", "valid.auc") == []


@pytest.mark.parametrize(
    ("state", "code", "pruned", "expected"),
    [
        ("finished", 0, False, "complete"),
        ("finished", 143, True, "complete"),  # it was at its end when it was asked to stop
        ("finished", 1, False, "failed"),
        ("preempted", 143, True, "pruned"),
        ("preempted", 143, False, "open"),
        ("preempted", None, False, "open"),
        ("running", 137, False, "failed"),
        ("failed", 1, False, "failed"),
        (None, 2, False, "failed"),
    ],
)
def test_what_became_of_a_trial(state, code, pruned, expected, tmp_path):
    if state:
        (tmp_path / "status.json").write_text(json.dumps({"state": state, "reason": "no room"}))
    (tmp_path / "metrics.json").write_text('{"valid": {"auc": 0.7}}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rows_trained": 1, "split": "valid", "auc": 0.6}\n')
    ended = trials.outcome(Trial(0, {}, tmp_path), "valid.auc", code, pruned)
    assert ended.state == expected
    assert ended.value == {"complete": 0.7, "pruned": 0.6}.get(expected)
    if state == "failed":
        assert ended.reason == "no room"
    without = trials.outcome(Trial(0, {}, tmp_path), "valid.ne", code, pruned)
    if expected == "complete":
        assert without.state == "failed" and without.reason.startswith("metrics.json has no valid.ne")


def test_lower_is_better_for_losses():
    some = [replace(Trial(n, {}, Path()), state="complete", value=value) for n, value in enumerate((0.5, 0.3, 0.4))]
    assert trials.best(some, "valid.logloss").number == 1
    assert trials.best(some, "valid.auc").number == 0


WORKER = """
import os, time
os.write(1, f"cores {sorted(os.sched_getaffinity(0))} pid {os.getpid()}\\n".encode())
time.sleep(9999)
"""
SWEEP = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-m", "launch.children", str(os.getpid()), sys.argv[1], sys.executable,
                  "-m", "tests.helpers.start_ranks", "--nproc-per-node", "1", "fake_worker"], start_new_session=True).wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="cores and parents are Linux's")
def test_a_trial_keeps_to_its_cores_and_does_not_outlive_its_sweep(tmp_path):
    (tmp_path / "fake_worker.py").write_text(WORKER)
    core = max(os.sched_getaffinity(0))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    call = [sys.executable, "-c", SWEEP, str(core)]
    sweep = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, text=True)
    said = sweep.stdout.readline().split()
    assert said[:2] == ["cores", f"[{core}]"]
    left = psutil.Process(sweep.pid).children(recursive=True)
    assert int(said[-1]) in [process.pid for process in left]
    sweep.kill()
    sweep.wait()
    sweep.stdout.close()
    _, alive = psutil.wait_procs(left, timeout=warm.PATIENCE)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
