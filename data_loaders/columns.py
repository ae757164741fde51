"""Decoded rows, between Arrow and batches.

Letters: R rows, D dense features, S keys with at most one id a row (columns of single ids, and crosses), J keys with
any number (lists), G columns that rows are grouped by. Arrays are feature-major: a column is decoded by one contiguous
write, shuffled inside the CPU's cache, and already has KeyedJaggedTensor's layout.
"""

from dataclasses import dataclass

import fbgemm_gpu  # noqa: F401  registers torch.ops.fbgemm
import numpy as np
import torch
from numpy.typing import NDArray

NO_ID = -1  # in ``Columns.ids``: this row has no id (its table has no row for missing ids, or the row was dropped)


@dataclass
class Bags:
    """Lists of ids of one key: row i has ``values[offsets[i] : offsets[i + 1]]``; ``offsets`` int64 [R + 1]. ``weights`` float32:
    what each id's row is multiplied by in a sum; None where ids have none."""

    offsets: NDArray[np.int64]
    values: NDArray[np.integer]
    weights: NDArray[np.float32] | None = None

    def take(self, rows: NDArray[np.int64]) -> "Bags":
        """The lists at ``rows``, in that order."""
        # Copies list by list: 8 times as fast as an index of all values.
        lengths, values, weights = torch.ops.fbgemm.permute_1D_sparse_data(
            torch.from_numpy(rows.astype(np.int32)),
            torch.from_numpy(np.diff(self.offsets)),
            torch.from_numpy(self.values),
            None if self.weights is None else torch.from_numpy(self.weights),
            None,
        )
        return Bags(offsets_of(lengths.numpy()), values.numpy(), None if self.weights is None else weights.numpy())

    def between(self, start: int, stop: int) -> "Bags":
        """Rows [start, stop), without a copy of the values."""
        offsets = self.offsets[start : stop + 1]
        return self._of(offsets - offsets[0], slice(offsets[0], offsets[-1]))

    def without(self, dropped: NDArray[np.bool_]) -> "Bags":
        """Empty lists where ``dropped`` [R]."""
        lengths = np.diff(self.offsets)
        kept = np.repeat(~dropped, lengths)
        return self._of(offsets_of(np.where(dropped, 0, lengths)), kept)

    def _of(self, offsets: NDArray[np.int64], kept: slice | NDArray[np.bool_]) -> "Bags":
        return Bags(offsets, self.values[kept], None if self.weights is None else self.weights[kept])


@dataclass
class Columns:
    """R decoded rows: ``numbers`` float32 [D + 0 … 2, R], the dense features, then label and weight where they are
    read; ``ids`` int32 or int64 [S, R], ``NO_ID`` where there is none (nowhere, if ``complete``); ``bags``: one each of J
    keys; ``dropped`` bool [R]: rows that a policy left out, which have no ids (None: none); ``group_ids`` int64 [G, R]
    (``data_loaders.group_ids``)."""

    num_dense: int
    numbers: NDArray[np.float32]
    ids: NDArray[np.integer]
    bags: list[Bags]
    dropped: NDArray[np.bool_] | None = None
    complete: bool = False
    group_ids: NDArray[np.int64] | None = None

    @property
    def num_rows(self) -> int:
        return self.numbers.shape[1]

    def between(self, start: int, stop: int) -> "Columns":
        """Rows [start, stop), in the same memory."""
        return Columns(
            self.num_dense,
            self.numbers[:, start:stop],
            self.ids[:, start:stop],
            [bag.between(start, stop) for bag in self.bags],
            None if self.dropped is None else self.dropped[start:stop],
            self.complete,
            None if self.group_ids is None else self.group_ids[:, start:stop],
        )

    def look_for_missing(self, ids: NDArray[np.integer]) -> None:
        """``ids``: some that were just written."""
        self.complete = self.complete and not (ids == NO_ID).any()

    def drop(self, rows: slice, dropped: NDArray[np.bool_]) -> None:
        """Those of ``rows`` where ``dropped``: no ids, and numbers that do no harm."""
        if self.dropped is None:
            self.dropped = np.zeros(self.num_rows, bool)
        self.dropped[rows] = dropped
        self.complete = False
        self.numbers[:, rows][:, dropped] = 0
        self.ids[:, rows][:, dropped] = NO_ID

    def fill(
        self,
        parts: list["Columns"],
        rows: NDArray[np.int64] | None,
        spare: NDArray[np.int64],
        turns: tuple[int, int, int] | None = None,
    ) -> None:
        """Writes the rows of all parts, one after the other, in the order of ``rows``, a permutation of them (None: as they
        come). ``spare`` [R or more] holds a line meanwhile: in the CPU's cache, while the parts come from far. ``turns``
        (a, b, c): the permutation is that of a · b runs of c rows to b · a, which is copied faster than gathered."""
        for name in ("numbers", "ids") if self.group_ids is None else ("numbers", "ids", "group_ids"):
            lines = getattr(self, name)
            natural = spare.view(lines.dtype)[: self.num_rows]
            for index, line in enumerate(lines):
                found = [getattr(part, name)[index] for part in parts]
                np.concatenate(found, out=line if rows is None else natural)
                if turns is not None:
                    shards, steps, count = turns
                    line.reshape(steps, shards, count)[:] = natural.reshape(turns).swapaxes(0, 1)
                elif rows is not None:
                    # mode="clip" writes straight into ``out``; the default checks all indices before it touches it.
                    np.take(natural, rows, out=line, mode="clip")
        bags = [concat_bags(list(found)) for found in zip(*(part.bags for part in parts))]
        self.bags = bags if rows is None else [bag.take(rows) for bag in bags]
        self.complete = all(part.complete for part in parts)
        dropped = dropped_of(parts)
        self.dropped = dropped if rows is None or dropped is None else dropped[rows]


def dropped_of(parts: list[Columns]) -> NDArray[np.bool_] | None:
    """``dropped`` of all parts, one after the other."""
    if all(part.dropped is None for part in parts):
        return None
    return np.concatenate([np.zeros(p.num_rows, bool) if p.dropped is None else p.dropped for p in parts])


def offsets_of(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def concat_bags(parts: list[Bags]) -> Bags:
    """All lists one after the other."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    weights = None if parts[0].weights is None else np.concatenate([part.weights for part in parts])
    return Bags(offsets_of(lengths), np.concatenate([part.values for part in parts]), weights)
