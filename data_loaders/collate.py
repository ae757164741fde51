"""Pieces of decoded columns to a ``Batch``: the only place that builds a KeyedJaggedTensor.

Letters: B rows of the batch, of which ``real`` are data and the rest padding; K keys, of which S have at most one id a
row and J any number; D dense features.

Lengths are int64, like ids: FBGEMM casts offsets to int64 before each lookup, so int32 lengths would cost a kernel
each. Offsets are not given: TorchRec's input distribution sends lengths and drops offsets, which would only be copied
to the device. Stride, ``length_per_key`` and ``offset_per_key`` are given, since computing them on a GPU synchronises.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_loaders.batch import Batch, Cursor
from data_loaders.decode import NO_ID, Columns, Slot
from data_loaders.schema import Layout


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of some decoded columns."""

    columns: Columns
    start: int
    stop: int


class Collator:
    """``collator(pieces, …) -> Batch`` of ``batch_size`` rows, real ones first. ``slots``: where each key's ids lie."""

    def __init__(self, layout: Layout, slots: dict[str, Slot], batch_size: int) -> None:
        self._pooled = list(layout.pooled)
        self._unpooled = list(layout.unpooled)
        self._slots = slots
        self._batch_size = batch_size

    def __call__(self, pieces: list[Piece], normalizer: float, cursor: Cursor) -> Batch:
        """``pieces`` hold ``cursor.local_rows`` rows, possibly none."""
        rows = sum(piece.stop - piece.start for piece in pieces)
        assert rows == cursor.local_rows <= self._batch_size
        numbers = np.concatenate([p.columns.numbers[:, p.start : p.stop] for p in pieces], axis=1)  # [D + 0 … 2, real]
        num_dense = pieces[0].columns.num_dense
        labels, weights = [*numbers[num_dense:], None, None][:2]
        return Batch(
            dense=self._dense(torch.from_numpy(numbers[:num_dense]), rows),
            sparse=self._jagged(self._pooled, pieces, rows),
            sequence=self._jagged(self._unpooled, pieces, rows) if self._unpooled else None,
            labels=self._column(0 if labels is None else labels, rows),
            weights=self._column(1 if weights is None else weights, rows),
            normalizer=torch.tensor(normalizer, dtype=torch.float32),
            cursor=cursor,
        )

    def _dense(self, numbers: torch.Tensor, rows: int) -> torch.Tensor:
        dense = torch.empty(self._batch_size, len(numbers))  # [B, D]
        dense[:rows] = numbers.t()  # PyTorch transposes in tiles, NumPy does not
        dense[rows:] = 0
        return dense

    def _column(self, values: NDArray[np.float32] | int, rows: int) -> torch.Tensor:
        column = np.zeros(self._batch_size, np.float32)
        column[:rows] = values
        return torch.from_numpy(column)

    def _jagged(self, keys: list[str], pieces: list[Piece], rows: int) -> KeyedJaggedTensor:
        slots = [self._slots[key] for key in keys]
        lengths = np.zeros((len(keys), self._batch_size), np.int64)  # [K, B]; padding rows stay 0
        ids = _join_ids([slot.index for slot in slots if not slot.bag], pieces)  # [keys of single ids, real]
        if len(ids) == len(keys) and not (any(slot.optional for slot in slots) and (ids == NO_ID).any()):
            lengths[:, :rows] = 1
            values, length_per_key = ids.reshape(-1), [rows] * len(keys)
        else:
            singles = iter(ids)
            parts = [
                _bag_values(pieces, slot.index, out) if slot.bag else _present(next(singles), out)
                for slot, out in zip(slots, lengths[:, :rows])
            ]
            values, length_per_key = np.concatenate(parts, dtype=np.int64), [len(part) for part in parts]
        return KeyedJaggedTensor(
            keys=keys,
            values=torch.from_numpy(values),
            lengths=torch.from_numpy(lengths.reshape(-1)),
            stride=self._batch_size,
            length_per_key=length_per_key,
            offset_per_key=[0, *itertools.accumulate(length_per_key)],
        )


def _join_ids(indices: list[int], pieces: list[Piece]) -> NDArray[np.int64]:
    """Lines ``indices`` of ``Columns.ids`` in all pieces; the decoder numbers the keys of one tensor consecutively."""
    first, stop = (indices[0], indices[-1] + 1) if indices else (0, 0)
    assert indices == list(range(first, stop))
    return np.concatenate([p.columns.ids[first:stop, p.start : p.stop] for p in pieces], axis=1, dtype=np.int64)


def _present(ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids that are there; writes their lengths, 1 or 0."""
    present = ids != NO_ID
    lengths[:] = present
    return ids if present.all() else ids[present]


def _bag_values(pieces: list[Piece], index: int, lengths: NDArray[np.int64]) -> NDArray[np.integer]:
    """Ids of one key with lists in all pieces; writes their lengths."""
    values, begin = [], 0
    for piece in pieces:
        bags = piece.columns.bags[index]
        offsets = bags.offsets[piece.start : piece.stop + 1]
        np.subtract(offsets[1:], offsets[:-1], out=lengths[begin : begin + len(offsets) - 1])
        values.append(bags.values[offsets[0] : offsets[-1]])
        begin += len(offsets) - 1
    return np.concatenate(values)
