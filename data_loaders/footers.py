"""Parquet footers: read, and validated before they are used.

A footer says how many rows there are and where their bytes are, and has no checksum. With a corrupt one the Parquet library
may lose rows silently (a wrong count) or crash the process (a broken list, in its C++ code). So each footer is first parsed
and checked in a *child process* (``footer_checks``), of which there is one, started with the first footer; it answers with
the footer's content, or with what is wrong in it. Where the child dies, the footer that it had is the corrupt one.
"""

import base64
import contextlib
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_loaders.errors import UserError
from data_loaders.storage import Stat, Storage, StorageError

_THREADS = 32  # they wait for the storage more than they compute
_AT_ONCE = 64  # files
_STARTS = 3  # of the child, until it has done its work
_TAIL = 1 << 16  # bytes, read first: the footers of most files fit
_MAGIC = b"PAR1"
_ROOT = str(Path(__file__).resolve().parents[1])
_CHILD = f"import sys; sys.path.insert(0, {_ROOT!r}); from data_loaders.footer_checks import main; main()"
_CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGXCPU)
_TEXT = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".gz", ".zst", ".bz2", ".xz", ".zip")
PREPARE = "make Parquet of CSV and JSON with clicktrainer prepare (docs/prepare.md); rows to score: clicktrainer predict --raw"


Facts = tuple[tuple[int, ...], pa.Schema, bool]


@dataclass(frozen=True)
class Footer:
    """``digest``: sha256, hex, of its bytes. ``row_groups``: rows of each. ``schema``: without metadata. ``shuffled``: whether
    the file says that ``prepare`` has shuffled its rows."""

    digest: str
    row_groups: tuple[int, ...]
    schema: pa.Schema
    shuffled: bool


def scan(storage: Storage, stats: Sequence[Stat]) -> list[Footer]:
    """The footers of files, in their order. Raises ``UserError`` naming the first file that is not a whole Parquet file or
    contradicts itself, ``StorageError`` where the storage keeps failing."""
    found: list[Footer] = []
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        for first in range(0, len(stats), _AT_ONCE):
            some = stats[first : first + _AT_ONCE]
            contents = list(pool.map(partial(_content, storage), some))
            answers = _CHECKER.ask([(content, stat.size) for content, stat in zip(contents, some)])
            for stat, content, answer in zip(some, contents, answers):
                if isinstance(answer, str):
                    raise _unreadable(stat, answer)
                found.append(Footer(digest(content), *answer))
    return found


def read(storage: Storage, name: str, size: int) -> bytes:
    """The Parquet footer of a file, to be parsed by ``parse``. Raises ``UserError`` where there is none, ``OSError`` where
    the file cannot be read."""
    with storage.open(name) as source:
        tail = _last(source, size, _TAIL)
        if tail[-4:] != _MAGIC:
            raise UserError("it does not end as a Parquet file does")
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > size:
            raise UserError(f"its footer would be {length} bytes long, the file is {size}")
        return tail[-length:] if length <= len(tail) else _last(source, size, length)


def digest(footer: bytes) -> str:
    return hashlib.sha256(footer).hexdigest()


def parse(footer: bytes) -> pq.FileMetaData:
    """Of one that ``scan`` let pass."""
    return pq.read_metadata(pa.BufferReader(footer))


def is_text(name: str) -> bool:
    """By a file's name: text, or packed."""
    return name.lower().endswith(_TEXT)


def _last(source: pa.NativeFile, size: int, count: int) -> bytes:
    source.seek(max(0, size - count))
    return source.read(count)


def _content(storage: Storage, stat: Stat) -> bytes:
    if stat.size == 0:
        raise UserError(f"data file '{stat.name}' has 0 bytes: write it again, or take it away")
    try:
        return storage.retries(stat.name).run(lambda: read(storage, stat.name, stat.size))
    except StorageError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        if is_text(stat.name):
            raise UserError(f"data file '{stat.name}' is not Parquet: {PREPARE}") from error
        raise _unreadable(stat, error) from error


def _unreadable(stat: Stat, why: object) -> UserError:
    return UserError(
        f"data file '{stat.name}' cannot be read as Parquet ({why}): it may be truncated, damaged, not Parquet, or without "
        "read permission; write it again, or take it away"
    )


class _Checker:
    """The child process. Threads may share it; a forked process begins with one of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._schemas: list[pa.Schema] = []

    def ask(self, footers: Sequence[tuple[bytes, int]]) -> list[Facts | str]:
        """Of each footer and size of its file what ``Footer`` holds behind the digest, or what is wrong."""
        found: list[Facts | str] = []
        with self._lock:
            starts = 0
            while len(found) < len(footers):
                starts += 1
                if starts > _STARTS + sum(isinstance(answer, str) for answer in found):
                    raise OSError("the process that checks Parquet footers ends again and again: is there memory left?")
                child = self._process or self._start()
                try:
                    found += self._answers(child, footers[len(found) :])
                except BaseException:  # what the child still has to say would answer the next question
                    child.kill()
                    self._crashed(child)
                    raise
                if len(found) < len(footers) and self._crashed(child):
                    found.append("its footer is damaged")
        return found

    def _answers(self, child: subprocess.Popen, footers: Sequence[tuple[bytes, int]]) -> Iterator[Facts | str]:
        """As many as the child lives to give."""
        sizes = [number for footer, size in footers for number in (len(footer), size)]
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(struct.pack(f"<{len(sizes) + 1}q", len(footers), *sizes))
            child.stdin.writelines(footer for footer, _ in footers)
            child.stdin.flush()
        for _ in footers:
            line = child.stdout.readline()
            if not line.endswith(b"\n"):
                return
            answer = json.loads(line)
            if "new" in answer:
                self._schemas.append(pa.ipc.read_schema(pa.py_buffer(base64.b64decode(answer["new"]))))
            if "error" in answer:
                yield answer["error"]
            else:
                yield tuple(answer["row_groups"]), self._schemas[answer["schema"]], answer["shuffled"]

    def _start(self) -> subprocess.Popen:
        # In a session of its own: Ctrl-C is its parent's matter, whose end closes its stdin.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._schemas = []
        return self._process

    def _crashed(self, child: subprocess.Popen) -> bool:
        """Takes leave of a child that has ended. False where it had nothing to do for long, or somebody killed it."""
        self._process = None
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        return -child.wait() in _CRASHES


_CHECKER = _Checker()


def _begin_anew() -> None:
    """In a forked process: the child answers the parent."""
    global _CHECKER
    _CHECKER = _Checker()


os.register_at_fork(after_in_child=_begin_anew)
