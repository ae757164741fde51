"""How a worker ends: one line and an exit code that says whether to start again may help."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from torch import distributed as dist

from data_loaders.storage import StorageError
from tests.helpers import warm
from tests.helpers.tiny import REPOSITORY
from trainer.runtime import fault_injection, process
from trainer.runtime.signals import StopSignals


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StorageError("'a.parquet', row group 3: storage failed 5 times"), 1),
        (OSError("'a.parquet': no permission"), 2),
    ],
)
def test_storage_that_keeps_failing_is_worth_another_start(monkeypatch, capsys, error, code):
    def leave(code):
        raise SystemExit(code)

    def job():
        raise error

    monkeypatch.setattr(process, "_leave", leave)
    monkeypatch.setattr(process, "_claim", lambda message: True)
    with pytest.raises(SystemExit) as ended:
        process.guarded(job)
    assert ended.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"


IMPORTS = """import os, signal, sys, time
from trainer.runtime import process
from trainer.runtime.signals import StopSignals"""


def child(source, environment=None):
    """A process that runs ``source``, once it has said ``ready``."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{IMPORTS}\n{source}"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def end_of(process, *signals, pause=1.3):
    """What it printed and its exit code, after ``signals``."""
    for number in signals:
        process.send_signal(number)
        time.sleep(pause)
    output, _ = process.communicate(timeout=warm.PATIENCE)
    return output, process.returncode


TRAINING = """
with StopSignals(lambda name: print("ends for", name, flush=True)) as stop:
    with stop.deferred():
        print("ready", flush=True)
        while not stop.asked:
            time.sleep(0.01)
        print("asked by", signal.Signals(stop.asked).name, flush=True)
        time.sleep({})
    print("saved", flush=True)
"""
FAILING = """
with StopSignals(lambda name: print("ends for", name, flush=True)) as stop:
    try:
        with stop.deferred():
            raise RuntimeError("lost a peer")
    except RuntimeError as error:
        print("ready", flush=True)
        while not stop.asked:
            time.sleep(0.01)
        print("tells of", error, flush=True)
"""
# A C++ wait in which Python's own handlers are not run, as in a collective.
BLOCKED = """
import torch.distributed as dist
with StopSignals() as stop, stop.deferred():
    print("ready", flush=True)
    dist.HashStore().wait(["never"])
"""
BUILDING = """
with StopSignals(lambda name: print("ends for", name, flush=True)) as stop:
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_first_signal_asks_and_a_second_one_ends():
    TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
    started = {
        "once": (child(TRAINING.format(0)), (USR1,), {}),
        "echo": (child(TRAINING.format(2)), (TERM, TERM), {"pause": 0.2}),
        "twice": (child(TRAINING.format(60)), (INT, TERM), {}),
        "in a collective": (child(BLOCKED), (TERM, TERM), {}),
        "while building": (child(BUILDING), (TERM,), {}),
        "while failing": (child(FAILING), (TERM,), {}),
    }
    ends = {name: end_of(process, *signals, **how) for name, (process, signals, how) in started.items()}
    assert ends == {
        "once": ("asked by SIGUSR1\nsaved\n", 0),
        "echo": ("asked by SIGTERM\nsaved\n", 0),
        "twice": ("asked by SIGINT\nends for SIGTERM\n", 128 + TERM),
        "in a collective": ("", 128 + TERM),
        "while building": ("ends for SIGTERM\n", 128 + TERM),
        "while failing": ("tells of lost a peer\n", 0),
    }


def test_signals_act_as_before_once_it_is_over():
    def ends(*_):
        raise AssertionError

    before = signal.signal(signal.SIGUSR1, ends)
    try:
        with StopSignals() as stop, stop.deferred():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
            assert stop.asked == signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR1) is ends
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGUSR1, before)


LAUNCHER = """
import subprocess
run = "process.guarded(lambda: (print('ready', flush=True), time.sleep(9999)))"
worker = "import time; from trainer.runtime import process; " + run
subprocess.run([sys.executable, "-c", worker])
"""


@pytest.mark.parametrize("killed", ["by its launcher's end", "not without a launcher"])
def test_a_worker_does_not_outlive_its_launcher(killed):
    launched = killed.startswith("by")
    launcher = child(LAUNCHER, {"TORCHELASTIC_RUN_ID": "a"} if launched else {})
    (worker,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    gone, alive = psutil.wait_procs([worker], timeout=warm.PATIENCE if launched else 3)
    assert bool(gone) == launched
    for survivor in alive:
        survivor.kill()
    launcher.stdout.close()


def test_a_worker_whose_launcher_is_gone_already_ends(monkeypatch):
    left = []
    monkeypatch.setattr(process, "_leave", left.append)
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *_: 0))
    process.die_with_launcher()
    assert left == []
    monkeypatch.setattr(process.os, "getppid", lambda: 1)
    monkeypatch.setattr(process, "LAUNCHERS", (b"",))  # process 1 is the launcher itself, as in a container
    process.die_with_launcher()
    assert left == []
    monkeypatch.setattr(process, "LAUNCHERS", (b"no such name",))
    process.die_with_launcher()
    assert left == [1]


def raised(action):
    with pytest.raises(Exception) as found:
        action()
    return found.value


BROKEN = fault_injection.parse("phase=reader,action=raise")[0]


@pytest.mark.parametrize(
    ("error", "retryable", "lost_peer"),
    [
        (StorageError("storage failed"), True, False),
        (OSError("no permission"), False, False),
        (KeyError("a bug"), True, False),
        (raised(lambda: fault_injection.parse("no rule")), False, False),
        (raised(lambda: fault_injection._act(BROKEN, 1)), True, False),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1"), True, True),
        (
            dist.DistBackendError(
                "NCCL error in: NCCLUtils.cpp:93, unhandled system error, NCCL version 2.29.7\nncclSystemError: "
                "System call or external library call failed or device error. \nLast error:\nsocketProgress: "
                "Connection closed by remote peer node2<4242>"
            ),
            True,
            True,
        ),
        (
            dist.DistBackendError(
                "NCCL error in: NCCLUtils.cpp:93, remote process exited or there was a network error\n"
                "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
                "prematurely."
            ),
            True,
            True,
        ),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True, True),
        (
            dist.DistBackendError(
                "NCCL error in: NCCLUtils.cpp:93\nncclSystemError: System call (e.g. socket, malloc) failed\n"
                "Last error:\nError while creating shared memory segment /dev/shm/nccl-a (size 4)"
            ),
            True,
            False,
        ),
    ],
)
def test_what_another_start_may_mend(error, retryable, lost_peer):
    assert (process.is_retryable(error), process.is_lost_peer(error)) == (retryable, lost_peer)
