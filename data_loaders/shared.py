"""Row groups that several streams of one rank read at the same time, each read and decoded once.

With less data than logical shards times row groups, neighbouring shards lie in one row group; read by each shard, it
would be decompressed again and again. Here it is decoded once and kept until every shard has taken its part.
"""

import threading
from collections.abc import Iterator

import pyarrow as pa

from data_loaders.column_decoders import RowError
from data_loaders.columns import Columns
from data_loaders.decode import Decoder
from data_loaders.order import Segment
from data_loaders.reader import PIECE_ROWS, Handle, RowGroups

SHARED_BYTES = 1 << 30


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

    def holds(self, segments: list[Segment]) -> bool:
        """Whether ``take`` will answer for all of them."""
        return all(segment.row_group in self._entries for segment in segments)

    def take(self, segment: Segment, handle: Handle) -> Columns | None:
        """The segment's rows, if its row group is shared. Raises ``ValueError`` for a value that the schema does not
        allow, with its place."""
        with self._lock:
            entry = self._entries.get(segment.row_group)
        if entry is None:
            return None
        with entry.lock:
            if entry.columns is None:
                entry.columns = self._decode(entry, handle)
            first = entry.place(segment)
            columns = entry.columns.between(first, first + segment.stop - segment.start)
        with self._lock:
            entry.rows_left -= columns.num_rows
            if entry.rows_left == 0:
                del self._entries[segment.row_group]
                self._bytes -= entry.size
        return columns

    def _decode(self, entry: "_Entry", handle: Handle) -> Columns:
        try:
            return self._decoder(self._tables(entry, handle), entry.rows_left, "row group")
        except RowError as error:
            path, index = self._row_groups.place(entry.row_group)
            raise ValueError(f"'{path}', row group {index}, row {entry.row(error.row)}: {error}") from error

    def _tables(self, entry: "_Entry", handle: Handle) -> Iterator[pa.Table]:
        """The rows of ``rest`` and no others: those are another rank's, or were trained before a run was resumed, and
        must not be counted (again)."""
        position = 0
        for table in self._row_groups.pieces(entry.row_group, PIECE_ROWS, handle):
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

    def place(self, wanted: Segment) -> int:
        """Where a part of the rest begins in ``columns``."""
        before = 0
        for segment in self.rest:
            if segment.start <= wanted.start < segment.stop:
                return before + wanted.start - segment.start
            before += segment.stop - segment.start
        raise AssertionError("a part that was not expected")

    def row(self, place: int) -> int:
        """The opposite."""
        for segment in self.rest:
            if place < segment.stop - segment.start:
                return segment.start + place
            place -= segment.stop - segment.start
        raise AssertionError("a place behind the end")
