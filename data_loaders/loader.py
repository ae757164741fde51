"""Keeps the training loop fed: threads read, decode and shuffle ahead, one more copies rows into batches.

The unit of work is one block (see ``order``) of a few logical shards, made whole by one thread: so rows per second grow
with threads. All shards of a rank reach the end of a block at the same step, so while the batches of one block are
assembled, the next block is made.

Memory is bounded. A rank holds at most two blocks decoded, that is 2 · (``shuffle_rows`` rounded up to whole steps) /
world size rows; for each of its shards one open row group (the pages being read; of a remote file at most 32 MiB as it
lies in the file, or 64 KiB a column where that is more) and the rest of a run of 16384 rows; at most 1 GiB of row groups
that its shards share (small data only; twice that for a moment where two epochs meet); and the batches that wait or are
in use. The memory of all this is used again and again.
"""

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_loaders.batch import Batch, Cursor
from data_loaders.buffers import Buffers
from data_loaders.collate import Chunk, Collator
from data_loaders.column_decoders import Counters, RowError
from data_loaders.column_types import check_types
from data_loaders.columns import Columns
from data_loaders.decode import Decoder
from data_loaders.errors import UserError
from data_loaders.group_ids import check_group_types, texts_of_group_ids
from data_loaders.manifest import Manifest
from data_loaders.order import EpochOrder, Order, Segment, Unit
from data_loaders.reader import RowGroups, TableStream
from data_loaders.schema import Layout, Schema
from data_loaders.streams import ColumnStream, SharedRowGroups, located

_Item = Batch | BaseException | None  # in the queue; None: the epoch is over
_UNIT_ROWS = 1 << 16  # small blocks of several shards are prepared together, up to so many rows


class Loader:
    """Batches of one rank, in the order of ``order.Order``.

    ``batch_size`` is global. Every rank has ``steps_per_epoch`` batches of ``local_batch_size`` rows an epoch, the last
    ones padded; over all ranks every row comes once. Where all files are marked as shuffled (``prepare``), rows are taken as
    they lie in row groups that come in a random order; ``shuffle_rows`` then bounds memory alone. ``shuffle=False`` gives
    time order: step k is rows [k · batch_size, (k + 1) · batch_size) of the files as they lie. ``contiguous=True``, with a
    shard a rank, gives rank r the r-th part of the files instead, which saves reading them on every rank (evaluation,
    prediction). ``labeled=False`` does without label and weight columns; ``record_origin`` says in each cursor which rows
    came; ``group_by`` names columns, features or not, whose raw values come hashed with each batch as ``Batch.group_ids``.

    ``counters`` count, since construction, values that were null, out of range, non-finite or truncated, by
    ``<feature>.<what>``, in rows of this rank, and ``rows.dropped``. ``wait_seconds`` is how long the consumer has
    waited for batches.

    Raises ``UserError`` for columns that are missing or of a wrong type, more ranks than shards, and a batch size that
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
        contiguous: bool = False,
        record_origin: bool = False,
        group_by: Sequence[str] = (),
    ) -> None:
        if world_size > shards:
            enough = next((n for n in range(world_size, batch_size + 1) if batch_size % n == 0), None)
            remedy = f"set data.stream.shards to {enough}, which divides batch_size={batch_size}"
            if enough is None:
                remedy = f"raise batch_size, now {batch_size}, to {world_size} or more, and data.stream.shards with it"
            raise UserError(f"{world_size} ranks cannot share {shards} logical shards: {remedy}")
        sizes = [rows for file in manifest.files for rows in file.row_groups]
        shuffled = "preshuffled" if manifest.is_shuffled else "shuffled"
        kind = shuffled if shuffle else "contiguous" if contiguous else "time"
        if not shuffle:  # nothing depends on blocks but memory and the work of each thread
            shuffle_rows = min(shuffle_rows, _UNIT_ROWS // 2 * threads * world_size)
        self._order = Order(
            sizes, kind=kind, shards=shards, batch_size=batch_size, shuffle_rows=shuffle_rows, seed=seed
        )
        self._world_size = world_size
        self._shards = range(rank * shards // world_size, (rank + 1) * shards // world_size)
        self._local_batch_size = -(-shards // world_size) * (batch_size // shards)
        self._threads = threads
        self._prefetch_batches = prefetch_batches
        self._pin_memory = pin_memory
        self._record_origin = record_origin
        self._counters = Counters()
        self.wait_seconds = 0.0
        self._manifest = manifest
        self._group_texts: dict[tuple[str, int], str | None] = {}
        columns = list(dict.fromkeys((*_columns(schema, layout, labeled), *group_by)))
        self._decoder = _decoder(manifest, schema, layout, columns, self._counters, labeled, group_by)
        self._collator = Collator(layout, self._decoder.slots, self._local_batch_size, may_drop=schema.may_drop)
        self._row_groups = RowGroups(manifest, columns, _hashed_columns(schema, layout) | set(group_by))

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

    @property
    def magnitudes(self) -> NDArray[np.float64]:
        """How large the numbers of this rank's rows are (``data_loaders.magnitudes``)."""
        return self._decoder.magnitudes.snapshot()

    def group_texts(self, column: str, ids: Iterable[int]) -> dict[int, str | None]:
        """The values of ``column`` that have these group ids, as text (None for null)."""
        ids = list(ids)
        unknown = [each for each in ids if (column, each) not in self._group_texts]
        if unknown:
            found = texts_of_group_ids(self._manifest, column, unknown)
            self._group_texts.update({(column, each): text for each, text in found.items()})
        return {each: self._group_texts[column, each] for each in ids}

    def epoch(self, epoch: int, start_step: int = 0) -> "BatchIterator":
        """Batches from step ``start_step`` to the epoch's end: those that a run not interrupted would have seen."""
        return self.batches(epoch, start_step, self.steps_per_epoch - start_step)

    def batches(self, epoch: int, start_step: int, steps: int) -> "BatchIterator":
        """``steps`` batches from that place on, over as many epochs as it takes; each epoch is prepared while the one
        before ends. Reading begins with this call, so that what is built meanwhile need not be waited for twice."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise UserError(f"start_step is {start_step}: an epoch has {self.steps_per_epoch} steps")
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="loader-decode")
        batches = self._batches(pool, epoch, start_step, steps)
        return BatchIterator(batches, pool, self._prefetch_batches, self._waited)

    def _waited(self, seconds: float) -> None:
        self.wait_seconds += seconds

    def _batches(self, pool: ThreadPoolExecutor, epoch: int, start_step: int, steps: int) -> Iterator[Batch]:
        tasks = self._tasks(epoch, start_step, steps)
        task = next(tasks, None)
        prepared = task.submit(pool) if task else []
        while task:
            parts = [future.result() for future in prepared]
            following = next(tasks, None)
            # Not before: what a block shares with the next one is decided when all of it has been read.
            prepared = following.submit(pool) if following else []
            for step in task.steps:
                yield self._batch(task.epoch, step, [p for p in parts if p.unit.first <= step < p.unit.stop])
            task = following

    def _tasks(self, epoch: int, start_step: int, steps: int) -> "Iterator[_Task]":
        """The blocks that hold the next ``steps`` steps."""
        while steps > 0:
            blocks = _Blocks(
                self._order.epoch(epoch),
                self._row_groups,
                self._decoder,
                self._shards,
                self._threads,
                self._record_origin,
            )
            for block in range(start_step // self._order.steps_per_block, self._order.num_blocks):
                wanted = self._order.block_steps(block)
                wanted = range(max(wanted.start, start_step), wanted.stop)[:steps]
                steps -= len(wanted)
                if wanted:
                    yield _Task(blocks, block, epoch, wanted)
            epoch, start_step = epoch + 1, 0

    def _batch(self, epoch: int, step: int, parts: "list[_Part]") -> Batch:
        rows = self._order.step_rows(step)
        chunks = [part.chunk(step) for part in parts]
        cursor = Cursor(epoch, step + 1, rows, sum(chunk.stop - chunk.start for chunk in chunks), _dropped(chunks))
        if self._record_origin:
            found = [part.origin[chunk.start : chunk.stop] for part, chunk in zip(parts, chunks)]
            cursor = replace(cursor, origin=np.concatenate(found))
        batch = self._collator(chunks, rows / self._world_size, cursor)
        return batch.pin_memory() if self._pin_memory else batch


class BatchIterator(Iterator[Batch]):
    """Batches that a thread assembles ahead. What goes wrong in a thread is raised by ``next``, with file and row group.
    ``close()``, or dropping it, ends its threads."""

    def __init__(
        self, batches: Iterator[Batch], pool: ThreadPoolExecutor, prefetch: int, waited: Callable[[float], None]
    ) -> None:
        self._ready: queue.Queue[_Item] = queue.Queue(prefetch)
        self._pool = pool
        self._waited = waited
        self._stop = threading.Event()
        arguments = (batches, self._ready, self._stop)
        self._producer = threading.Thread(target=_produce, args=arguments, name="loader-assemble", daemon=True)
        self._producer.start()

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        began = time.perf_counter()
        item = self._ready.get()
        self._waited(time.perf_counter() - began)
        if isinstance(item, Batch):
            return item
        self.close()
        raise StopIteration if item is None else item

    def close(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            self._pool.shutdown(wait=False, cancel_futures=True)
            _drain(self._ready, self._producer)
            self._pool.shutdown(wait=True)

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class _Task:
    """The steps to make of one block."""

    blocks: "_Blocks"
    block: int
    epoch: int
    steps: range

    def submit(self, pool: ThreadPoolExecutor) -> "list[Future[_Part]]":
        return self.blocks.submit(pool, self.block)


@dataclass(frozen=True)
class _Part:
    """A unit's rows in the order in which steps take them; ``ends``: how many are taken after each step; ``origin``: which
    rows of the manifest they are, where that is recorded."""

    unit: Unit
    ends: NDArray[np.int64]
    columns: Columns
    origin: NDArray[np.int64] | None

    def chunk(self, step: int) -> Chunk:
        index = step - self.unit.first
        return Chunk(self.columns, int(self.ends[index - 1]) if index else 0, int(self.ends[index]))


class _Blocks:
    """Reads and decodes one rank's blocks of one epoch, one after the other."""

    def __init__(
        self,
        order: EpochOrder,
        row_groups: RowGroups,
        decoder: Decoder,
        shards: range,
        threads: int,
        record_origin: bool,
    ) -> None:
        self._order = order
        self._row_groups = row_groups
        self._decoder = decoder
        self._shards = shards
        self._threads = threads
        self._record_origin = record_origin
        self._shared = SharedRowGroups(row_groups, decoder)
        self._table_streams: dict[tuple[int, int], TableStream] = {}  # by unit and stream
        self._column_streams: dict[tuple[int, int], ColumnStream] = {}
        self._line = Buffers()
        self._first_rows = np.cumsum(order.order.row_groups) - order.order.row_groups

    def submit(self, pool: ThreadPoolExecutor, block: int) -> list[Future[_Part]]:
        units = self._order.units(self._shards, block, self._threads, _UNIT_ROWS)
        streams = [self._order.segments(unit) for unit in units]
        in_streams = ({segment.row_group for segment in stream} for of_unit in streams for stream in of_unit)
        uses = Counter(row_group for found in in_streams for row_group in found)
        for row_group in (row_group for row_group, count in uses.items() if count > 1):
            self._shared.expect(self._order.rest(row_group, self._shards, block))
        return [
            pool.submit(self._prepare, index, unit, of_unit)
            for index, (unit, of_unit) in enumerate(zip(units, streams))
        ]

    def _prepare(self, index: int, unit: Unit, streams: list[list[Segment]]) -> _Part:
        ends, segments = self._order.ends(unit), [segment for stream in streams for segment in stream]
        rows = self._order.rows(unit)
        if rows is None and self._decoder.is_light:  # to decode is to copy then, and to copy once is enough
            columns = self._decoded(index, int(ends[-1]), streams)
        else:
            columns = self._filled(index, unit, int(ends[-1]), streams, rows)
        origin = self._origin(segments) if self._record_origin else None
        return _Part(unit, ends, columns, origin if origin is None or rows is None else origin[rows])

    def _decoded(self, index: int, count: int, streams: list[list[Segment]]) -> Columns:
        try:
            return self._decoder(self._tables(index, streams), count, "unit")
        except RowError as error:
            raise located(error, self._row_groups, [segment for stream in streams for segment in stream]) from error

    def _tables(self, index: int, streams: list[list[Segment]]) -> Iterator[pa.Table]:
        for number, segments in enumerate(streams):
            stream = self._table_streams.setdefault((index, number), TableStream(self._row_groups))
            for segment in segments:
                yield from stream.tables(segment.row_group, segment.start, segment.stop)

    def _filled(
        self, index: int, unit: Unit, count: int, streams: list[list[Segment]], rows: NDArray[np.int64] | None
    ) -> Columns:
        parts = [part for number, segments in enumerate(streams) for part in self._columns(index, number, segments)]
        columns = self._decoder.empty(count, "unit")
        if parts:
            columns.fill(parts, rows, self._line.empty("line", (count,), np.int64), self._order.turns(unit))
        return columns

    def _columns(self, index: int, number: int, segments: list[Segment]) -> Iterator[Columns]:
        if (index, number) not in self._column_streams:
            stream = ColumnStream(self._row_groups, self._decoder, self._shared, index + number)
            self._column_streams[index, number] = stream
        for segment in segments:
            yield from self._column_streams[index, number].read(segment)

    def _origin(self, segments: list[Segment]) -> NDArray[np.int64]:
        firsts = (self._first_rows[segment.row_group] for segment in segments)
        parts = [first + np.arange(segment.start, segment.stop) for first, segment in zip(firsts, segments)]
        return np.concatenate([np.zeros(0, np.int64), *parts])


def _dropped(chunks: list[Chunk]) -> NDArray[np.bool_] | None:
    if all(chunk.columns.dropped is None for chunk in chunks):
        return None
    parts = [
        np.zeros(p.stop - p.start, bool) if p.columns.dropped is None else p.columns.dropped[p.start : p.stop]
        for p in chunks
    ]
    return np.concatenate(parts)


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
    manifest: Manifest,
    schema: Schema,
    layout: Layout,
    columns: list[str],
    counters: Counters,
    labeled: bool,
    group_by: Sequence[str],
) -> Decoder:
    try:
        manifest.check_columns(group_by)
    except ValueError as error:
        raise UserError(f"a column of evaluation.group_by, request, slices or qualities: {error}") from error
    manifest.check_columns(columns)
    types: dict[str, pa.DataType] = {}
    for path, found in manifest.types(columns):
        try:
            check_types(schema, layout, found, labeled=labeled)
            check_group_types(group_by, found)
        except ValueError as error:
            raise UserError(f"'{path}': {error}") from error
        # A column of nulls only says nothing about whether it holds lists; another file may.
        types.update({name: kind for name, kind in found.items() if name not in types or pa.types.is_null(types[name])})
    return Decoder(schema, layout, types, counters, labeled=labeled, group_by=group_by)


def _hashed_columns(schema: Schema, layout: Layout) -> set[str]:
    keys = layout.keys
    features = {name for key in keys if key in schema.crosses for name in schema.crosses[key].columns}
    features |= {key for key in keys if key in schema.features and schema.features[key].ids == "hash"}
    return {schema.column(name) for name in features}
