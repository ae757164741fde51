"""Chunks of decoded columns to a ``Batch``: the only place that builds a KeyedJaggedTensor.

Letters: B rows of the batch, of which ``real`` are data and the rest padding; K keys, of which S have at most one id a
row and J any number; D dense features.

Ids are int32 where all tables allow, which halves what is copied to a device and exchanged between ranks; TorchRec casts
them to int64 before a lookup. Lengths are int64: FBGEMM would cast the offsets made of them before each lookup. Offsets are
not given: TorchRec's input distribution sends lengths and drops offsets, which would only be copied to the device. Stride,
``length_per_key`` and ``offset_per_key`` are given, since computing them on a GPU synchronises.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_loaders.batch import Batch, Cursor
from data_loaders.buffers import Buffers
from data_loaders.columns import NO_ID, Columns
from data_loaders.decode import Slot
from data_loaders.schema import Layout


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of some decoded columns."""

    columns: Columns
    start: int
    stop: int


class Collator:
    """``collator(chunks, …) -> Batch`` of ``batch_size`` rows, real ones first. ``slots``: where each key's ids are.

    ``may_drop``: ``Batch.normalizer`` is this rank's number of rows that are not dropped, instead of what is given.
    """

    def __init__(self, layout: Layout, slots: dict[str, Slot], batch_size: int, *, may_drop: bool = False) -> None:
        self._pooled = list(layout.plain)
        self._weighted = list(layout.weighted)
        self._unpooled = list(layout.unpooled)
        self._slots = slots
        self._batch_size = batch_size
        self._may_drop = may_drop
        self._buffers = Buffers()
        self._kept_lengths: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, chunks: list[Chunk], normalizer: float, cursor: Cursor) -> Batch:
        """``chunks`` hold ``cursor.local_rows`` rows, possibly none."""
        rows = sum(chunk.stop - chunk.start for chunk in chunks)
        assert rows == cursor.local_rows <= self._batch_size
        num_dense = chunks[0].columns.num_dense
        weights = self._column("weights", chunks, num_dense + 1, 1, rows)
        if self._may_drop:
            normalizer = rows
        if cursor.dropped is not None:
            weights[:rows][cursor.dropped] = 0
            normalizer = rows - int(cursor.dropped.sum())
        return Batch(
            dense=self._dense(chunks, num_dense, rows),
            sparse=self._jagged("sparse", self._pooled, chunks, rows),
            weighted=self._jagged("weighted", self._weighted, chunks, rows) if self._weighted else None,
            sequence=self._jagged("sequence", self._unpooled, chunks, rows) if self._unpooled else None,
            labels=torch.from_numpy(self._column("labels", chunks, num_dense, 0, rows)),
            weights=torch.from_numpy(weights),
            normalizer=torch.tensor(normalizer, dtype=torch.float32),
            cursor=cursor,
            group_ids=self._group_ids(chunks, rows),
        )

    def _dense(self, chunks: list[Chunk], num_dense: int, rows: int) -> torch.Tensor:
        dense = torch.from_numpy(self._buffers.empty("dense", (self._batch_size, num_dense), np.float32))  # [B, D]
        # PyTorch transposes in tiles, NumPy does not; from 32768 elements on it would wake other threads.
        tile = max(1, 32767 // max(num_dense, 1))
        begin = 0
        for chunk in chunks:
            numbers = torch.from_numpy(chunk.columns.numbers[:num_dense, chunk.start : chunk.stop])  # [D, rows]
            for part in numbers.split(tile, dim=1):
                dense[begin : begin + part.shape[1]] = part.t()
                begin += part.shape[1]
        dense[rows:] = 0
        return dense

    def _column(self, name: str, chunks: list[Chunk], line: int, default: float, rows: int) -> NDArray[np.float32]:
        """Line ``line`` of the numbers, or ``default`` where it is not read; 0 in the padding."""
        column = self._buffers.empty(name, (self._batch_size,), np.float32)
        column[rows:] = 0
        if line >= len(chunks[0].columns.numbers):
            column[:rows] = default
        else:
            np.concatenate([p.columns.numbers[line, p.start : p.stop] for p in chunks], out=column[:rows])
        return column

    def _group_ids(self, chunks: list[Chunk], rows: int) -> torch.Tensor | None:
        if chunks[0].columns.group_ids is None:
            return None
        ids = self._buffers.empty("groups", (self._batch_size, len(chunks[0].columns.group_ids)), np.int64)  # [B, G]
        ids[rows:] = 0
        np.concatenate([p.columns.group_ids[:, p.start : p.stop].T for p in chunks], out=ids[:rows])
        return torch.from_numpy(ids)

    def _jagged(self, name: str, keys: list[str], chunks: list[Chunk], rows: int) -> KeyedJaggedTensor:
        slots = [self._slots[key] for key in keys]
        singles = [slot.index for slot in slots if not slot.bag]
        ids = self._single_ids(name, singles, chunks, rows)  # [keys of single ids, real]
        weights = None
        if name == "weighted":
            values, lengths, length_per_key = self._mixed(name, slots, ids, chunks, rows)
            weights = self._weights(slots, chunks, length_per_key)
        elif not keys or (len(ids) == len(keys) and all(chunk.columns.complete for chunk in chunks)):
            lengths = self._ones(len(keys), rows)
            values, length_per_key = torch.from_numpy(ids.reshape(-1)), [rows] * len(keys)
        else:
            values, lengths, length_per_key = self._mixed(name, slots, ids, chunks, rows)
        return KeyedJaggedTensor(
            keys=keys,
            values=values,
            weights=weights,
            lengths=lengths,
            stride=self._batch_size,
            length_per_key=length_per_key,
            offset_per_key=[0, *itertools.accumulate(length_per_key)],
        )

    def _weights(self, slots: list[Slot], chunks: list[Chunk], length_per_key: list[int]) -> torch.Tensor:
        """Of the values of all keys; 1 of single ids."""
        weights = self._buffers.empty("weights of ids", (sum(length_per_key),), np.float32)
        begin = 0
        for slot, length in zip(slots, length_per_key):
            own = weights[begin : begin + length]
            if slot.bag:
                np.concatenate(_bag_weights(chunks, slot.index), out=own)
            else:
                own[:] = 1
            begin += length
        return torch.from_numpy(weights)

    def _single_ids(self, name: str, indices: list[int], chunks: list[Chunk], rows: int) -> NDArray[np.integer]:
        """Lines ``indices`` of ``Columns.ids`` in all chunks; the decoder numbers the keys of one tensor consecutively."""
        first, stop = (indices[0], indices[-1] + 1) if indices else (0, 0)
        assert indices == list(range(first, stop))
        ids = self._buffers.empty(f"{name} ids", (stop - first, rows), chunks[0].columns.ids.dtype.type)
        return np.concatenate([p.columns.ids[first:stop, p.start : p.stop] for p in chunks], axis=1, out=ids)

    def _ones(self, keys: int, rows: int) -> torch.Tensor:
        """Lengths [K * B] where each real row has one id of each key: the same for nearly all batches, so made once, and
        only read."""
        if (keys, rows) not in self._kept_lengths:
            lengths = torch.zeros(keys, self._batch_size, dtype=torch.int64)  # [K, B]
            lengths[:, :rows] = 1
            self._kept_lengths[keys, rows] = lengths.view(-1)
        return self._kept_lengths[keys, rows]

    def _mixed(
        self, name: str, slots: list[Slot], ids: NDArray[np.integer], chunks: list[Chunk], rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Values of all keys, lengths [K * B], and how many values each key has, where some have no id or several."""
        lengths = self._buffers.empty(f"{name} lengths", (len(slots), self._batch_size), np.int64)  # [K, B]
        lengths[:, rows:] = 0
        complete = all(chunk.columns.complete for chunk in chunks)
        singles = iter(ids)
        parts: list[list[NDArray[np.integer]]] = [
            _bag_values(chunks, slot.index, out) if slot.bag else [_present(next(singles), out, complete)]
            for slot, out in zip(slots, lengths[:, :rows])
        ]
        length_per_key = [sum(map(len, found)) for found in parts]
        values = self._buffers.empty(f"{name} values", (sum(length_per_key),), ids.dtype.type)
        np.concatenate([part for found in parts for part in found], out=values)
        return torch.from_numpy(values), torch.from_numpy(lengths.reshape(-1)), length_per_key


def _present(ids: NDArray[np.integer], lengths: NDArray[np.int64], complete: bool) -> NDArray[np.integer]:
    """The ids that are there; writes their lengths, 1 or 0."""
    if complete:
        lengths[:] = 1
        return ids
    present = ids != NO_ID
    lengths[:] = present
    return ids[present]


def _bag_weights(chunks: list[Chunk], index: int) -> list[NDArray[np.float32]]:
    """Of one key with lists, chunk by chunk."""
    bags = [(chunk.columns.bags[index], chunk) for chunk in chunks]
    return [bag.weights[bag.offsets[chunk.start] : bag.offsets[chunk.stop]] for bag, chunk in bags]


def _bag_values(chunks: list[Chunk], index: int, lengths: NDArray[np.int64]) -> list[NDArray[np.integer]]:
    """Ids of one key with lists, chunk by chunk; writes their lengths."""
    values, begin = [], 0
    for chunk in chunks:
        bags = chunk.columns.bags[index]
        offsets = bags.offsets[chunk.start : chunk.stop + 1]
        np.subtract(offsets[1:], offsets[:-1], out=lengths[begin : begin + len(offsets) - 1])
        values.append(bags.values[offsets[0] : offsets[-1]])
        begin += len(offsets) - 1
    return values
