"""The folder of a run: one a run whatever the number of ranks, chosen, locked and written by rank 0.

``config.yaml``, ``plan.json``, ``metrics.jsonl``, ``metrics.json``, ``status.json``, ``attempts.txt``, ``checkpoints/``; and
``stacks/`` after a hang.
"""

import contextlib
import datetime
import errno
import fcntl
import itertools
import json
import math
import os
import socket
import stat
import sys
from pathlib import Path
from typing import IO, Any

import yaml

from trainer.config import RunConfig


def choose(run: RunConfig, launch: tuple[str, int]) -> Path:
    """The folder of this run: ``run.dir``, or a fresh ``root/name/<date-time>``; a restart by torchrun finds the folder of
    its first attempt. Raises ``ValueError`` where it cannot be written."""
    run_id, restarts = launch
    folder = parent = Path(run.root) / run.name if run.dir is None else Path(run.dir)
    try:
        if run.dir is None:
            folder = (_of_launch(parent, run_id) if restarts else None) or _fresh(parent)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"run folder {folder} cannot be made ({error.strerror}): set run.root or run.dir to a writable place"
        ) from None
    return folder


def lock(folder: Path) -> IO[str]:
    """Keeps a second run out of the folder; released when the returned file is closed or the process dies.
    Raises ``ValueError`` naming the holder."""
    handle = open(folder / "RUN.lock", "a+")  # noqa: SIM115 - open for as long as the run lives
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read().strip() or "another process"
        raise ValueError(
            f"run folder {folder} is in use by {holder}: choose another run.dir, or stop that run"
        ) from None
    if note := open_to_others(folder):
        print(f"warning: {note}", file=sys.stderr, flush=True)
    handle.truncate(0)
    handle.write(f"pid {os.getpid()} on {socket.gethostname()} since {now()}")
    handle.flush()
    return handle


def open_to_others(folder: Path) -> str | None:
    """What lets other users change a run, and so what is loaded from it; None where nothing does."""
    facts, lock_facts = folder.stat(), (folder / "RUN.lock").stat()
    if facts.st_mode & stat.S_IWOTH:
        return f"run folder {folder} can be written by every user of this machine: chmod o-w {folder}"
    if lock_facts.st_uid not in (os.getuid(), 0):
        return f"run folder {folder} has a lock of another user (uid {lock_facts.st_uid}): use a run.dir of your own"
    return None


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all; NaN becomes null, as JSON has none."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """As ``write_json`` writes it."""
    return json.dumps(_finite(value), indent=2) + "\n"


def append_json_line(path: Path, value: Any) -> None:
    """Whole or not at all. A full disk is no reason to end a run: the line is left out, and that is said."""
    line = json.dumps(_finite(value)) + "\n"
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(line.encode()) < len(line.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            file.truncate(size)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            print(f"\nwarning: {path} has lost a line ({error.strerror}): make room", flush=True)


def write_yaml(path: Path, value: Any) -> None:
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # ranks may write at once: the last one stands
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Status:
    """``status.json``: state (running, finished, failed, preempted), step, reason, whether another start may help
    (``retryable``); for whoever watches from outside."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self.path = folder / "status.json"
        self.facts: dict[str, Any] = {"run_id": run_id, "started": now()}

    def update(self, state: str, **facts: Any) -> None:
        self.facts.update(facts, state=state, updated=now())
        write_json(self.path, self.facts)

    def end(self, state: str, *, hearsay: bool = False, **facts: Any) -> None:
        """A ``failed`` or ``preempted``, told by any rank: added to what rank 0 wrote. ``hearsay``: this rank knows only that
        another one ended; one that knows more is left its word."""
        known = json.loads(self.path.read_text()) if self.path.exists() else self.facts
        if not hearsay or known["state"] == "running":
            write_json(self.path, {**known, **facts, "state": state, "updated": now()})


def _fresh(parent: Path) -> Path:
    """A folder that was not there; two runs that start in the same second get one each."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count():
        path = parent / (f"{stamp}-{number}" if number else stamp)
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError


def _of_launch(parent: Path, run_id: str) -> Path | None:
    for path in sorted(parent.glob("*/status.json"), reverse=True):
        if json.loads(path.read_text()).get("run_id") == run_id:
            return path.parent
    return None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
