"""The scored rows of an evaluation with their keys, dealt anew so that one rank has all rows of a key.

A row is its logit, label and weight packed into 64 bits, beside 64 bits for each key: 8 · (1 + G) bytes on the rank that
scored it, and 16 bytes on the rank that owns its key while one column is worked on. What goes beyond ``memory_bytes``
lies in temporary files (``$TMPDIR``), which have no name and so vanish with the process.

The values of a key's hash are cut into parts, as many as the number of all rows says. A part is worked on as a whole, in
memory and in one fixed order; so sums by part, and what is added up from them, are the same bit for bit on any number of
ranks, in memory or not. A part has about ``PART_ROWS`` rows, more where a single key has more.

Letters: R rows, B rows of a batch, G columns of keys.
"""

import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[np.int64]  # [R, 2 or more], packed, key, and what else is asked for

PART_ROWS = 1 << 16
FEWEST_PARTS, MOST_PARTS = 1 << 4, 1 << 16
BLOCK_ROWS = 1 << 18  # batches are put together to so many
EXCHANGED_ROWS = 1 << 22  # at most so many come to one rank at a time
_LABEL = 31
_WEIGHT = (1 << 31) - 1


def pack(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """int64 [B]: 32 bits of the logit (float32), such that integers are in its order, one of the label, 31 of the weight
    (float32, never negative; 0: a row that does not count)."""
    bits = logits.float().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    weight = torch.where(weights > 0, weights.float(), 0.0).view(torch.int32)
    return (ordered.long() << 32) | ((labels > 0.5).long() << _LABEL) | weight.long()


def unpack(packed: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Logits, labels and weights [R]."""
    ordered = (packed >> 32).astype(np.int32)
    logits = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(np.float32).astype(np.float64)
    labels = ((packed >> _LABEL) & 1).astype(np.float64)
    weights = (packed & _WEIGHT).astype(np.int32).view(np.float32).astype(np.float64)
    return logits, labels, weights


class Spool:
    """Blocks of rows [R, C]: in memory up to ``memory_bytes``, the others in a temporary file."""

    def __init__(self, memory_bytes: int) -> None:
        self._left = memory_bytes
        self._blocks: list[Rows | tuple[int, int, int]] = []  # rows, or where in the file they are, how many, how wide
        self._file: IO[bytes] | None = None
        self._bytes = 0  # of the file

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def spilled_bytes(self) -> int:
        return self._bytes

    def add(self, block: Rows) -> None:
        if block.nbytes <= self._left:
            self._left -= block.nbytes
            self._blocks.append(block)
            return
        try:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115  it goes with the spool
            self._file.write(np.ascontiguousarray(block).data)
        except OSError as error:
            raise OSError(
                f"rows of an evaluation by group could not be written to {tempfile.gettempdir()} ({error}): let TMPDIR name "
                "a folder with more room, or raise evaluation.memory_mb"
            ) from error
        self._blocks.append((self._bytes, *block.shape))
        self._bytes += block.nbytes

    def rows(self, number: int) -> int:
        block = self._blocks[number]
        return block[1] if isinstance(block, tuple) else len(block)

    def read(self, number: int, start: int, stop: int) -> Rows:
        block = self._blocks[number]
        if not isinstance(block, tuple):
            return block[start:stop]
        begin, _, width = block
        self._file.flush()
        self._file.seek(begin + start * width * 8)
        found = np.fromfile(self._file, np.int64, (stop - start) * width).reshape(-1, width)
        self._file.seek(self._bytes)
        return found


class KeyedRows:
    """Collects this rank's rows; then ``parts`` deals them out, column by column."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory = memory_bytes // 2
        self._spool = Spool(self._memory)
        self._coming: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._block: list[Rows] = []
        self._rows = 0  # all in all
        self.num_parts = 0  # of all ranks, known to ``parts``

    @property
    def spilled_bytes(self) -> int:
        return self._spool.spilled_bytes

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, weights: Tensor, keys: Tensor) -> None:
        """Adds a batch, ``keys`` int64 [B, G]. On a GPU it waits for the batch before the last one only."""
        rows = torch.cat((pack(logits, labels, weights)[:, None], keys), dim=1)  # [B, 1 + G]
        event = None
        if rows.is_cuda:
            host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            host.copy_(rows, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            rows = host
        self._coming.append((rows, event))
        while len(self._coming) > 2:
            self._take()

    def parts(self, column: int, others: Sequence[int] = ()) -> Iterator[tuple[int, Rows]]:
        """A part's number and its rows by key, then logit, label and weight: those parts of all ranks' rows, with the keys of
        ``column`` and beside them those of the ``others``, that are this rank's and not empty. Rows that differ in others
        alone come in any order. All ranks call it together."""
        while self._coming:
            self._take()
        self._close_block()
        parts = self.num_parts = _num_parts(_over_ranks(self._rows, dist.ReduceOp.SUM))
        own = _owned(parts, *_rank())
        received, places = Spool(self._memory), []
        for rows in self._exchanged([0, *(1 + each for each in (column, *others))], parts):
            rows, counts = _by_part(rows, parts)
            received.add(rows)
            places.append(np.concatenate([[0], np.cumsum(counts[own.start : own.stop])]))
        for index, part in enumerate(own):
            found = [received.read(i, int(at[index]), int(at[index + 1])) for i, at in enumerate(places)]
            rows = np.concatenate([np.empty((0, 2 + len(others)), np.int64), *found])
            if len(rows):
                yield part, _in_order(rows)

    def _take(self) -> None:
        rows, event = self._coming.popleft()
        if event is not None:
            event.synchronize()
        block = rows.numpy()
        block = block[(block[:, 0] & _WEIGHT) != 0]
        self._rows += len(block)
        self._block.append(block)
        if sum(map(len, self._block)) >= BLOCK_ROWS:
            self._close_block()

    def _close_block(self) -> None:
        if self._block:
            self._spool.add(np.concatenate(self._block))
            self._block = []

    def _exchanged(self, columns: list[int], parts: int) -> Iterator[Rows]:
        """The rows that are this rank's, a piece of every rank's at a time."""
        _, world_size = _rank()
        size = max(1, EXCHANGED_ROWS // world_size)
        pieces = self._pieces(columns, size)
        if world_size == 1:
            yield from pieces
            return
        owned = [_owned(parts, rank, world_size) for rank in range(world_size)]
        rounds = sum(-(-self._spool.rows(number) // size) for number in range(len(self._spool)))
        for _ in range(_over_ranks(rounds, dist.ReduceOp.MAX)):
            rows, counts = _by_part(next(pieces, np.empty((0, len(columns)), np.int64)), parts)
            ends = np.concatenate([[0], np.cumsum(counts)])
            yield _all_to_all(rows, [int(ends[own.stop] - ends[own.start]) for own in owned])

    def _pieces(self, columns: list[int], size: int) -> Iterator[Rows]:
        for number in range(len(self._spool)):
            for start in range(0, self._spool.rows(number), size):
                stop = min(start + size, self._spool.rows(number))
                yield np.ascontiguousarray(self._spool.read(number, start, stop)[:, columns])


def to_owners(rows: Rows) -> Rows:
    """Of all ranks' rows, whose key is in column 1, those that are this rank's. All ranks call it together."""
    _, world_size = _rank()
    if world_size == 1:
        return rows
    rows, counts = _by_part(rows, MOST_PARTS)
    ends = np.concatenate([[0], np.cumsum(counts)])
    owned = [_owned(MOST_PARTS, rank, world_size) for rank in range(world_size)]
    return _all_to_all(rows, [int(ends[own.stop] - ends[own.start]) for own in owned])


def sum_by_part(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] of [parts, N], where every rank has those of its own parts and zeros else: added up over ranks and parts, in one
    order whoever had which."""
    total = torch.from_numpy(sums)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.numpy().sum(0)


def _num_parts(rows: int) -> int:
    """A power of two."""
    wanted = 1 << (rows // PART_ROWS).bit_length()
    return min(max(wanted, FEWEST_PARTS), MOST_PARTS)


def _owned(parts: int, rank: int, world_size: int) -> range:
    return range(-(-rank * parts // world_size), -(-(rank + 1) * parts // world_size))


def _by_part(rows: Rows, parts: int) -> tuple[Rows, NDArray[np.int64]]:
    """The rows in order of their parts, and how many each part has."""
    part = (rows[:, 1].view(np.uint64) >> np.uint64(64 - (parts.bit_length() - 1))).astype(np.uint16)
    # NumPy sorts 16-bit integers by radix when asked for a stable order.
    return rows[np.argsort(part, kind="stable")], np.bincount(part, minlength=parts)


def _in_order(rows: Rows) -> Rows:
    """By key, then packed: NumPy sorts single 64-bit integers in SIMD, ten times as fast as it does pairs."""
    packed, keys = np.ascontiguousarray(rows[:, :2].T)
    by_packed, by_key = np.argsort(packed), np.argsort(keys)
    group = np.empty_like(keys)
    group[by_key] = np.cumsum(np.diff(keys[by_key], prepend=keys[by_key[0]]) != 0)
    order = np.sort(group[by_packed] << 32 | np.arange(len(rows)))
    return rows[by_packed[order & 0xFFFFFFFF]]


def _rank() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _over_ranks(value: int, operation: dist.ReduceOp) -> int:
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, operation)
    return int(tensor)


def _all_to_all(rows: Rows, counts: list[int]) -> Rows:
    """The first ``counts[0]`` rows go to rank 0 and so on; what comes from all ranks."""
    width = rows.shape[1]
    coming = torch.empty(len(counts), dtype=torch.int64)
    dist.all_to_all_single(coming, torch.tensor(counts))
    splits = [width * count for count in coming.tolist()]
    received = torch.empty(sum(splits), dtype=torch.int64)
    dist.all_to_all_single(received, torch.from_numpy(rows).view(-1), splits, [width * count for count in counts])
    return received.numpy().reshape(-1, width)
