"""Training on this machine in one command: `python -m launch.run [--nproc-per-node N] [--max-restarts N] key=value …`.

What torchrun does on one node, made pleasant: the configuration is composed and checked here first, once, in a second;
the workers write straight to this terminal; a failure ends in one line that says which rank, why, and what to do.

SIGTERM, SIGINT and SIGUSR1 are passed on to the workers, which save and end; what has not ended after `--grace` seconds is
killed. A second one ends them without saving. Where no worker could write how the run ended into status.json, this does.

Exit codes: 0; 2 for a mistake of the user's (a worker that ends with 2 has explained one); 128 + n after signal n; 1 for all
else.
"""

import argparse
import errno
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_loaders import packages
from data_loaders.errors import UserError
from data_loaders.secrets import scrub
from launch.rank import command as rank_command
from launch.stop import Stop, end_workers, say_stopped
from trainer.config.job import RunConfig, TrainConfig
from trainer.runtime import run_folder

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

USER_ERROR = 2
CPU_RANKS = 2
GRACE_SECONDS = 30  # as torchrun has it
GRACE = (
    "TRAINER_GRACE_SECONDS"  # tells the workers, who warn where a save takes longer (trainer.monitoring.grace_period)
)
NONE_OF_ITS_OWN = "SIGURG"  # for the agent to handle: signals that matter come through launch.stop
# Without them glibc returns large activations to the kernel at every step; a third of the embedding update's time.
MALLOC = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
NO_PLACE = (errno.ENOSPC, errno.EROFS, errno.EACCES)  # for the agent's own files
REMEDIES = {
    "SIGKILL": "most often the kernel, out of memory (see dmesg): lower batch_size, the ranks, or the tables' rows",
    "SIGBUS": "most often shared memory or a disk is full: see df -h, /dev/shm included",
    "SIGSEGV": "a crash in compiled code: `python -m trainer.doctor.check_install` tests the installation",
    "SIGILL": "compiled code needs another processor: `python -m trainer.doctor.check_install` tests the installation",
    "SIGABRT": "compiled code gave up: its message is above",
    "SIGTERM": "someone asked it to stop: the scheduler, or kill",
}


def main(argv: Sequence[str] | None = None) -> int:
    with Stop() as stop:
        return start(sys.argv[1:] if argv is None else argv, stop)


def start(argv: Sequence[str], stop: Stop) -> int:
    options, overrides = parse(argv)
    try:
        if options.max_restarts < 0:
            raise UserError(f"--max-restarts is {options.max_restarts}: give a number from 0")
        if options.grace < 0:
            raise UserError(f"--grace is {options.grace}: give a number of seconds from 0")
        if options.multirun:
            from launch.sweep import command  # only a sweep needs it

            return command.main(options, overrides)
        if "--print-config" in overrides:
            os.execv(sys.executable, rank_command(options.module, overrides))
        config = compose_job(options.module, overrides)
        device = config.device if config else device_of(overrides)
        num_ranks = choose_num_ranks(options.nproc_per_node, device)
        if config:
            config.check_world_size(num_ranks)
    except ValueError as error:
        print(f"error: {scrub(str(error))}", file=sys.stderr)
        return USER_ERROR
    on_gpu = device != "cpu" and count_gpus() > 0
    os.environ.update(worker_environment(os.environ, num_ranks, on_gpu, num_cores()))
    os.environ[GRACE] = str(options.grace)
    try:
        return run(options.module, overrides, num_ranks, options.max_restarts, options.grace, stop, config)
    except OSError as error:
        remedy = ": make room, or set TMPDIR" if error.errno in NO_PLACE else ""
        print(f"error: the ranks cannot be started ({error}){remedy}", file=sys.stderr)
        return USER_ERROR


def sweep(argv: Sequence[str]) -> int:
    return main(["--multirun", *argv])


def program() -> int:
    """The command `clicktrainer`: as `python -m launch.run`, which finds modules in the current folder."""
    if not getattr(sys.flags, "safe_path", False) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    packages.explain_missing()
    return main()


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the rest in order: the worker's."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.run",
        usage="%(prog)s [options] key=value …",
        description="Trains on this machine's GPUs or cores. All other arguments go to the module: Hydra's overrides "
        "(model=din data=ml1m data.root=DIR), --config-dir DIR, --print-config.",
        allow_abbrev=False,
    )
    parser.add_argument("--nproc-per-node", default="auto", help="ranks; auto (default): one a GPU, two on a CPU")
    parser.add_argument("--module", default="trainer.train", help="what every rank runs (default: trainer.train)")
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep: key=a,b (docs/sweeps.md)")
    parser.add_argument("--max-restarts", type=int, default=0, help="new starts after a crash (default: 0)")
    parser.add_argument(
        "--grace",
        type=int,
        default=GRACE_SECONDS,
        help=f"seconds that workers have to save and end when asked to stop, then they are killed (default: {GRACE_SECONDS})",
    )
    return parser.parse_known_args(list(argv))


def compose_job(module: str, overrides: Sequence[str]) -> TrainConfig | None:
    """A training job's configuration; of another module nothing is known. Raises ``UserError`` for what cannot work."""
    if module != "trainer.train":
        return None
    from trainer.config.compose import compose

    config = compose(overrides).config
    config.check_addresses()
    return config


def device_of(overrides: Sequence[str]) -> str:
    """What another module's command line asks for: auto, cpu or cuda."""
    named = [value.removeprefix("device=") for value in overrides if value.startswith("device=")]
    return named[-1] if named else "auto"


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
    import torch  # here, as it takes seconds to load

    return torch.cuda.device_count()


def num_cores() -> int:
    """Those this process may use, which taskset and containers limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_environment(environment: Mapping[str, str], num_ranks: int, on_gpu: bool, cores: int) -> dict[str, str]:
    """Variables to add for the workers; what the user has set stays."""
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // num_ranks))}
    if not on_gpu:
        wanted["GLIBC_TUNABLES"] = MALLOC
    return {name: value for name, value in wanted.items() if name not in environment}


def run(
    module: str,
    arguments: Sequence[str],
    num_ranks: int,
    max_restarts: int,
    grace: int,
    stop: Stop,
    config: TrainConfig | None,
) -> int:
    """Runs ``module`` on ``num_ranks`` ranks, at most 1 + ``max_restarts`` times. Returns the exit code."""
    # Here, as PyTorch takes seconds to load.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _silence_elastic()
    outcome = Outcome(config.run if config else None, str(uuid.uuid4()))
    stop.on_end = lambda reason: outcome.tell("preempted", reason=reason)
    for attempt in range(1 + max_restarts):
        try:
            _run_once(module, arguments, num_ranks, outcome.run_id, attempt, grace, stop)
            return 0
        except ChildFailedError as failed:
            rank, failure = root_cause(failed.failures)
            said = describe(rank, num_ranks, failure.exitcode)
            outcome.tell("failed", rank=rank, reason=said)
            if failure.exitcode == USER_ERROR or outcome.is_mistake():
                return USER_ERROR
            print(f"launch: {said}", file=sys.stderr)
            if attempt < max_restarts:
                print(f"launch: restart {attempt + 1} of {max_restarts}", file=sys.stderr)
        except SignalException:
            end_workers()
            name = signal.Signals(stop.number).name
            outcome.tell("preempted", reason=f"{name}: it ended without saving")
            say_stopped(stop.number)
            return 128 + stop.number
        finally:
            end_workers()
    return 1


class Outcome:
    """How a run ended, as its ``status.json`` has it. ``run``: None where the module is not the trainer."""

    def __init__(self, run: RunConfig | None, run_id: str) -> None:
        self.run, self.run_id = run, run_id

    def tell(self, state: str, **facts: Any) -> None:
        """Where no rank could, or none that knew more than that another one had ended."""
        try:
            if (folder := self._folder()) is not None:
                run_folder.Status(folder, self.run_id).end(state, unless_known=True, retryable=True, **facts)
        except OSError as error:
            print(f"warning: the run's status.json could not be written ({error.strerror})", file=sys.stderr)

    def is_mistake(self) -> bool:
        """Whether a rank, not always the one that ended first, has met what another start cannot mend."""
        folder = self._folder()
        status = run_folder.read_status(folder) if folder is not None else {}
        return status.get("state") == "failed" and status.get("retryable") is False

    def _folder(self) -> Path | None:
        """None where there is none, or another launch has begun there."""
        return None if self.run is None else run_folder.of_launch(self.run, self.run_id)


def _run_once(
    module: str, arguments: Sequence[str], num_ranks: int, run_id: str, attempt: int, grace: int, stop: Stop
) -> None:
    """torchrun on one machine, beyond which nothing listens; signals are passed on. Raises ``ChildFailedError`` and
    ``SignalException``."""
    # Here, as PyTorch takes seconds to load.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from launch import one_machine
    from trainer.runtime.distributed import stay_on_this_machine

    one_machine.register()
    stay_on_this_machine()
    # Without -u: Python's stderr is line-buffered, so the lines of several ranks do not run into each other.
    command = rank_command(module, arguments)
    if attempt:  # We restart, not the agent (which would retry mistakes too); the workers learn of it as usual.
        command = ["/usr/bin/env", f"TORCHELASTIC_RESTART_COUNT={attempt}", *command]
    # The agent fills ${…} templates into arguments; $$ is a plain $.
    with tempfile.TemporaryDirectory(prefix="launch-", ignore_cleanup_errors=True) as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id=run_id,
            rdzv_backend=one_machine.BACKEND,
            max_restarts=0,
            shutdown_timeout=grace,
            signals_to_handle=NONE_OF_ITS_OWN,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        stop.armed = True
        try:
            elastic_launch(config, command[0])(*(argument.replace("$", "$$") for argument in command[1:]))
        finally:
            stop.armed = False


def root_cause(failures: "Mapping[int, ProcessFailure]") -> "tuple[int, ProcessFailure]":
    """The rank that failed first, as far as can be told, and how.

    Ranks that fall with another do so within a second or two. Among those, one that explained a mistake goes first,
    then one that was killed, then one that reported an error (it may have lost its connection to the killed one), then
    one that aborted (which gloo and NCCL do when a peer is gone), last one that the agent stopped with SIGTERM.
    """
    first = min(failure.timestamp for failure in failures.values())

    def order(item: "tuple[int, ProcessFailure]") -> tuple[bool, int]:
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


if __name__ == "__main__":
    sys.exit(main())
