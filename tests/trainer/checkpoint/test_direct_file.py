"""Files written past the page cache hold what was written, whatever its sizes and places in memory."""

import errno
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainer.checkpoint import direct_file
from trainer.checkpoint.direct_file import BLOCK, BUFFER, DirectFile
from trainer.checkpoint.tensor_file import TensorFile, place_tensors, write_tensors

SIZES = [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, BUFFER - BLOCK, BUFFER, BUFFER + 5, 2 * BUFFER + 3 * BLOCK + 11]


def written(path, pieces):
    with DirectFile(path) as file:
        for piece in pieces:
            file.write(memoryview(piece))
    assert file.size == sum(map(len, pieces))
    return path.read_bytes()


def test_pieces_of_any_size_and_alignment_come_one_after_the_other(tmp_path):
    generator = random.Random(3)
    memory = np.random.default_rng(3).integers(0, 256, 4 * BUFFER, dtype=np.uint8)
    for trial in range(20):
        pieces = []
        for size in generator.choices(SIZES, k=6):
            start = generator.choice([0, 1, 63, -memory.ctypes.data % BLOCK, -memory.ctypes.data % BLOCK + 9])
            pieces.append(memory[start : start + size])
        assert written(tmp_path / str(trial), pieces) == b"".join(map(bytes, pieces))


def test_nothing_written_is_an_empty_file(tmp_path):
    assert written(tmp_path / "empty", []) == b""


def test_a_file_that_exists_is_left_alone(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_a_file_system_without_direct_writing_gets_the_same_bytes(tmp_path, monkeypatch):
    plain, flags_seen = os.open, []

    def refusing(path, flags, *rest, **options):
        flags_seen.append(bool(flags & os.O_DIRECT))
        descriptor = plain(path, flags & ~os.O_DIRECT, *rest, **options)
        if flags & os.O_DIRECT:  # as Linux: the file is there all the same
            os.close(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return descriptor

    monkeypatch.setattr(direct_file.os, "open", refusing)
    content = bytes(range(256)) * 100
    with DirectFile(tmp_path / "file") as file:
        file.write(memoryview(content))
    monkeypatch.undo()
    assert flags_seen == [True, False]
    assert (tmp_path / "file").read_bytes() == content


def test_placed_tensors_lie_in_memory_as_in_the_file(tmp_path):
    live = {
        "bytes": torch.randint(0, 255, (5001,), dtype=torch.uint8),
        "wide": torch.randn(70_001, 16),
        "exact": torch.randn(77, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "one": torch.tensor(3.0),
    }
    placed = place_tensors(live, pinned=False)
    for key, tensor in placed.items():
        tensor.copy_(live[key])
    write_tensors(tmp_path / "file", placed)
    file = TensorFile(tmp_path / "file")
    start = file._start
    assert list(placed) == list(live) and start % BLOCK == 0
    for key, tensor in live.items():
        assert torch.equal(file[key], tensor) and file[key].shape == tensor.shape and placed[key].shape == tensor.shape
        if tensor.numel():
            assert (placed[key].data_ptr() - start - file.tensors[key][2]) % BLOCK == 0


@pytest.mark.parametrize("code", [0, 2])
def test_pinned_memory_is_as_large_as_asked_for(monkeypatch, capsys, code):
    """CUDA's part is taken by a recorder: which memory it pins, and when it lets go of it."""
    held, calls = {}, []

    def pin(address, size, flags):
        calls.append((address, size, flags))
        held.update({address: size} if code == 0 else {})
        return code

    def launch(*_, device):
        raise RuntimeError(f"the error that was kept, on {device}")

    monkeypatch.setattr(torch, "zeros", launch)
    monkeypatch.setattr(
        torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=pin, cudaHostUnregister=held.pop)
    )
    live = {"first": torch.randn(300_003), "second": torch.randn(5, dtype=torch.float64)}
    placed = place_tensors(live, pinned=True)
    size = sum(tensor.nbytes for tensor in live.values())
    begin = min(tensor.data_ptr() for tensor in placed.values())
    assert calls == [(begin, size, 0)] and begin % BLOCK == 0
    assert max(tensor.data_ptr() + tensor.nbytes for tensor in placed.values()) == begin + size
    assert held == ({} if code else {begin: size})
    assert ("warning: CUDA cannot pin" in capsys.readouterr().err) is bool(code)
    kept = placed.pop("second")
    del placed
    assert held == ({} if code else {begin: size}), "the memory is in use"
    del kept
    assert held == {}


def test_placed_tensors_are_written_without_a_copy(tmp_path, monkeypatch):
    """All but the ends of tensors goes to the disk from where it lies."""
    live = {"first": torch.randn(1_000_003), "second": torch.randn(500_001)}
    placed = place_tensors(live, pinned=False)
    for key, tensor in placed.items():
        tensor.copy_(live[key])
    hold, copied = DirectFile._hold, []

    def counting(self, rest):
        left = hold(self, rest)
        copied.append(len(rest) - len(left))
        return left

    monkeypatch.setattr(DirectFile, "_hold", counting)
    size, _ = write_tensors(tmp_path / "file", placed)
    assert sum(copied) < 6 * BLOCK < size / 100
