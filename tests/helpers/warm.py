"""Processes that have torch, TorchRec and the trainer imported before they begin: importing them is most of a small test's
time. A fork server imports them once; its children are what a fresh interpreter would be: one thread, no test's state.

What torchrun itself does, with signals, restarts and killed ranks, is tested with torchrun: tests/integration/test_end_to_end.py,
tests/integration/test_faults.py, tests/integration/test_surroundings.py.
"""

import functools
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from multiprocessing import connection, forkserver, process, reduction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.runtime import fault_injection

METHOD = "forkserver"
PRELOADED = ("trainer.training", "trainer.evaluate", "trainer.predict", "tests.helpers.ranks", "tests.helpers.tiny")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
GRACE = 30.0  # torchrun's, from SIGTERM to SIGKILL
PATIENCE = 900.0  # seconds that are never needed, but where a machine has much else to do
LOCK = threading.Lock()  # an exit code can be read once; starting a process reads those of all others, in any thread


@functools.cache
def start_server() -> None:
    """Starts the fork server where it does not run: with one thread for OpenMP, which asks the environment only once."""
    before = os.environ.copy()
    os.environ.update(ONE_THREAD)
    try:
        multiprocessing.get_context(METHOD).set_forkserver_preload(list(PRELOADED))
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(
    ranks: int,
    module: str,
    arguments: Sequence[object],
    environment: dict[str, str] | None = None,
    timeout: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    """``python -m module arguments`` for no ``ranks``. Else what torchrun would start: so many ranks, with its environment
    and its store; when one fails the others are ended, and the exit code is 1."""
    with LOCK:
        start_server()
    words = [str(argument) for argument in arguments]
    environment = {**(os.environ if environment is None else environment), **ONE_THREAD}
    own = [environment]
    if ranks:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        launch = str(uuid.uuid4())
        own = [{**environment, **_torchrun(rank, ranks, store.port, launch)} for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context(METHOD)
        started = [context.Process(target=_main, args=(module, words, variables, folder)) for variables in own]
        with LOCK:
            for one in started:
                one.start()
        try:
            codes = _wait(started, time.monotonic() + timeout)
        finally:
            for one in started:
                one.kill()
        out, err = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
    code = codes[0] if not ranks else int(any(codes))
    return subprocess.CompletedProcess([module, *words], code, out, err)


def become(environment: dict[str, str]) -> None:
    """A child of the fork server takes on the environment, with what was read from it before."""
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(fault_injection)
    torch.set_num_threads(1)


class Streams:
    """Stdout and stderr of this process, for a child, which has those that the fork server was started with."""

    def __reduce__(self) -> tuple:
        return _Inherited, tuple(reduction.DupFd(stream) for stream in (1, 2))


class _Inherited:
    def __init__(self, *streams: Any) -> None:
        for number, stream in enumerate(streams, 1):
            os.dup2(stream.detach(), number)


def _torchrun(rank: int, ranks: int, port: int, launch: str) -> dict[str, str]:
    """What torchrun --standalone tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": launch,
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _wait(started: Sequence[process.BaseProcess], deadline: float) -> list[int | None]:
    """The exit codes once all have ended; when one fails, the others are asked to end."""
    asked = False
    while None in (codes := _codes(started)):
        if time.monotonic() > deadline:
            if asked:
                return codes
            raise TimeoutError("a process of a test did not end")
        running = [one for one, code in zip(started, codes, strict=True) if code is None]
        if any(codes) and not asked:
            asked, deadline = True, min(deadline, time.monotonic() + GRACE)
            for one in running:
                one.terminate()
        connection.wait([one.sentinel for one in running], timeout=1.0)
    return codes


def _codes(started: Sequence[process.BaseProcess]) -> list[int | None]:
    with LOCK:
        return [one.exitcode for one in started]


def _main(module: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        stream.flush()
        file = os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, stream.fileno())
    become(environment)
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # it runs as __main__
    runpy.run_module(module, run_name="__main__", alter_sys=True)
