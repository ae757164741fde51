"""The order of rows: integers only, the same whatever the number of ranks and threads.

N rows, a global batch of G, C *logical shards*; a rank serves whole shards, neighbours of each other, and a step takes
G/C rows of every shard. There are four orders:

``shuffled``: in each epoch all row groups are permuted by (seed, epoch) and laid end to end, over all files; shard c is
rows [c·N/C, (c+1)·N/C) of them. A shard is cut into *blocks* of a whole number of steps, and rows are permuted inside a
block by (seed, epoch, shard, block). Step k takes rows [k·G/C, (k+1)·G/C) of every shard's own order. So a batch draws
from C places of the data at once. All shards reach the ends of their blocks at the same step.

``preshuffled``: of data that ``prepare`` has shuffled. As above, but rows keep their places within a shard: chance is in the
files and in the row groups' permutation, and a block is only what is read at a time.

``time``: step k is rows [k·G, (k+1)·G) of the data as it lies, shard c the c-th part of each step.

``contiguous``: C is the number of ranks, and shard c is rows [c·N/C, (c+1)·N/C) of the data as it lies: no row group is
read by two ranks, but for the edges. For evaluation and prediction.

The rows of a step depend on (data, seed, epoch, C, G) and, where ``shuffled``, on shuffle_rows alone; the position in the
data is (epoch, step), which is k·G/C rows into each shard.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_loaders.errors import UserError

# Part of every random state: raise it when the meaning of the order changes, and refuse to resume across it.
ORDER_VERSION = 2

ORDERS = ("shuffled", "preshuffled", "time", "contiguous")
_MIXED = ("shuffled", "preshuffled")  # row groups come in a random order


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of row group ``row_group``, an index over all files. ``limit``: how far its rows are the same
    stream's, and no other's of any rank: the row group's end, or else ``stop``."""

    row_group: int
    start: int
    stop: int
    limit: int


@dataclass(frozen=True)
class Unit:
    """What one thread prepares: some shards' rows of steps [first, stop), which lie in one block."""

    shards: range
    first: int
    stop: int


class Order:
    """``row_groups``: rows of each row group. ``batch_size`` is global, and a multiple of ``shards``.

    ``shuffle_rows`` is the wanted size of a block over all shards (the shuffle buffer); it is rounded up to a whole
    number of steps. Raises ``UserError`` where ``shards`` does not divide ``batch_size``.
    """

    def __init__(
        self, row_groups: Iterable[int], *, kind: str, shards: int, batch_size: int, shuffle_rows: int, seed: int
    ) -> None:
        if batch_size < 1 or shards < 1 or batch_size % shards:
            raise UserError(
                f"a global batch of {batch_size} rows cannot be shared by {shards} logical shards: make the batch "
                f"size a multiple of {shards} (data.stream.shards)"
            )
        if seed < 0:
            raise UserError(f"seed is {seed}: it must not be negative")
        assert kind in ORDERS, kind
        self.kind = kind
        self.row_groups = np.fromiter(row_groups, np.int64)
        self.num_rows = int(self.row_groups.sum())
        self.shards = shards
        self.batch_size = batch_size
        self.seed = seed
        self.rows_per_step = batch_size // shards  # of one shard
        self.steps_per_epoch = -(-self.num_rows // batch_size)  # = ceil(ceil(N/C) / (G/C)), the longest shard's
        self.steps_per_block = max(1, min(-(-shuffle_rows // batch_size), self.steps_per_epoch))

    @property
    def num_blocks(self) -> int:
        return -(-self.steps_per_epoch // self.steps_per_block)

    def block_steps(self, block: int) -> range:
        first = block * self.steps_per_block
        return range(first, min(first + self.steps_per_block, self.steps_per_epoch))

    def step_rows(self, step: int) -> int:
        """Real rows of a step of any epoch over all shards: padding left out."""
        return int(self.shard_rows(range(self.shards), step, step + 1).sum())

    def shard_rows(self, shards: range, first: int, stop: int) -> NDArray[np.int64]:
        """int64 [shards, stop - first]: how many rows each of these shards has in each of these steps."""
        steps = np.arange(first, stop)
        number = np.arange(shards.start, shards.stop)[:, None]
        if self.kind == "time":
            left = self.num_rows - steps * self.batch_size - number * self.rows_per_step
        else:
            size = (number + 1) * self.num_rows // self.shards - number * self.num_rows // self.shards
            left = size - steps * self.rows_per_step
        return np.clip(left, 0, self.rows_per_step)

    def shard_range(self, shard: int, first: int, stop: int) -> tuple[int, int]:
        """Where a shard's rows of steps [first, stop) lie in the epoch's concatenation of row groups; not for the order
        ``time``, whose shards are not contiguous."""
        start, end = shard * self.num_rows // self.shards, (shard + 1) * self.num_rows // self.shards
        return min(start + first * self.rows_per_step, end), min(start + stop * self.rows_per_step, end)

    def epoch(self, epoch: int) -> "EpochOrder":
        return EpochOrder(self, epoch)


class EpochOrder:
    """The order of one epoch."""

    def __init__(self, order: Order, epoch: int) -> None:
        self.order = order
        self.epoch = epoch
        count = len(order.row_groups)
        self._sequence = _permutation(count, order.seed, epoch) if order.kind in _MIXED else np.arange(count)
        self._ends = np.cumsum(order.row_groups[self._sequence])
        self._places = np.argsort(self._sequence)  # the inverse

    def units(self, shards: range, block: int, threads: int, min_rows: int) -> list[Unit]:
        """A rank's part of a block in units that threads can prepare side by side, each of ``min_rows`` rows where there
        are so many. The same number in every block but the last, where it may be smaller."""
        steps = self.order.block_steps(block)
        if self.order.kind in _MIXED:
            rows = min(
                self.order.steps_per_block * self.order.rows_per_step, -(-self.order.num_rows // self.order.shards)
            )
            size = max(1, min(min_rows // max(rows, 1), -(-len(shards) // threads)))
            return [Unit(shards[i : i + size], steps.start, steps.stop) for i in range(0, len(shards), size)]
        if self.order.kind == "time":  # one reader, or each would read nearly all
            threads = 1
        rows = len(shards) * self.order.rows_per_step
        size = max(-(-min_rows // rows), -(-self.order.steps_per_block // threads))
        return [Unit(shards, first, min(first + size, steps.stop)) for first in steps[::size]]

    def segments(self, unit: Unit) -> list[list[Segment]]:
        """Where a unit's rows lie, by stream: what one reader goes through in order, block after block. Row groups
        without rows are left out."""
        order = self.order
        if order.kind != "time":
            assert order.kind in _MIXED or len(unit.shards) == 1
            whole = (order.shard_range(shard, 0, order.steps_per_epoch) for shard in unit.shards)
            ranges = (order.shard_range(shard, unit.first, unit.stop) for shard in unit.shards)
            return [self._between(*found, of_shard) for found, of_shard in zip(ranges, whole)]
        ranges = (self._step_range(unit.shards, step) for step in range(unit.first, unit.stop))
        return [[segment for found in ranges for segment in self._between(*found, (0, 0))]]

    def rest(self, row_group: int, shards: range, block: int) -> list[Segment]:
        """What these shards take of a row group in this block and later ones, in order; not for the order ``time``, where
        that is many small segments."""
        order = self.order
        assert order.kind != "time"
        end = int(self._ends[self._places[row_group]])
        start = end - int(order.row_groups[row_group])
        ranges = (order.shard_range(shard, order.block_steps(block).start, order.steps_per_epoch) for shard in shards)
        inside = ((max(since, start) - start, min(to, end) - start) for since, to in ranges)
        return [Segment(row_group, since, to, to) for since, to in inside if since < to]

    def ends(self, unit: Unit) -> NDArray[np.int64]:
        """int64 [steps]: how many of a unit's rows are taken after each of its steps."""
        return np.cumsum(self.order.shard_rows(unit.shards, unit.first, unit.stop).sum(axis=0))

    def rows(self, unit: Unit) -> NDArray[np.int64] | None:
        """The order in which steps take a unit's rows, as indices of the streams of ``segments`` laid end to end; None: as
        they lie. Within a step, rows come shard by shard."""
        order = self.order
        if order.kind not in _MIXED:
            return None
        sizes = order.shard_rows(unit.shards, unit.first, unit.stop).sum(axis=1)
        steps = unit.stop - unit.first
        taken = np.empty((len(unit.shards), steps * order.rows_per_step), np.int64)
        block = unit.first // order.steps_per_block
        for index, (shard, base) in enumerate(zip(unit.shards, np.cumsum(sizes) - sizes)):
            size = int(sizes[index])
            shuffled = order.kind == "shuffled"
            place = _permutation(size, order.seed, self.epoch, shard, block) if shuffled else np.arange(size)
            taken[index, :size] = base + place
            taken[index, size:] = -1
        # [shards, steps, rows] -> [steps, shards, rows]
        by_step = taken.reshape(len(unit.shards), steps, order.rows_per_step).swapaxes(0, 1).ravel()
        return by_step if sizes.sum() == taken.size else by_step[by_step >= 0]

    def turns(self, unit: Unit) -> tuple[int, int, int] | None:
        """(shards, steps, rows), where ``rows`` is no more than each of the unit's shards giving so many rows to each of its
        steps in turn, all of them; else None."""
        order = self.order
        sizes = order.shard_rows(unit.shards, unit.first, unit.stop)
        whole = order.kind == "preshuffled" and bool((sizes == order.rows_per_step).all())
        return (*sizes.shape, order.rows_per_step) if whole else None

    def _between(self, position: int, stop: int, stream: tuple[int, int]) -> list[Segment]:
        """Rows [position, stop) of the concatenation, part of a stream that has all rows between two places of it."""
        # side="right" skips row groups that end where the range starts, empty ones among them.
        index = int(np.searchsorted(self._ends, position, side="right"))
        found = []
        while position < stop:
            row_group, end = int(self._sequence[index]), int(self._ends[index])
            start, until = end - int(self.order.row_groups[row_group]), min(end, stop)
            limit = end if stream[0] <= start and end <= stream[1] else until
            if until > position:
                found.append(Segment(row_group, position - start, until - start, limit - start))
            position, index = until, index + 1
        return found

    def _step_range(self, shards: range, step: int) -> tuple[int, int]:
        """In the order ``time``: where these shards' rows of a step lie."""
        order = self.order
        first = step * order.batch_size + shards.start * order.rows_per_step
        stop = step * order.batch_size + shards.stop * order.rows_per_step
        return min(first, order.num_rows), min(stop, order.num_rows)


def _permutation(size: int, *key: int) -> NDArray[np.int64]:
    """A permutation by sorting random numbers that carry their place in their low bits. NumPy promises that a seeded bit
    generator gives the same numbers in every version, but not that ``Generator.permutation`` does; a resumed run may
    meet another version. (Sorting is 6 times as fast as ``argsort``.)"""
    bits = np.uint64(max(size - 1, 0).bit_length())
    numbers = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    numbers = numbers >> bits << bits | np.arange(size, dtype=np.uint64)
    numbers.sort()
    return (numbers & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
