"""Ranks on this machine: what torchrun does on one node, with one line for each kind of failure.

The ranks write straight to this terminal. SIGTERM, SIGINT and SIGUSR1 are passed on to them, and they save and end; what has not
ended after the grace is killed. A second signal ends them without saving. Where no rank could write into status.json how
the run ended, this does.

Exit codes: 0; 2 for a mistake of the user's (a rank that ends with 2 has explained one); 128 + n after signal n; 1 for all else.
"""

import errno
import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from data_loaders.errors import UserError
from data_loaders.messages import USER_ERROR, fail, note, warn
from launch import one_machine
from launch.rank import command as rank_command
from launch.stop import Stop, end_workers, say_stopped
from trainer.config.job import RunConfig
from trainer.runtime import cpu, run_folder
from trainer.runtime.distributed import GRACE, stay_on_this_machine

CPU_RANKS = 2
NONE_OF_ITS_OWN = "SIGURG"  # for the agent to handle: signals that matter come through launch.stop
NO_PLACE = (errno.ENOSPC, errno.EROFS, errno.EACCES)  # for the agent's own files
REMEDIES = {
    "SIGKILL": "most often the kernel, out of memory (see dmesg): lower batch_size, the ranks, or the tables' rows",
    "SIGBUS": "most often shared memory or a disk is full: see df -h, /dev/shm included",
    "SIGSEGV": "a crash in compiled code: `python -m trainer.doctor.check_install` tests the installation",
    "SIGILL": "compiled code needs another processor: `python -m trainer.doctor.check_install` tests the installation",
    "SIGABRT": "compiled code gave up: its message is above",
    "SIGTERM": "someone asked it to stop: the scheduler, or kill",
}


@dataclass(frozen=True)
class Job:
    """What every rank runs, ``python -m module arguments``, and what it is granted. ``run``: None where the module is not the
    trainer."""

    module: str
    arguments: Sequence[str]
    num_ranks: int
    device: str
    max_restarts: int = 0
    grace: int = 30
    run: RunConfig | None = None


def choose_num_ranks(requested: str, device: str) -> int:
    """``auto``: as many as GPUs, or on a CPU two (one where there is one core). Raises ``UserError``."""
    num_gpus = count_gpus() if device != "cpu" else 0
    if device == "cuda" and not num_gpus:
        raise UserError("device=cuda, but PyTorch sees no GPU here: use device=cpu, or make setup DEVICE=cuda")
    if requested == "auto":
        return num_gpus or min(CPU_RANKS, num_cores())
    if not requested.isdecimal() or int(requested) < 1:
        raise UserError(f"--nproc-per-node is {requested!r}: give a number of ranks from 1, or auto")
    if num_gpus and int(requested) > num_gpus:
        raise UserError(f"--nproc-per-node is {requested}: there are {num_gpus} GPU(s), a rank each; or device=cpu")
    return int(requested)


def count_gpus() -> int:
    return torch.cuda.device_count()


def num_cores() -> int:
    """Those this process may use, which taskset and containers limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_environment(environment: Mapping[str, str], num_ranks: int, on_gpu: bool, cores: int) -> dict[str, str]:
    """Variables to add for the workers; what the user has set stays."""
    if not on_gpu:
        return cpu.missing(environment)
    return {} if "OMP_NUM_THREADS" in environment else {"OMP_NUM_THREADS": str(max(1, cores // num_ranks))}


def run(job: Job) -> int:
    """At most 1 + ``max_restarts`` times. Returns the exit code."""
    on_gpu = job.device != "cpu" and count_gpus() > 0
    os.environ.update(worker_environment(os.environ, job.num_ranks, on_gpu, num_cores()))
    os.environ[GRACE] = str(job.grace)
    outcome = Outcome(job.run, str(uuid.uuid4()))
    _silence_elastic()
    try:
        with Stop(lambda reason: outcome.record("preempted", reason=reason)) as stop:
            return _run(job, outcome, stop)
    except OSError as error:
        remedy = ": make room, or set TMPDIR" if error.errno in NO_PLACE else ""
        return fail(f"the ranks cannot be started ({error}){remedy}")


def _run(job: Job, outcome: "Outcome", stop: Stop) -> int:
    for attempt in range(1 + job.max_restarts):
        try:
            _run_once(job, outcome.run_id, attempt, stop)
            return 0
        except ChildFailedError as failed:
            rank, failure = root_cause(failed.failures)
            said = describe(rank, job.num_ranks, failure.exitcode)
            outcome.record("failed", rank=rank, reason=said)
            if failure.exitcode == USER_ERROR or outcome.is_mistake():
                return USER_ERROR
            note(f"launch: {said}")
            if attempt < job.max_restarts:
                note(f"launch: restart {attempt + 1} of {job.max_restarts}")
        except SignalException:
            end_workers()
            name = signal.Signals(stop.number).name
            outcome.record("preempted", reason=f"{name}: it ended without saving")
            say_stopped(stop.number)
            return 128 + stop.number
        finally:
            end_workers()
    return 1


class Outcome:
    """How a run ended, as its ``status.json`` has it."""

    def __init__(self, run: RunConfig | None, run_id: str) -> None:
        self.run, self.run_id = run, run_id

    def record(self, state: str, **facts: Any) -> None:
        """Where no rank could, or none that knew more than that another one had ended."""
        try:
            if (folder := self._folder()) is not None:
                run_folder.Status(folder, self.run_id).end(state, unless_known=True, retryable=True, **facts)
        except OSError as error:
            warn(f"the run's status.json could not be written ({error.strerror})")

    def is_mistake(self) -> bool:
        """Whether a rank, not always the one that ended first, has met what another start cannot mend."""
        folder = self._folder()
        status = run_folder.read_status(folder) if folder is not None else {}
        return status.get("state") == "failed" and status.get("retryable") is False

    def _folder(self) -> Path | None:
        """None where there is none, or another launch has begun there."""
        return None if self.run is None else run_folder.of_launch(self.run, self.run_id)


def _run_once(job: Job, run_id: str, attempt: int, stop: Stop) -> None:
    """torchrun on one machine, beyond which nothing listens; signals are passed on. Raises ``ChildFailedError`` and
    ``SignalException``."""
    one_machine.register()
    stay_on_this_machine()
    # Without -u: Python's stderr is line-buffered, so the lines of several ranks do not run into each other.
    command = rank_command(job.module, job.arguments)
    if attempt:  # We restart, not the agent (which would retry mistakes too); the workers learn of it as usual.
        command = ["/usr/bin/env", f"TORCHELASTIC_RESTART_COUNT={attempt}", *command]
    with tempfile.TemporaryDirectory(prefix="launch-", ignore_cleanup_errors=True) as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=job.num_ranks,
            run_id=run_id,
            rdzv_backend=one_machine.BACKEND,
            max_restarts=0,
            shutdown_timeout=job.grace,
            signals_to_handle=NONE_OF_ITS_OWN,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        with stop.passed_on():
            # The agent fills ${…} templates into arguments; $$ is a plain $.
            elastic_launch(config, command[0])(*(argument.replace("$", "$$") for argument in command[1:]))


def root_cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first, as far as can be known, and how.

    Ranks that fall with another do so within a second or two. Among those, one that explained a mistake goes first,
    then one that was killed, then one that reported an error (it may have lost its connection to the killed one), then
    one that aborted (which gloo and NCCL do when a peer is gone), last one that the agent stopped with SIGTERM.
    """
    first = min(failure.timestamp for failure in failures.values())

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, int]:
        kinds = {USER_ERROR: 0, -signal.SIGABRT: 3, -signal.SIGTERM: 4, 128 + signal.SIGTERM: 4}
        code = item[1].exitcode
        return item[1].timestamp > first + 1, kinds.get(code, 1 if code < 0 else 2)

    return min(failures.items(), key=order)


def describe(rank: int, num_ranks: int, exitcode: int) -> str:
    """One line: which rank, how it ended, what to do."""
    where = f"rank {rank} of {num_ranks}"
    if exitcode > 128:  # it ended itself when a signal asked it to
        exitcode = 128 - exitcode
    if exitcode >= 0:
        return f"{where} failed with exit code {exitcode}: its message is above"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    return f"{where} was killed by {name}: {REMEDIES.get(name, 'see man 7 signal')}"


def _silence_elastic() -> None:
    """The agent's log repeats, over many lines, what we say in one. LOGLEVEL brings it back."""
    if "LOGLEVEL" not in os.environ:
        for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
            logging.getLogger(name).addHandler(logging.NullHandler())
            logging.getLogger(name).propagate = False
