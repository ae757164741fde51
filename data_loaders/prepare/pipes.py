"""Text that an engine reads while it is decompressed and decoded here: through a named pipe, so that nothing lies on the disk."""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SIZE = 1 << 20  # bytes of a pipe; Linux grants it to everybody
_SET_SIZE = 1031  # F_SETPIPE_SZ, of Linux alone


@contextmanager
def pipe(chunks: Iterator[bytes], folder: Path) -> Iterator[str]:
    """The path of a pipe in ``folder`` that gives the chunks, once. Raises what the chunks raise: then the reader has got
    only a part."""
    path = folder / f"pipe-{threading.get_ident()}"
    os.mkfifo(path)
    feeder = _Feeder(chunks, path)
    try:
        feeder.start()
        yield str(path)
    finally:
        feeder.end()
        os.unlink(path)
        if feeder.error is not None:
            raise feeder.error


@contextmanager
def beside(chunks: Iterator[bytes], path: str) -> Iterator[str]:
    """``path``, and meanwhile a look at the chunks. Raises what they raise."""
    feeder = _Feeder(chunks, None)
    feeder.start()
    try:
        yield path
    except BaseException:
        feeder.stop()
        raise
    finally:
        feeder.join()
        if feeder.error is not None:
            raise feeder.error


class _Feeder(threading.Thread):
    """Writes chunks to a pipe, or only takes them (``path`` None)."""

    def __init__(self, chunks: Iterator[bytes], path: Path | None) -> None:
        super().__init__(name="chunks", daemon=True)
        self._chunks, self._path = chunks, path
        self._stopped = False
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            if self._path is None:
                self._take(len)
            else:
                with open(self._path, "wb", buffering=0) as target, suppress(BrokenPipeError):
                    _widen(target.fileno())
                    self._take(target.write)
        except Exception as error:  # noqa: BLE001 - raised again by who waits for us
            self.error = error

    def stop(self) -> None:
        """The rest of the chunks is not wanted."""
        self._stopped = True

    def end(self) -> None:
        """Waits for the end; a reader that gave up, or never opened the pipe, is stood in for meanwhile."""
        self.stop()
        reader = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            while self.is_alive():
                with suppress(BlockingIOError):
                    os.read(reader, _SIZE)
                self.join(0.01)
        finally:
            os.close(reader)

    def _take(self, write: Callable[[memoryview], int]) -> None:
        for chunk in self._chunks:
            rest = memoryview(chunk)
            while rest and not self._stopped:
                rest = rest[write(rest) :]
            if self._stopped:
                return


def _widen(descriptor: int) -> None:
    """A wider pipe means fewer changes between the two sides; the narrow one works too."""
    with suppress(OSError):
        fcntl.fcntl(descriptor, _SET_SIZE, _SIZE)
