"""One file of tensors in the safetensors layout, written as a stream and read by memory mapping.

The length of the header (8 bytes, little-endian), the header (JSON: dtype, shape and place of each tensor, padded with
spaces so that the data begin with a disk's block), then the raw little-endian data, each tensor aligned to its items.
Other programs that know the format can read these files; reading one executes nothing.
"""

import json
import math
import mmap
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from data_loaders.errors import UserError
from trainer.checkpoint.digest import new_digest
from trainer.checkpoint.direct_file import BLOCK, DirectFile
from trainer.checkpoint.host_memory import host_memory
from trainer.runtime.checked_json import parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SLAB_BYTES = 64 << 20  # the most that is copied at a time
CHUNK_BYTES = 2 << 20  # checked, hashed and written while it is in a CPU's cache
LONGEST_HEADER = 100 << 20  # the limit of the safetensors package
MOST_DIMENSIONS = 16  # of a tensor
LARGEST_SIZE = 1 << 60


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Writes a new file and returns once it is on disk: its bytes and digest. No second copy of a big tensor is made.

    Raises ``UserError``, naming the tensor and the index in it, at the first floating value that is not finite;
    ``OSError`` where the file exists or cannot be written. What it has written until then stays.
    """
    digest = new_digest()
    with DirectFile(path) as file:
        for data in _contents({key: tensors[key] for key in _ordered(tensors)}):
            digest.update(data)
            file.write(data)
    return file.size, digest.hexdigest()


def stream_tensors(write: Callable[[memoryview], Any], tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """The same bytes to ``write``, a bounded portion at a time, which it must be done with when it returns: how many, and
    their digest. Raises ``UserError`` as ``write_tensors``, and what ``write`` raises."""
    digest, size = new_digest(), 0
    for data in _contents({key: tensors[key] for key in _ordered(tensors)}):
        digest.update(data)
        write(data)
        size += len(data)
    return size, digest.hexdigest()


def map_new(path: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new file with one tensor, mapped to be filled in place: what memory holds of it the kernel may write out at any
    time. Raises ``OSError``."""
    like = {key: torch.empty(shape, dtype=dtype, device="meta")}
    header = _header(like)
    size = len(header) + like[key].numel() * dtype.itemsize
    with open(path, "xb+") as file:
        file.write(header)
        file.truncate(size)
        file.flush()
        mapped = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(mapped, dtype=torch.uint8)[len(header) :].view(dtype).view(shape)


def place_tensors(like: Mapping[str, Tensor], *, pinned: bool) -> dict[str, Tensor]:
    """New CPU tensors of the same shapes and types, in one piece of memory in which each lies as it will in the file
    (modulo a disk's block): ``write_tensors`` then needs no copy of them. ``pinned``: for copies from a GPU."""
    sizes = {key: like[key].numel() * like[key].element_size() for key in _ordered(like)}
    memory = host_memory(sum(sizes.values()), pinned=pinned)  # as the data of a file, it begins with a block
    placed, begin = {}, 0
    for key, size in sizes.items():
        placed[key] = memory[begin : begin + size].view(like[key].dtype).view(like[key].shape)
        begin += size
    return {key: placed[key] for key in like}


class TensorFile:
    """A file of tensors, mapped read-only. Raises ``UserError`` where the file is not what its header says, or has a
    link in its place; ``OSError`` where it cannot be read."""

    def __init__(self, path: Path) -> None:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = header_bytes(file.read(8), size)
            self._start = 8 + length
            self.tensors = parse_header(file.read(length), size - self._start)
            self._bytes = _mapped(file)

    def __getitem__(self, key: str) -> Tensor:
        """The tensor as it lies in the file: to be copied from, never written to."""
        dtype, shape, begin = self.tensors[key]
        begin += self._start
        return self._bytes[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def copy(self, key: str, part: tuple[slice, ...], target: Tensor) -> None:
        """Copies a rectangle of a tensor, one slice for each dimension, to ``target``, on whatever device: in slabs of
        rows, as a part of a big table that is to go to another device is not first made contiguous whole."""
        source = self[key][part]
        if source.dim() == 0 or target.is_cpu:
            target.copy_(source)
            return
        rows = max(1, SLAB_BYTES * len(source) // (source.numel() * source.element_size()))
        for into, out in zip(target.split(rows), source.split(rows)):
            into.copy_(out)


def slabs(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in the order of its items, as contiguous CPU tensors of at most ``SLAB_BYTES`` (views where it is so)."""
    size = tensor.numel() * tensor.element_size()
    if tensor.is_cpu and tensor.is_contiguous():
        yield from tensor.view(-1).split(SLAB_BYTES // tensor.element_size())
    elif size <= SLAB_BYTES:
        yield tensor.contiguous().cpu().view(-1)
    else:
        rows = max(1, SLAB_BYTES * len(tensor) // size)
        for part in tensor.split(rows) if len(tensor) > 1 else tensor:
            yield from slabs(part)


def open_plain(path: Path) -> BinaryIO:
    """Opens a file for reading, never through a link. Raises ``OSError`` or, for a folder or a device, ``UserError``."""
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):  # to open a device may do things, a pipe may block
        raise UserError(f"{path.name} is not a plain file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # exchanged meanwhile
        os.close(descriptor)
        raise UserError(f"{path.name} is not a plain file")
    return os.fdopen(descriptor, "rb")


def _ordered(tensors: Mapping[str, Tensor]) -> list[str]:
    """Larger items first: this keeps every tensor aligned to its items."""
    return sorted(tensors, key=lambda key: -tensors[key].element_size())


def _contents(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    yield memoryview(_header(tensors))
    for key, tensor in tensors.items():
        done = 0
        for slab in slabs(tensor.detach()):
            for chunk in slab.split(CHUNK_BYTES // slab.element_size()):
                _check_finite(key, chunk, done, tuple(tensor.shape))
                done += chunk.numel()
                yield memoryview(chunk.view(torch.uint8).numpy())


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    header, end = {}, 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)
    return len(text).to_bytes(8, "little") + text


def _check_finite(key: str, slab: Tensor, start: int, shape: tuple[int, ...]) -> None:
    """``slab`` begins at item ``start`` of the tensor. One sum tells nearly always; a finite one means finite items."""
    if not slab.is_floating_point() or math.isfinite(slab.sum().item()):
        return
    bad = ~torch.isfinite(slab)
    if bad.any():
        first = int(bad.to(torch.uint8).argmax())
        place = [int(i) for i in np.unravel_index(start + first, shape)] if shape else []
        raise NotFiniteError(key, place, slab[first].item())


class NotFiniteError(UserError):
    """``value`` stands at ``place`` of the tensor ``key``."""

    def __init__(self, key: str, place: list[int], value: float) -> None:
        super().__init__(f"{key} holds {value} at {place}")
        self.key, self.place, self.value = key, place, value


def header_bytes(start: bytes, size: int) -> int:
    """The length of the header of a file of ``size`` bytes, which begins with ``start``. Raises ``UserError``."""
    length = int.from_bytes(start[:8], "little")
    if size < 8 or not 0 < length <= min(size - 8, LONGEST_HEADER) or length % 8:
        raise UserError(f"is no file of tensors: a header of {length} bytes in a file of {size}")
    return length


def parse_header(text: bytes, size: int) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Dtype, shape and first byte of each tensor, which fill ``size`` bytes without a gap or an overlap."""
    header = parse_json(text)
    if not isinstance(header, dict):
        raise UserError("has a header that is no object")
    found, end = {}, 0
    entries = {key: _entry(key, entry) for key, entry in header.items() if key != "__metadata__"}
    for key, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize or begin % dtype.itemsize:
            raise UserError(
                f"places {key!r:.200} at bytes {begin} to {stop}, after byte {end}: shape {list(shape)} {dtype}"
            )
        found[key], end = (dtype, shape, begin), stop
    if end != size:
        raise UserError(f"has {size} bytes of data, its header {end}")
    return found


def _entry(key: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"describes {key!r:.200} as {entry!r:.200}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise UserError(f"has {key!r:.200} in the unknown dtype {entry['dtype']!r:.200}")
    offsets = sizes(entry["data_offsets"], f"the offsets of {key!r:.200}")
    if len(offsets) != 2:
        raise UserError(f"gives {key!r:.200} the offsets {list(offsets)}")
    return dtype, sizes(entry["shape"], f"the shape of {key!r:.200}"), offsets[0], offsets[1]


def sizes(value: Any, what: str) -> tuple[int, ...]:
    """A list of at most ``MOST_DIMENSIONS`` whole numbers from 0, small enough to be multiplied. Raises ``UserError``."""
    plain = isinstance(value, list) and len(value) <= MOST_DIMENSIONS  # before anything is multiplied
    plain = plain and all(type(item) is int and 0 <= item < LARGEST_SIZE for item in value)
    if not plain or math.prod(max(item, 1) for item in value) >= LARGEST_SIZE:
        raise UserError(f"gives {what} as {_short(value)}")
    return tuple(value)


def _short(value: Any) -> str:
    return f"{value[:MOST_DIMENSIONS]!r:.200}" if isinstance(value, list) else f"{value!r:.200}"


def _mapped(file: BinaryIO) -> Tensor:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nor is it written to
        return torch.frombuffer(mapped, dtype=torch.uint8)
