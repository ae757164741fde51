"""A new file on a local disk, written past the page cache.

A checkpoint is written once and seldom read. Through the page cache the kernel takes a page, copies into it and writes it
back for every 4 KB: 2.2 s of CPU time a GB on the machine of docs/results.md, against 0.02 s for ``O_DIRECT``, and other
programs lose what they had cached. ``O_DIRECT`` asks for whole blocks from aligned memory: what lies so
(``place_tensors`` sees to it for a snapshot) goes to the disk from where it is, the rest by way of an aligned buffer. Where
the file system knows no ``O_DIRECT`` the same blocks go through the page cache.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

import numpy as np

BLOCK = 4096  # bytes: the alignment that disks ask for, at most
BUFFER = 4 << 20  # bytes


class DirectFile:
    """Bytes one after the other into a file that did not exist; ``close`` returns once they are on disk.

    Raises ``OSError``, ``FileExistsError`` among them."""

    def __init__(self, path: Path) -> None:
        self._file, self._is_direct = _create(path)
        self._buffer = mmap.mmap(-1, BUFFER)  # begins on a page
        self._bytes = np.frombuffer(self._buffer, np.uint8)
        self._held = 0  # bytes in the buffer
        self.size = 0

    def write(self, data: memoryview) -> None:
        rest = np.frombuffer(data, np.uint8)
        self.size += len(rest)
        while len(rest):
            whole = len(rest) // BLOCK * BLOCK
            if whole and self._held % BLOCK == 0 and rest.ctypes.data % BLOCK == 0:
                self._flush()
                _write_all(self._file, rest[:whole].data)
                rest = rest[whole:]
            else:
                rest = self._hold(rest)

    def close(self) -> None:
        ending = self._bytes[self._held // BLOCK * BLOCK : self._held]
        self._held -= len(ending)
        self._flush()
        if len(ending):
            self._leave_direct()  # a part of a block
            _write_all(self._file, ending.data)
        os.fsync(self._file)
        self._release()

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._release()

    def _hold(self, rest: np.ndarray) -> np.ndarray:
        """Takes into the buffer what brings it to the end of a block, or all that it can; returns the others."""
        room = BUFFER - self._held
        if self._held % BLOCK and (rest.ctypes.data - self._held) % BLOCK == 0:
            room = BLOCK - self._held % BLOCK  # from there on it can go by itself
        taken = min(room, len(rest))
        self._bytes[self._held : self._held + taken] = rest[:taken]
        self._held += taken
        if self._held == BUFFER:
            self._flush()
        return rest[taken:]

    def _flush(self) -> None:
        if self._held:
            _write_all(self._file, self._bytes[: self._held].data)
            self._held = 0

    def _leave_direct(self) -> None:
        if self._is_direct:
            flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~os.O_DIRECT)

    def _release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _create(path: Path) -> tuple[int, bool]:
    """The descriptor of a new file, and whether it goes past the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o666), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            path.unlink(missing_ok=True)  # Linux creates the file before it refuses the flag
    return os.open(path, flags, 0o666), False


def _write_all(file: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(file, data) :]
