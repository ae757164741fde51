"""The folder of a run: one a run whatever the number of ranks, chosen, locked and written by rank 0.

The names of its files are here; ``trainer.report.run_record`` reads them. Besides there are ``attempts.txt``, ``checkpoints/``,
``tensorboard/``, and ``stacks/`` after a hang.
"""

import contextlib
import datetime
import errno
import fcntl
import itertools
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from data_loaders.errors import UserError
from data_loaders.messages import warn
from data_loaders.state_files import finite, read_json, write_json, write_text
from trainer.config.job import RunConfig

LOCK, LOCK_ATTEMPTS = "RUN.lock", 10
CONFIG, PLAN, STATUS = "config.yaml", "plan.json", "status.json"
LINES, METRICS, BEFORE = (
    "metrics.jsonl",
    "metrics.json",
    "before.json",
)  # as they come; at the end; before the first step
INITIAL_ROWS = "initial_rows.json"  # of tables with init_from
SCORES, TABLES, ENVIRONMENT, REPORT = "distributions.json", "tables.json", "environment.json", "report.html"


def choose(run: RunConfig, launch: tuple[str, int]) -> Path:
    """The folder of this run: ``run.dir``, or a fresh ``root/name/<date-time>``; a restart by torchrun finds the folder of
    its first attempt. Raises ``UserError`` where it cannot be written."""
    run_id, restarts = launch
    folder = parent = Path(run.root) / run.name if run.dir is None else Path(run.dir)
    try:
        if run.dir is None:
            folder = (_of_launch(parent, run_id) if restarts else None) or _fresh(parent)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run folder {folder} cannot be made ({error.strerror}): set run.root or run.dir to a writable place"
        ) from None
    return folder


def lock(folder: Path) -> IO[str]:
    """Keeps a second run out of the folder; released when the returned file is closed or the process dies.
    Raises ``UserError`` naming the holder."""
    handle = open(folder / LOCK, "a+", errors="replace")  # noqa: SIM115 - open for as long as the run lives
    if not _locked(handle):
        handle.seek(0)
        holder = handle.read().strip() or "another process"
        raise UserError(f"run folder {folder} is in use by {holder}: choose another run.dir, or stop that run")
    if note := open_to_others(folder):
        warn(note)
    with contextlib.suppress(OSError):  # for people; on a full disk there are messages that matter more
        handle.truncate(0)
        os.pwrite(handle.fileno(), f"pid {os.getpid()} on {socket.gethostname()} since {now()}".encode(), 0)
    return handle


def _locked(handle: IO[str]) -> bool:
    """Tried for a second: a reader (``is_alive``) holds it for a moment, and a run that was just killed until it is gone."""
    for attempt in range(LOCK_ATTEMPTS):
        if attempt:
            time.sleep(1 / LOCK_ATTEMPTS)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def is_alive(folder: Path) -> bool:
    """Whether a process holds the run's lock; also where that cannot be found out."""
    try:
        with open(folder / LOCK) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def open_to_others(folder: Path) -> str | None:
    """What lets other users change a run, and so what is loaded from it; None where nothing does."""
    facts, lock_facts = folder.stat(), (folder / LOCK).stat()
    if facts.st_mode & stat.S_IWOTH:
        return f"run folder {folder} can be written by every user of this machine: chmod o-w {folder}"
    if lock_facts.st_uid not in (os.getuid(), 0):
        return f"run folder {folder} has a lock of another user (uid {lock_facts.st_uid}): use a run.dir of your own"
    return None


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def append_json_line(path: Path, value: Any) -> None:
    """Whole or not at all. A full disk, or whatever else keeps it from being written, is no reason to end a run: the line is
    left out, and that is said. One that was cut off by a crash is ended first."""
    line = json.dumps(finite(value)) + "\n"
    try:
        with open(path, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            line = f"\n{line}" if size and os.pread(file.fileno(), 1, size - 1) != b"\n" else line
            _append(file, line.encode(), size)
    except OSError as error:
        warn(f"{path} has lost a line ({error.strerror}): make it writable, or make room")


def _append(file: IO[bytes], line: bytes, size: int) -> None:
    """To a file of ``size`` bytes, which it has again where that fails."""
    try:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        file.truncate(size)
        raise


def write_yaml(path: Path, value: Any) -> None:
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


class Status:
    """``status.json``: state (running, finished, failed, preempted), step, reason, whether another start may help
    (``retryable``); for whoever watches from outside."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self.path = folder / STATUS
        self.facts: dict[str, Any] = {"run_id": run_id, "started": now()}

    def update(self, state: str, **facts: Any) -> None:
        self.facts.update(facts, state=state, updated=now())
        write_json(self.path, self.facts)

    def end(self, state: str, *, secondary: bool = False, unless_known: bool = False, **facts: Any) -> None:
        """A ``failed`` or ``preempted``, reported by any rank: added to what rank 0 wrote. ``secondary``: this rank ends only
        because another one has, and leaves what is known. ``unless_known``: so does a launcher, which replaces a secondary
        failure alone. Two ranks that failed, each by an error of its own, are both reported."""
        with _turn(self.path.with_name(".status.lock")):
            known = read_json(self.path, {}) or self.facts
            is_open = known.get("state", "running") == "running"
            # One that is not retryable is of no rank, either, but its cause is known.
            caused = known.get("rank") is not None or known.get("retryable") is False
            is_secondary = known.get("state") == "failed" and not caused
            if is_open or not (secondary or unless_known) or (unless_known and is_secondary):
                facts = _joined(known, {**facts, "state": state})
                write_json(self.path, {**known, **facts, "updated": now()})


def _joined(known: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """``facts`` of a rank's failure, with another rank's that is known; neither is worth another start unless both are."""
    ranks = known.get("rank"), facts.get("rank")
    if known.get("state") != "failed" or facts["state"] != "failed" or None in ranks or ranks[0] == ranks[1]:
        return facts
    before, reason = str(known.get("reason")), str(facts.get("reason"))
    if reason in before:
        return {}
    both = known.get("retryable") is not False and facts.get("retryable") is not False
    return {**facts, "reason": f"{before}; rank {ranks[1]}: {reason}", "rank": ranks[0], "retryable": both}


@contextlib.contextmanager
def _turn(lock: Path) -> Iterator[None]:
    """One process after the other; where that cannot be had, all the same."""
    with contextlib.ExitStack() as opened:
        with contextlib.suppress(OSError):
            _locked(opened.enter_context(open(lock, "a")))
        yield


def read_status(folder: Path) -> dict[str, Any]:
    """``status.json``, for people; empty where it is not there or damaged. ``running`` without a process that holds the lock
    is ``killed``: whoever ended the run so, a ``SIGKILL`` or a power cut, left it no time to say so."""
    status = read_json(folder / STATUS, {})
    if status.get("state") == "running" and not is_alive(folder):
        return {**status, "state": "killed", "reason": "nothing holds its lock, and it has reported no end"}
    return status


def _fresh(parent: Path) -> Path:
    """A folder that was not there; two runs that start in the same second get one each."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count():
        path = parent / (f"{stamp}-{number}" if number else stamp)
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError


def of_launch(run: RunConfig, run_id: str) -> Path | None:
    """The folder that ``choose`` gave a launch, once it has begun there."""
    if run.dir is None:
        return _of_launch(Path(run.root) / run.name, run_id)
    return Path(run.dir) if _is_of(Path(run.dir) / STATUS, run_id) else None


def _of_launch(parent: Path, run_id: str) -> Path | None:
    for path in sorted(parent.glob(f"*/{STATUS}"), reverse=True):
        if _is_of(path, run_id):
            return path.parent
    return None


def _is_of(status: Path, run_id: str) -> bool:
    known: dict[str, Any] = read_json(status, {}, quiet=True)
    return known.get("run_id") == run_id
