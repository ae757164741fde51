"""Segments to decoded columns: each row is decompressed once, decoded once, and while it lies in the CPU's cache.

A stream is read in runs of up to ``RUN_ROWS`` rows. A segment rarely ends where a run does: what it leaves waits for the
stream's next one.

With less data than logical shards times row groups, neighbouring shards lie in one row group; read by each of them, it
would be decompressed again and again. Such a row group is decoded once and kept until every shard has taken its part.
"""

import threading
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa

from data_loaders.column_decoders import RowError
from data_loaders.columns import Columns
from data_loaders.decode import Decoder
from data_loaders.order import Segment
from data_loaders.reader import PIECE_ROWS, Handle, RowGroups, TableStream

SHARED_BYTES = 1 << 30
# Taking turns over many row groups costs Parquet's reader its caches (a third of its speed at 8192 rows a turn).
RUN_ROWS = 1 << 14
_PHASES = 8


class SharedRowGroups:
    """Keeps at most ``SHARED_BYTES``; what would go beyond is read by each shard for itself."""

    def __init__(self, row_groups: RowGroups, decoder: Decoder) -> None:
        self._row_groups = row_groups
        self._decoder = decoder
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}
        self._bytes = 0

    def expect(self, rest: list[Segment]) -> None:
        """``rest``, segments of one row group in order, will be taken in parts. Does nothing for a row group already
        expected, or when memory is full: ``take`` then answers None."""
        row_group = rest[0].row_group
        if row_group in self._entries:
            return
        size = self._row_groups.size(row_group)
        with self._lock:
            if self._bytes + size <= SHARED_BYTES:
                self._bytes += size
                self._entries[row_group] = _Entry(rest, size)

    def take(self, segment: Segment, handle: Handle) -> "list[Callable[[], Columns]] | None":
        """The segment's rows, in parts to call for, if its row group is shared."""
        with self._lock:
            entry = self._entries.get(segment.row_group)
        if entry is None:
            return None
        with entry.lock:
            if entry.runs is None:
                entry.runs = list(self._read(entry, handle))
            parts = [part for run in entry.runs for part in run.parts(segment)]
        with self._lock:
            entry.rows_left -= segment.stop - segment.start
            if entry.rows_left == 0:
                del self._entries[segment.row_group]
                self._bytes -= entry.size
        return parts

    def _read(self, entry: "_Entry", handle: Handle) -> "Iterator[_Run]":
        """The rows of ``rest`` and no others: those are another rank's, or were trained before a run was resumed, and
        must not be counted (again)."""
        position = 0
        for table in self._row_groups.pieces(entry.rest[0].row_group, PIECE_ROWS, handle):
            for segment in entry.rest:
                start, stop = max(segment.start - position, 0), min(segment.stop - position, table.num_rows)
                if start < stop:
                    rows = Segment(segment.row_group, position + start, position + stop, position + stop)
                    yield _Run(self._row_groups, self._decoder, [table.slice(start, stop - start)], rows)
            position += table.num_rows
            if position >= entry.rest[-1].stop:
                return


class _Entry:
    def __init__(self, rest: list[Segment], size: int) -> None:
        self.lock = threading.Lock()
        self.rest = rest
        self.size = size
        self.rows_left = sum(segment.stop - segment.start for segment in rest)
        self.runs: list[_Run] | None = None


class _Run:
    """Consecutive rows of a row group that have been read, and are decoded when they are first asked for."""

    def __init__(self, row_groups: RowGroups, decoder: Decoder, tables: list[pa.Table], rows: Segment) -> None:
        self.rows = rows
        self._row_groups = row_groups
        self._decoder = decoder
        self._tables: list[pa.Table] = tables
        self._columns: Columns | None = None
        self._lock = threading.Lock()

    def parts(self, segment: Segment) -> list[Callable[[], Columns]]:
        """What it has of a segment: none or one, to call for. To call raises ``ValueError`` for a value that the schema
        does not allow, with its place."""
        start, stop = max(segment.start, self.rows.start), min(segment.stop, self.rows.stop)
        if start >= stop:
            return []
        if not self._decoder.is_light:
            self._decoded()  # here, and not in the assembling thread
        return [lambda: self._decoded().between(start - self.rows.start, stop - self.rows.start)]

    def _decoded(self) -> Columns:
        with self._lock:
            if self._columns is None:
                try:
                    self._columns = self._decoder(self._tables, self.rows.stop - self.rows.start, "run")
                except RowError as error:
                    raise located(error, self._row_groups, [self.rows]) from error
                self._tables = []
        return self._columns


class ColumnStream:
    """One stream of segments, which come in the order of their row groups; used by one thread at a time."""

    def __init__(self, row_groups: RowGroups, decoder: Decoder, shared: SharedRowGroups, number: int) -> None:
        self._row_groups = row_groups
        self._decoder = decoder
        self._shared = shared
        self._tables = TableStream(row_groups)
        # Streams begin a row group with runs of different lengths, or many would need a new one in the same block.
        self._first_run = RUN_ROWS * (1 + number % _PHASES) // _PHASES
        self._run: _Run | None = None

    def read(self, segment: Segment) -> Iterator[Callable[[], Columns]]:
        """The segment's rows, in parts to call for, as of ``_Run.parts``."""
        shared = self._shared.take(segment, self._tables.handle)
        if shared is not None:
            yield from shared
            return
        position = segment.start
        while position < segment.stop:
            self._run = self._run_at(segment, position)
            yield from self._run.parts(segment)
            position = self._run.rows.stop

    def _run_at(self, segment: Segment, position: int) -> _Run:
        """The run with a row of the segment: the last one, or a new one, which does not go beyond the segment's limit: what
        lies there must not be counted here."""
        last = self._run.rows if self._run else None
        same = last is not None and last.row_group == segment.row_group
        if same and last.start <= position < last.stop:
            return self._run
        stop = min(position + (RUN_ROWS if same else self._first_run), segment.limit)
        tables = list(self._tables.tables(segment.row_group, position, stop))
        return _Run(self._row_groups, self._decoder, tables, Segment(segment.row_group, position, stop, stop))


def located(error: RowError, row_groups: RowGroups, segments: Iterable[Segment]) -> ValueError:
    """The error with file, row group and row; its own row counts from the start of the segments."""
    row = error.row
    for segment in segments:
        if row < segment.stop - segment.start:
            path, index = row_groups.place(segment.row_group)
            return ValueError(f"'{path}', row group {index}, row {segment.start + row}: {error}")
        row -= segment.stop - segment.start
    raise AssertionError("a row behind the end")
