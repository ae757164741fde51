"""Keeps the training loop fed: threads read and decode ahead, one more assembles batches.

The unit of work is one block (see ``order``) of a few logical shards: read, decode, shuffle. All shards of a rank reach
the end of a block at the same step, so while the batches of one block are assembled, the next block is prepared.

Memory is bounded. A rank holds at most two blocks decoded, that is 2 · (``shuffle_rows`` rounded up to whole steps) /
world size rows; for each of its shards one open row group (the pages being read, and part of an Arrow piece of 8192
rows); for each thread 32768 decoded rows, or a block of one shard where that is more; at most 1 GiB of row groups that
its shards share (small data only); and ``prefetch_batches`` + 2 batches. The decoded blocks are kept for the next
epoch.
"""

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_loaders.batch import Batch, Cursor
from data_loaders.collate import Collator, Piece
from data_loaders.decode import Columns, Counters, Decoder, RowError, check_types
from data_loaders.manifest import Manifest
from data_loaders.order import EpochOrder, Order, Segment
from data_loaders.reader import RowGroups, ShardReader, SharedRowGroups
from data_loaders.schema import Layout, Schema

_Item = Batch | BaseException | None  # in the queue; None: the epoch is over
_UNIT_ROWS = 1 << 15  # small blocks of several shards are decoded together, up to so many rows


class Loader:
    """Batches of one rank, in the order of ``order.Order``.

    ``batch_size`` is global. Every rank has ``steps_per_epoch`` batches of ``local_batch_size`` rows an epoch, the last
    ones padded; over all ranks every row comes once. For prediction, ``shards=world_size, shuffle=False`` gives rank r
    the r-th contiguous part of the data in file order; ``labeled=False`` does without label and weight columns.

    ``counters`` count, since construction, values that were null, out of range, non-finite or truncated, by
    ``<feature>.<what>``, in rows of this rank. ``wait_seconds`` is how long the consumer has waited for batches.

    Raises ``ValueError`` for columns that are missing or of a wrong type, more ranks than shards, and a batch size that
    ``shards`` does not divide.
    """

    def __init__(
        self,
        manifest: Manifest,
        schema: Schema,
        layout: Layout,
        *,
        batch_size: int,
        shards: int,
        shuffle: bool,
        shuffle_rows: int,
        threads: int,
        prefetch_batches: int,
        rank: int,
        world_size: int,
        seed: int,
        pin_memory: bool = False,
        labeled: bool = True,
    ) -> None:
        if world_size > shards:
            raise ValueError(
                f"{world_size} ranks cannot share {shards} logical shards: set data.stream.shards to {world_size} or "
                "more"
            )
        sizes = (rows for file in manifest.files for rows in file.row_groups)
        self._order = Order(
            sizes, shards=shards, batch_size=batch_size, shuffle=shuffle, shuffle_rows=shuffle_rows, seed=seed
        )
        self._world_size = world_size
        self._shards = list(range(rank, shards, world_size))
        self._local_batch_size = -(-shards // world_size) * (batch_size // shards)
        self._threads = threads
        self._prefetch_batches = prefetch_batches
        self._pin_memory = pin_memory
        self._counters = Counters()
        self._spare: dict[tuple[int, int], Columns] = {}
        self.wait_seconds = 0.0
        columns = _columns(schema, layout, labeled)
        self._decoder = _decoder(manifest, schema, layout, columns, self._counters, labeled)
        self._collator = Collator(layout, self._decoder.slots, self._local_batch_size)
        self._row_groups = RowGroups(manifest, columns, _hashed_columns(schema, layout))

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    @property
    def local_batch_size(self) -> int:
        """Rows of every batch, padding included; the same on all ranks."""
        return self._local_batch_size

    @property
    def num_rows(self) -> int:
        """Rows of an epoch over all ranks."""
        return self._order.num_rows

    @property
    def counters(self) -> dict[str, int]:
        return self._counters.snapshot()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches from step ``start_step`` to the epoch's end: those that a run not interrupted would have seen.

        What goes wrong in a thread is raised here, with file and row group. ``close()`` of the iterator, or dropping
        it, ends its threads.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step is {start_step}: an epoch has {self.steps_per_epoch} steps")
        return self._consume(epoch, start_step)

    def _consume(self, epoch: int, start_step: int) -> Iterator[Batch]:
        ready: queue.Queue[_Item] = queue.Queue(self._prefetch_batches)
        stop = threading.Event()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="loader-decode")
        arguments = (self._batches(pool, epoch, start_step), ready, stop)
        producer = threading.Thread(target=_produce, args=arguments, name="loader-assemble", daemon=True)
        producer.start()
        try:
            while (item := self._next(ready)) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            _drain(ready, producer)
            pool.shutdown(wait=True)

    def _next(self, ready: queue.Queue[_Item]) -> _Item:
        began = time.perf_counter()
        item = ready.get()
        self.wait_seconds += time.perf_counter() - began
        return item

    def _batches(self, pool: ThreadPoolExecutor, epoch: int, start_step: int) -> Iterator[Batch]:
        order = self._order
        last = -(-self.steps_per_epoch // order.steps_per_block)
        # Memory goes from epoch to epoch; an epoch that runs beside another one finds none and takes its own.
        spare, self._spare = self._spare, {}
        blocks = _Blocks(order.epoch(epoch), self._row_groups, self._decoder, self._groups(), spare)
        prepared = blocks.submit(pool, start_step // order.steps_per_block) if start_step < self.steps_per_epoch else []
        for block in range(start_step // order.steps_per_block, last):
            units = [future.result() for future in prepared]
            prepared = blocks.submit(pool, block + 1) if block + 1 < last else []
            first = block * order.steps_per_block
            for step in range(max(first, start_step), min(first + order.steps_per_block, self.steps_per_epoch)):
                yield self._batch(epoch, step, [unit.piece(step - first) for unit in units])
        self._spare = spare

    def _batch(self, epoch: int, step: int, pieces: list[Piece]) -> Batch:
        rows = self._order.step_rows(step)
        cursor = Cursor(epoch, step + 1, rows, sum(piece.stop - piece.start for piece in pieces))
        batch = self._collator(pieces, rows / self._world_size, cursor)
        return batch.pin_memory() if self._pin_memory else batch

    def _groups(self) -> list[list[int]]:
        """This rank's shards, in groups whose blocks are decoded together: enough rows to be worth it, work for each
        thread."""
        rows = min(self._order.block_rows, -(-self.num_rows // self._order.shards))
        size = max(1, min(_UNIT_ROWS // max(rows, 1), -(-len(self._shards) // self._threads)))
        return [self._shards[i : i + size] for i in range(0, len(self._shards), size)]


@dataclass
class _Unit:
    """A decoded block of some shards, its rows in the order in which steps take them."""

    columns: Columns
    ends: NDArray[np.int64]

    def piece(self, step: int) -> Piece:
        return Piece(self.columns, int(self.ends[step - 1]) if step else 0, int(self.ends[step]))


class _Blocks:
    """Reads and decodes the blocks of one epoch, one after the other."""

    def __init__(
        self,
        order: EpochOrder,
        row_groups: RowGroups,
        decoder: Decoder,
        groups: list[list[int]],
        spare: dict[tuple[int, int], Columns],
    ) -> None:
        self._order = order
        self._row_groups = row_groups
        self._decoder = decoder
        self._groups = groups
        self._shards = [shard for group in groups for shard in group]
        self._shared = SharedRowGroups(row_groups)
        # By group and parity of the block: its memory serves the next block but one, when its batches are made.
        self._spare = spare
        self._readers = {shard: ShardReader(row_groups, self._shared) for shard in self._shards}

    def submit(self, pool: ThreadPoolExecutor, block: int) -> list[Future[_Unit]]:
        segments = {shard: self._order.segments(shard, block) for shard in self._shards}
        uses = Counter(segment.row_group for found in segments.values() for segment in found)
        for row_group in (row_group for row_group, count in uses.items() if count > 1):
            self._shared.expect(row_group, self._order.rows_left(row_group, self._shards, block))
        return [pool.submit(self._prepare, group, block, segments) for group in self._groups]

    def _prepare(self, group: list[int], block: int, segments: dict[int, list[Segment]]) -> _Unit:
        rows, ends = self._order.rows(group, block)
        in_order = not self._order.order.shuffle and len(group) == 1
        place = (group[0], block % 2)
        try:
            tables = self._tables(group, segments)
            columns = self._decoder(tables, len(rows), None if in_order else rows, self._spare.get(place))
        except RowError as error:
            located = self._locate([segment for shard in group for segment in segments[shard]], error.row)
            raise ValueError(f"{located}: {error}") from error
        spare = self._spare.get(place)
        if spare is None or spare.num_rows < columns.num_rows:  # a short block leaves the memory of a long one be
            self._spare[place] = replace(columns, bags=[])
        return _Unit(columns, ends)

    def _tables(self, group: list[int], segments: dict[int, list[Segment]]) -> Iterator[pa.Table]:
        for shard in group:
            for segment in segments[shard]:
                yield from self._readers[shard].read(segment)

    def _locate(self, segments: list[Segment], row: int) -> str:
        for segment in segments:
            if row < segment.stop - segment.start:
                path, index = self._row_groups.place(segment.row_group)
                return f"'{path}', row group {index}, row {segment.start + row}"
            row -= segment.stop - segment.start
        raise AssertionError("a row outside the block")


def _produce(batches: Iterator[Batch], ready: queue.Queue[_Item], stop: threading.Event) -> None:
    try:
        for batch in batches:
            ready.put(batch)
            if stop.is_set():
                return
        ready.put(None)
    except BaseException as error:  # noqa: BLE001  whatever it is, the consumer raises it instead of waiting for ever
        ready.put(error)


def _drain(ready: queue.Queue[_Item], producer: threading.Thread) -> None:
    """Makes room until the producer, which may be waiting for it, has ended."""
    while producer.is_alive():
        with contextlib.suppress(queue.Empty):
            ready.get(timeout=0.02)


def _columns(schema: Schema, layout: Layout, labeled: bool) -> list[str]:
    extra = [schema.label, *([schema.weight] if schema.weight else [])] if labeled else []
    return list(dict.fromkeys((*extra, *schema.columns(layout))))


def _decoder(
    manifest: Manifest, schema: Schema, layout: Layout, columns: list[str], counters: Counters, labeled: bool
) -> Decoder:
    manifest.check_columns(columns)
    types: dict[str, pa.DataType] = {}
    for path, found in manifest.types(columns):
        try:
            check_types(schema, layout, found, labeled=labeled)
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from error
        # A column of nulls only says nothing about whether it holds lists; another file may.
        types.update({name: kind for name, kind in found.items() if name not in types or pa.types.is_null(types[name])})
    return Decoder(schema, layout, types, counters, labeled=labeled)


def _hashed_columns(schema: Schema, layout: Layout) -> set[str]:
    keys = (*layout.pooled, *layout.unpooled)
    features = {name for key in keys if key in schema.crosses for name in schema.crosses[key].columns}
    features |= {key for key in keys if key in schema.features and schema.features[key].ids == "hash"}
    return {schema.column(name) for name in features}
