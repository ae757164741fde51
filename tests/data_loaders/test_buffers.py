"""Memory comes again when nothing refers to it, and not before."""

import numpy as np
import torch

from data_loaders.buffers import Buffers


def test_memory_is_used_again_only_when_it_is_free():
    buffers = Buffers()
    first = buffers.empty("a", (10, 7), np.int64)
    address = first.ctypes.data
    tensor = torch.from_numpy(first[2:, 1:])[3]  # what looks at a part of it holds it
    del first
    second = buffers.empty("a", (70,), np.int64)
    assert second.ctypes.data != address
    assert buffers.empty("b", (70,), np.int64).ctypes.data != address
    del tensor
    assert buffers.empty("a", (5, 14), np.int64).ctypes.data == address
    assert buffers.empty("a", (20,), np.float32).ctypes.data == address
    assert second.ctypes.data != address


def test_there_is_never_more_than_was_in_use_at_one_time():
    buffers = Buffers()
    for size in [100, 110, 90, 500, 400, 100, 560, 1]:
        held = None
        held = [buffers.empty("a", (size,), np.int8) for _ in range(3)]
        assert [len(array) for array in held] == [size] * 3
    del held
    assert len(buffers._buffers["a"]) == 3
    assert all(500 <= len(buffer) <= 560 * 9 // 8 for buffer in buffers._buffers["a"])
