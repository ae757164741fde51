"""Row groups to Arrow tables: each shard reads its rows in order, never a whole row group where a part will do.

A shard streams its row groups in pieces, so it holds one piece however large they are. Small data is the exception:
where several shards of this rank read the same row group at the same time, it is read once and kept until all have had
their part, in at most ``SHARED_BYTES``.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from data_loaders.arrow import is_list, is_text
from data_loaders.manifest import File, Manifest
from data_loaders.order import Segment

SHARED_BYTES = 1 << 30
_PIECE = 1 << 13  # rows: enough to be worth the calls, few enough to stay in the CPU's cache until decoded
_SMALL_DICTIONARY = 1 << 16  # bytes
_KEPT_FOOTERS = 256


class RowGroups:
    """All row groups of a manifest, numbered over all files, with ``columns`` read of each.

    ``hashed``: columns whose values are only hashed; strings among them with a small dictionary in the file are read as
    Arrow dictionaries, so that each distinct string is hashed once a piece.
    """

    def __init__(self, manifest: Manifest, columns: list[str], hashed: set[str]) -> None:
        self._columns = columns
        self._hashed = hashed
        self._schemas = manifest.schemas
        self._places = [(file, index) for file in manifest.files for index in range(len(file.row_groups))]
        self._lock = threading.Lock()
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()

    def place(self, row_group: int) -> tuple[str, int]:
        """Path and number within the file."""
        file, index = self._places[row_group]
        return file.path, index

    def num_rows(self, row_group: int) -> int:
        file, index = self._places[row_group]
        return file.row_groups[index]

    def pieces(self, row_group: int, rows: int, handle: "Handle") -> Iterator[pa.Table]:
        """The row group in order, in tables of ``rows`` rows. Raises ``ValueError`` where the file is not the one that
        was scanned or is damaged, ``OSError`` where it cannot be read; both name file and row group."""
        file, index = self._places[row_group]
        try:
            parquet = handle.open(file, self._open)
            for batch in parquet.iter_batches(rows, row_groups=[index], columns=self._columns, use_threads=False):
                yield pa.Table.from_batches([batch])
        except pa.ArrowException as error:
            raise ValueError(f"'{file.path}', row group {index}: {error}; write the file again") from error
        except OSError as error:
            raise OSError(f"'{file.path}', row group {index}: {error}") from error

    def size(self, row_group: int) -> int:
        """About how many bytes the row group takes in memory."""
        file, index = self._places[row_group]
        footer = self._footer(file).row_group(index)
        chunks = (footer.column(i) for i in range(footer.num_columns))
        wanted = (chunk for chunk in chunks if _root(chunk.path_in_schema, self._columns))
        return sum(max(chunk.total_uncompressed_size, 8 * chunk.num_values) for chunk in wanted)

    def _open(self, file: File) -> pq.ParquetFile:
        footer = self._footer(file)
        dictionaries = self._dictionaries(file, footer)
        return pq.ParquetFile(file.path, metadata=footer, memory_map=True, read_dictionary=dictionaries)

    def _footer(self, file: File) -> pq.FileMetaData:
        stat = os.stat(file.path)
        if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
            raise ValueError(
                f"data file '{file.path}' has changed since it was scanned (now {stat.st_size} bytes, then "
                f"{file.size}): the order of rows is no longer that of this run; restore the file or start a new run"
            )
        with self._lock:
            if file.path in self._footers:
                self._footers.move_to_end(file.path)
                return self._footers[file.path]
        footer = pq.read_metadata(file.path)
        with self._lock:
            self._footers[file.path] = footer
            if len(self._footers) > _KEPT_FOOTERS:
                self._footers.popitem(last=False)
        return footer

    def _dictionaries(self, file: File, footer: pq.FileMetaData) -> list[str]:
        schema = self._schemas[file.schema]
        first = footer.row_group(0)
        found = []
        for chunk in map(first.column, range(footer.num_columns)):
            path = chunk.path_in_schema  # 'column', or 'column.list.element'
            column = _root(path, self._hashed)
            # A small dictionary is complete: the writer gives it up only when it has grown large.
            if not column or not _holds_text(schema.field(column).type) or not chunk.has_dictionary_page:
                continue
            if chunk.data_page_offset - chunk.dictionary_page_offset <= _SMALL_DICTIONARY:
                found.append(path)
        return found


def _root(path: str, columns: Iterable[str]) -> str | None:
    """The column of ``columns`` that a Parquet path belongs to."""
    return next((column for column in columns if path == column or path.startswith(column + ".")), None)


def _holds_text(kind: pa.DataType) -> bool:
    return is_text(kind.value_type if is_list(kind) else kind)


class Handle:
    """One open file, kept while row groups of the same file are read: opening costs as much as decoding 10,000 rows."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._parquet: pq.ParquetFile | None = None

    def open(self, file: File, opener: Callable[[File], pq.ParquetFile]) -> pq.ParquetFile:
        if self._path != file.path or self._parquet is None:
            self._parquet, self._path = opener(file), file.path
        return self._parquet


class SharedRowGroups:
    """Row groups that several shards of this rank read at the same time, each read once."""

    def __init__(self, row_groups: RowGroups) -> None:
        self._row_groups = row_groups
        self._lock = threading.Lock()
        self._entries: dict[int, _Shared] = {}
        self._bytes = 0

    def expect(self, row_group: int, rows: int) -> None:
        """``rows`` rows of this row group will be taken. Does nothing for one already expected, or when memory is full:
        ``take`` then answers None."""
        if row_group in self._entries:
            return
        size = self._row_groups.size(row_group)
        with self._lock:
            if self._bytes + size <= SHARED_BYTES:
                self._bytes += size
                self._entries[row_group] = _Shared(size, rows)

    def take(self, segment: Segment, handle: Handle) -> pa.Table | None:
        """The segment's rows, if its row group is shared."""
        with self._lock:
            entry = self._entries.get(segment.row_group)
        if entry is None:
            return None
        with entry.lock:
            if entry.table is None:
                rows = self._row_groups.num_rows(segment.row_group)
                entry.table = pa.concat_tables(list(self._row_groups.pieces(segment.row_group, rows, handle)))
            table = entry.table.slice(segment.start, segment.stop - segment.start)
        with self._lock:
            entry.rows_left -= table.num_rows
            if entry.rows_left == 0:
                del self._entries[segment.row_group]
                self._bytes -= entry.size
        return table


class _Shared:
    def __init__(self, size: int, rows_left: int) -> None:
        self.lock = threading.Lock()
        self.size = size
        self.rows_left = rows_left
        self.table: pa.Table | None = None


class ShardReader:
    """One shard's segments in order; used by one thread at a time."""

    def __init__(self, row_groups: RowGroups, shared: SharedRowGroups) -> None:
        self._row_groups = row_groups
        self._shared = shared
        self._handle = Handle()
        self._stream: _Stream | None = None

    def read(self, segment: Segment) -> Iterator[pa.Table]:
        table = self._shared.take(segment, self._handle)
        if table is not None:
            self._stream = None
            yield table
            return
        if self._stream is None or self._stream.row_group != segment.row_group:
            pieces = self._row_groups.pieces(segment.row_group, _PIECE, self._handle)
            self._stream = _Stream(segment.row_group, pieces)
        yield from self._stream.read(segment)
        if segment.stop == self._row_groups.num_rows(segment.row_group):
            self._stream = None


class _Stream:
    """A row group being read from its start."""

    def __init__(self, row_group: int, pieces: Iterator[pa.Table]) -> None:
        self.row_group = row_group
        self._pieces = pieces
        self._position = 0  # of the first row of ``_rest``
        self._rest: pa.Table | None = None

    def read(self, segment: Segment) -> Iterator[pa.Table]:
        """The segment's rows; those before it are skipped."""
        assert segment.start >= self._position, "segments come in order"
        while self._position < segment.stop:
            piece = next(self._pieces, None) if self._rest is None else self._rest
            assert piece is not None, "the footer counts more rows than the row group has"
            first, end = self._position, self._position + piece.num_rows
            start, stop = max(first, segment.start), min(end, segment.stop)
            self._rest = piece.slice(stop - first) if stop < end else None
            self._position = stop if self._rest is not None else end
            if stop > start:
                yield piece.slice(start - first, stop - start)
