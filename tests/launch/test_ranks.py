"""The launcher: ranks, environment, exit codes, and one line for each kind of failure."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launch import ranks as launcher
from tests.helpers import warm
from trainer.runtime import cpu

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = """
import os, signal, sys, time
mode, rank, attempt = sys.argv[1], int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def say(*words):  # in one write, so that ranks do not interleave
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "GLIBC_TUNABLES", "TORCHELASTIC_RUN_ID")
say(f"rank={rank} attempt={attempt}", *(os.environ[name] for name in names), sys.argv[2:])
if mode == "killed-once" and rank == 1 and attempt == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "mistake":
    print("error: the user's mistake", file=sys.stderr)
    sys.exit(2)
if mode == "bug" and rank == 1:
    raise RuntimeError("a bug")
if mode == "stubborn":
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
if mode == "graceful":
    def stop(*_):
        say(f"rank {rank} saved")
        sys.exit(0)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
say("ready")
if mode in ("stubborn", "graceful", "bug") or mode == "killed-once" and attempt == 0:
    time.sleep(9999)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    (folder / "fake_worker.py").write_text(WORKER)
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "GLIBC_TUNABLES", "LOGLEVEL")}
    return {**kept, "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}", "TMPDIR": str(tmp_path_factory.mktemp("tmp"))}


def command(*arguments):
    return [sys.executable, "-m", "tests.helpers.start_ranks", *arguments]


def launch(environment, *arguments):
    return subprocess.run(command(*arguments), env=environment, capture_output=True, text=True, timeout=warm.PATIENCE)


def test_workers_get_arguments_and_environment_unchanged(environment):
    done = launch(environment, "--nproc-per-node", "2", "fake_worker", "well", "name=${model.name}", "price=$$1")
    assert (done.returncode, done.stderr) == (0, "")
    ranks = sorted(line for line in done.stdout.splitlines() if line.startswith("rank="))
    assert [line.split()[:6] for line in ranks] == [
        [f"rank={rank}", "attempt=0", "2", "2", "1", cpu.MALLOC] for rank in (0, 1)
    ]
    assert all(line.endswith("['name=${model.name}', 'price=$$1']") for line in ranks)
    assert not list(Path(environment["TMPDIR"]).glob("*")), "nothing is left behind"


def test_a_mistake_explained_by_a_worker_is_not_repeated_and_never_retried(environment):
    done = launch(environment, "--nproc-per-node", "1", "--max-restarts", "3", "fake_worker", "mistake")
    assert done.returncode == 2
    assert done.stderr == "error: the user's mistake\n"
    assert done.stdout.count("rank=0") == 1


def test_a_bug_shows_its_traceback_and_one_line_of_ours(environment):
    done = launch(environment, "--nproc-per-node", "2", "fake_worker", "bug")
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: a bug") == 1
    assert done.stderr.endswith("launch: rank 1 of 2 failed with exit code 1: its message is above\n")
    assert "ChildFailedError" not in done.stderr and "torch/distributed/elastic" not in done.stderr


def test_a_killed_rank_is_named_with_a_remedy_and_started_again_if_asked(environment):
    done = launch(environment, "--nproc-per-node", "2", "--max-restarts", "1", "fake_worker", "killed-once")
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.splitlines()
    assert first.startswith("launch: rank 1 of 2 was killed by SIGKILL: most often the kernel, out of memory")
    assert second == "launch: restart 1 of 1"
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("rank=")]
    assert {line[1] for line in lines} == {"attempt=0", "attempt=1"}
    assert len({line[6] for line in lines}) == 1, "one run id over all attempts, so that a worker finds its run folder"


def start_and_wait(environment, *arguments):
    """A running launcher with two workers that are ready, and the workers."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command("--nproc-per-node", "2", *arguments), env=environment, text=True, **pipes)
    ready = 0
    while ready < 2:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        ready += line == "ready\n"
    return process, psutil.Process(process.pid).children()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_every_worker(environment, number):
    process, workers = start_and_wait(environment, "fake_worker", "graceful")
    assert len(workers) == 2
    process.send_signal(number)
    output, errors = process.communicate(timeout=warm.PATIENCE)
    assert process.returncode == 128 + number
    assert sorted(output.splitlines()) == ["rank 0 saved", "rank 1 saved"]
    assert errors == f"launch: stopped by {number.name}\n"


def test_workers_that_do_not_end_within_their_grace_are_killed(environment):
    process, workers = start_and_wait(environment, "--grace", "1", "fake_worker", "stubborn")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=warm.PATIENCE) == 128 + signal.SIGTERM
    gone, alive = psutil.wait_procs(workers, timeout=warm.PATIENCE)
    assert not alive
    process.communicate()


def test_an_impatient_user_leaves_no_worker_behind(environment):
    process, workers = start_and_wait(environment, "fake_worker", "stubborn")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.wait(timeout=warm.PATIENCE) == 128 + signal.SIGINT
    gone, alive = psutil.wait_procs(workers, timeout=warm.PATIENCE)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]
    process.communicate()


def test_a_wrong_configuration_is_one_line_before_any_worker():
    done = subprocess.run(
        [sys.executable, "-m", "launch.run", "model=deepfn"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=warm.PATIENCE,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: model=deepfn: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "[Errno 28] No space left on device): make room, or set TMPDIR",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "[Errno 24] Too many open files)"),
        (OSError("no port can be opened"), "no port can be opened)"),
    ],
)
def test_ranks_that_cannot_be_started(monkeypatch, capsys, error, says):
    def fail(*_):
        raise error

    monkeypatch.setattr(launcher, "end_workers", lambda: None)  # they would be all children of pytest: Spark's JVM, too
    monkeypatch.setattr(launcher, "_run_once", fail)
    monkeypatch.setattr(launcher.os, "environ", dict(os.environ))
    assert launcher.run(launcher.Job("fake_worker", [], 1, "cpu")) == 2
    assert capsys.readouterr().err == f"error: the ranks cannot be started ({says}\n"


def test_number_of_ranks(monkeypatch):
    monkeypatch.setattr(launcher, "count_gpus", lambda: 4)
    monkeypatch.setattr(launcher, "num_cores", lambda: 8)
    assert launcher.choose_num_ranks("auto", "auto") == launcher.choose_num_ranks("auto", "cuda") == 4
    assert launcher.choose_num_ranks("auto", "cpu") == 2
    assert launcher.choose_num_ranks("6", "cpu") == 6
    with pytest.raises(ValueError, match="4 GPU"):
        launcher.choose_num_ranks("5", "cuda")
    monkeypatch.setattr(launcher, "count_gpus", lambda: 0)
    assert launcher.choose_num_ranks("auto", "auto") == 2
    with pytest.raises(ValueError, match="no GPU here"):
        launcher.choose_num_ranks("auto", "cuda")
    monkeypatch.setattr(launcher, "num_cores", lambda: 1)
    assert launcher.choose_num_ranks("auto", "cpu") == 1
    for wrong in ("0", "-1", "two", ""):
        with pytest.raises(ValueError, match="--nproc-per-node"):
            launcher.choose_num_ranks(wrong, "cpu")


def test_environment_of_workers():
    assert launcher.worker_environment({}, 2, False, 8) == cpu.VARIABLES
    assert launcher.worker_environment({}, 2, True, 8) == {"OMP_NUM_THREADS": "4"}
    assert launcher.worker_environment({}, 4, True, 2) == {"OMP_NUM_THREADS": "1"}
    mine = {"OMP_NUM_THREADS": "3", "GLIBC_TUNABLES": ""}
    assert launcher.worker_environment(mine, 2, False, 8) == {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
    assert launcher.worker_environment(mine, 2, True, 8) == {}


def test_a_worker_that_a_signal_asked_to_end():
    assert (
        launcher.describe(1, 2, 143)
        == "rank 1 of 2 was killed by SIGTERM: someone asked it to stop: the scheduler, or kill"
    )


def failures(*codes):
    """{rank: failure}; a code may come with its time, 100 by default."""
    pairs = [code if isinstance(code, tuple) else (code, 100) for code in codes]
    return {rank: SimpleNamespace(exitcode=code, timestamp=when) for rank, (code, when) in enumerate(pairs)}


@pytest.mark.parametrize(
    ("codes", "rank"),
    [
        ((1, -9), 1),  # the other lost its connection
        ((-15, 1), 1),  # the agent stopped the other
        ((-6, 1), 1),  # gloo aborts when a peer is gone
        ((-6, -9), 1),
        ((1, 2), 1),  # the mistake is explained
        ((1, (-9, 130)), 0),  # hung, and killed by the agent 30 s later
        ((-6, -15), 0),
        ((143, 1), 1),  # as SIGTERM, which it made an exit code of
    ],
)
def test_root_cause(codes, rank):
    assert launcher.root_cause(failures(*codes))[0] == rank
