"""Segments to decoded columns: each row is decompressed once, decoded once, and while it is in the CPU's cache.

A stream is read in runs of up to ``RUN_ROWS`` rows. A segment rarely ends where a run does: what it leaves waits for the
stream's next one.

With less data than logical shards times row groups, neighbouring shards share a row group; read by each of them, it
would be decompressed again and again. Such a row group is decoded once and kept until every shard has taken its part.
"""

import threading
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa

from data_loaders.column_decoders import RowError
from data_loaders.columns import Columns
from data_loaders.decode import Decoder
from data_loaders.errors import UserError
from data_loaders.order import Segment
from data_loaders.reader import READ_ROWS, Handle, RowGroups, TableStream

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

    def take(self, segment: Segment, handle: Handle) -> Columns | None:
        """The segment's rows, if its row group is shared. Raises ``UserError`` for a value that the schema does not
        allow, with its place."""
        with self._lock:
            entry = self._entries.get(segment.row_group)
        if entry is None:
            return None
        with entry.lock:
            columns = entry.part(segment, lambda: self._decode(entry, handle))
        with self._lock:
            if entry.taken(columns.num_rows):
                del self._entries[segment.row_group]
                self._bytes -= entry.size
        return columns

    def _decode(self, entry: "_Entry", handle: Handle) -> Columns:
        try:
            return self._decoder(self._tables(entry, handle), entry.rows_left, "row group")
        except RowError as error:
            raise located(error, self._row_groups, entry.rest) from error

    def _tables(self, entry: "_Entry", handle: Handle) -> Iterator[pa.Table]:
        """The rows of ``rest`` and no others: those are another rank's, or were trained before a run was resumed, and
        must not be counted (again)."""
        position = 0
        for table in self._row_groups.read(entry.row_group, READ_ROWS, handle):
            for segment in entry.rest:
                start, stop = max(segment.start - position, 0), min(segment.stop - position, table.num_rows)
                if start < stop:
                    yield table.slice(start, stop - start)
            position += table.num_rows
            if position >= entry.rest[-1].stop:
                return


class _Entry:
    def __init__(self, rest: list[Segment], size: int) -> None:
        self.lock = threading.Lock()
        self.row_group = rest[0].row_group
        self.rest = rest
        self.size = size
        self.rows_left = sum(segment.stop - segment.start for segment in rest)
        self.columns: Columns | None = None

    def part(self, segment: Segment, decode: Callable[[], Columns]) -> Columns:
        if self.columns is None:
            self.columns = decode()
        first = self._place(segment)
        return self.columns.between(first, first + segment.stop - segment.start)

    def taken(self, rows: int) -> bool:
        """Whether these were the last."""
        self.rows_left -= rows
        return self.rows_left == 0

    def _place(self, wanted: Segment) -> int:
        """Where a part of the rest begins in ``columns``."""
        before = 0
        for segment in self.rest:
            if segment.start <= wanted.start < segment.stop:
                return before + wanted.start - segment.start
            before += segment.stop - segment.start
        raise AssertionError("a part that was not expected")


class ColumnStream:
    """One stream of segments, which come in the order of their row groups; used by one thread at a time."""

    def __init__(self, row_groups: RowGroups, decoder: Decoder, shared: SharedRowGroups, number: int) -> None:
        self._row_groups = row_groups
        self._decoder = decoder
        self._shared = shared
        self._tables = TableStream(row_groups)
        # Streams begin a row group with runs of different lengths, or many would need a new one in the same block.
        self._first_run = RUN_ROWS * (1 + number % _PHASES) // _PHASES
        self._run: Columns | None = None
        self._place = (-1, 0, 0)  # row group and row where what is left of the run begins, and where that is in the run

    def read(self, segment: Segment) -> Iterator[Columns]:
        """The segment's rows, in parts. Raises ``UserError`` for a value that the schema does not allow, with its place."""
        columns = self._shared.take(segment, self._tables.handle)
        if columns is not None:
            yield columns
            return
        position = segment.start
        while position < segment.stop:
            run, first = self._next(segment, position)
            taken = min(run.num_rows - first, segment.stop - position)
            position += taken
            self._run = run if first + taken < run.num_rows else None
            self._place = (segment.row_group, position, first + taken)
            yield run.between(first, first + taken)

    def _next(self, segment: Segment, position: int) -> tuple[Columns, int]:
        """A run, and where in it the row ``position`` is. It does not go beyond the segment's limit: what lies there must
        not be counted here."""
        if self._run is not None and self._place[:2] == (segment.row_group, position):
            return self._run, self._place[2]
        begins = segment.row_group != self._place[0]
        stop = min(position + (self._first_run if begins else RUN_ROWS), segment.limit)
        return self._decode(segment.row_group, position, stop), 0

    def _decode(self, row_group: int, start: int, stop: int) -> Columns:
        """Each table while it is in the CPU's cache."""
        try:
            return self._decoder(self._tables.tables(row_group, start, stop), stop - start, "run")
        except RowError as error:
            raise located(error, self._row_groups, [Segment(row_group, start, stop, stop)]) from error


def located(error: RowError, row_groups: RowGroups, segments: Iterable[Segment]) -> UserError:
    """The error with file, row group and row; its own row counts from the start of the segments."""
    row = error.row
    for segment in segments:
        if row < segment.stop - segment.start:
            path, index = row_groups.place(segment.row_group)
            return UserError(f"'{path}', row group {index}, row {segment.start + row}: {error}")
        row -= segment.stop - segment.start
    raise AssertionError("a row behind the end")
