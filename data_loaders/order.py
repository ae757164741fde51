"""The order of rows: integers only, the same whatever the number of ranks and threads.

In each epoch all row groups are permuted by (seed, epoch) and laid end to end; the N rows are cut into C *logical
shards*, contiguous and equal within one row. A shard is cut into *blocks* of a whole number of steps, and rows are
permuted inside a block by (seed, epoch, shard, block). Step k takes rows [k·G/C, (k+1)·G/C) of every shard's own order,
G being the global batch size. Rank r of W serves the shards c with c mod W = r.

So the rows of a step depend on (data, seed, epoch, C, G, shuffle_rows) alone, and the position in the data is (epoch,
step). All shards reach the ends of their blocks at the same step. With C = W and no shuffling, rank r has the r-th
contiguous part of the data, in order.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Part of every random state: raise it when the meaning of the order changes, and refuse to resume across it.
ORDER_VERSION = 1


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of row group ``row_group``, an index over all files."""

    row_group: int
    start: int
    stop: int


class Order:
    """``row_groups``: rows of each row group. ``batch_size`` is global, and a multiple of ``shards``.

    ``shuffle_rows`` is the wanted size of the shuffle buffer over all shards; it is rounded up to a whole number of
    steps. Raises ``ValueError`` where ``shards`` does not divide ``batch_size``.
    """

    def __init__(
        self, row_groups: Iterable[int], *, shards: int, batch_size: int, shuffle: bool, shuffle_rows: int, seed: int
    ) -> None:
        if batch_size < 1 or shards < 1 or batch_size % shards:
            raise ValueError(
                f"a global batch of {batch_size} rows cannot be shared by {shards} logical shards: make the batch "
                f"size a multiple of {shards} (data.stream.shards)"
            )
        if seed < 0:
            raise ValueError(f"seed is {seed}: it must not be negative")
        self.row_groups = np.fromiter(row_groups, np.int64)
        self.num_rows = int(self.row_groups.sum())
        self.shards = shards
        self.shuffle = shuffle
        self.seed = seed
        self.rows_per_step = batch_size // shards  # of one shard
        self.steps_per_epoch = -(-self.num_rows // batch_size)  # = ceil(ceil(N/C) / (G/C)), the longest shard's
        self.steps_per_block = max(1, min(-(-shuffle_rows // batch_size), self.steps_per_epoch))
        self.block_rows = self.steps_per_block * self.rows_per_step  # of one shard

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Where a shard starts and stops in the epoch's concatenation of row groups."""
        return shard * self.num_rows // self.shards, (shard + 1) * self.num_rows // self.shards

    def block_range(self, shard: int, block: int) -> tuple[int, int]:
        """Where a block starts and stops, likewise; empty behind the shard's end."""
        start, stop = self.shard_range(shard)
        first = min(start + block * self.block_rows, stop)
        return first, min(first + self.block_rows, stop)

    def step_rows(self, step: int) -> int:
        """Real rows of a step of any epoch over all shards: padding left out."""
        bounds = np.arange(self.shards + 1) * self.num_rows // self.shards
        return int(np.clip(np.diff(bounds) - step * self.rows_per_step, 0, self.rows_per_step).sum())

    def epoch(self, epoch: int) -> "EpochOrder":
        return EpochOrder(self, epoch)


class EpochOrder:
    """The order of one epoch."""

    def __init__(self, order: Order, epoch: int) -> None:
        self.order = order
        self.epoch = epoch
        count = len(order.row_groups)
        self._sequence = _permutation(count, order.seed, epoch) if order.shuffle else np.arange(count)
        self._ends = np.cumsum(order.row_groups[self._sequence])
        self._places = np.argsort(self._sequence)  # the inverse

    def segments(self, shard: int, block: int) -> list[Segment]:
        """Where a block's rows lie, in order; row groups without rows are left out."""
        position, stop = self.order.block_range(shard, block)
        # side="right" skips row groups that end where the block starts, empty ones among them.
        index = int(np.searchsorted(self._ends, position, side="right"))
        found = []
        while position < stop:
            row_group, end = int(self._sequence[index]), int(self._ends[index])
            rows, until = int(self.order.row_groups[row_group]), min(end, stop)
            if until > position:
                found.append(Segment(row_group, position - (end - rows), until - (end - rows)))
            position, index = until, index + 1
        return found

    def rows_left(self, row_group: int, shards: Iterable[int], block: int) -> int:
        """How many rows of a row group these shards take in this block and later ones."""
        end = int(self._ends[self._places[row_group]])
        start = end - int(self.order.row_groups[row_group])
        ranges = ((self.order.block_range(c, block)[0], self.order.shard_range(c)[1]) for c in shards)
        return sum(max(0, min(end, stop) - max(start, first)) for first, stop in ranges)

    def rows(self, shards: list[int], block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order in which steps take the rows of one block of several shards.

        ``rows`` index the shards' blocks laid end to end; ``ends`` [steps of the block] say how many rows are taken
        after each step. Within a step, rows come shard by shard.
        """
        order = self.order
        sizes = np.array([stop - start for start, stop in (order.block_range(c, block) for c in shards)])
        taken = np.full((len(shards), order.block_rows), -1, np.int64)
        for index, (shard, base) in enumerate(zip(shards, np.cumsum(sizes) - sizes)):
            taken[index, : sizes[index]] = base + self._block_permutation(shard, block, int(sizes[index]))
        # [shards, steps, rows] -> [steps, shards, rows]
        by_step = taken.reshape(len(shards), order.steps_per_block, order.rows_per_step).swapaxes(0, 1).ravel()
        done = np.arange(order.steps_per_block)[:, None] * order.rows_per_step  # [steps, 1]
        counts = np.clip(sizes - done, 0, order.rows_per_step)  # [steps, shards]
        return by_step[by_step >= 0], np.cumsum(counts.sum(axis=1))

    def _block_permutation(self, shard: int, block: int, rows: int) -> NDArray[np.int64]:
        return _permutation(rows, self.order.seed, self.epoch, shard, block) if self.order.shuffle else np.arange(rows)


def _permutation(size: int, *key: int) -> NDArray[np.int64]:
    """A permutation by sorting random 64-bit numbers. NumPy promises that a seeded bit generator gives the same numbers
    in every version, but not that ``Generator.permutation`` does; a resumed run may meet another version."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(size))
