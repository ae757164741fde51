"""A pool of arrays whose memory is reused once nothing refers to it."""

import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Buffers:
    """Hands out arrays. The kernel zeroes each page of new memory, which costs as much as filling it, so memory
    handed out before is reused once no array, and so no tensor, refers to it; nothing is freed by hand. There is never
    more than was in use at one time. Several threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: dict[str, list[NDArray[np.uint8]]] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
        """An array of arbitrary content. Arrays of one ``name`` have about one size."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with self._lock:
            return self._buffer(name, size)[:size].view(dtype).reshape(shape)

    def _buffer(self, name: str, size: int) -> NDArray[np.uint8]:
        kept = self._buffers.setdefault(name, [])
        for buffer in kept:
            if sys.getrefcount(buffer) == _UNUSED and len(buffer) >= size:
                return buffer
        # One that is too small is dropped; an eighth more room, so that varying sizes do not outgrow it again.
        self._buffers[name] = [buffer for buffer in kept if len(buffer) >= size]
        self._buffers[name].append(np.empty(size + size // 8, np.uint8))
        return self._buffers[name][-1]


def _references_of_unused() -> int:
    """What ``sys.getrefcount`` says, in a loop over a list, of an array that only the list holds: it depends on Python's
    version."""
    for buffer in [np.empty(0)]:
        return sys.getrefcount(buffer)
    raise AssertionError


_UNUSED = _references_of_unused()
