"""Row groups to Arrow tables: each shard reads its rows in order, never a whole row group where a part will do.

A shard streams its row groups table by table, so it holds one table however large they are. Small data is the exception:
where several shards of this rank read the same row group at the same time, it is read once and kept until all have had
their part, in at most ``SHARED_BYTES``.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_loaders import footers
from data_loaders.arrow import is_list, is_text
from data_loaders.errors import UserError
from data_loaders.manifest import File, Manifest, column_type, find_column
from data_loaders.storage import Storage, StorageError, is_transient, is_uri

REMOTE_BYTES = 1 << 25  # of one open remote file
_SMALLEST_REQUEST = 1 << 16
LOCAL_BUFFER = 1 << 14  # bytes of a column; pages beyond are read past it
READ_ROWS = 1 << 13  # rows: enough to be worth the calls, few enough to stay in the CPU's cache until decoded
_SMALL_DICTIONARY = 1 << 16  # bytes
_KEPT_FOOTERS = 256


class RowGroups:
    """All row groups of a manifest, numbered over all files, with ``columns`` read of each.

    ``hashed``: columns whose values are only hashed; strings among them with a small dictionary in the file are read as
    Arrow dictionaries, so that each distinct string is hashed once a table. So are strings of partition columns.

    A local file is streamed, column by column, and each table is handed out only if the file is still as it was scanned. Of
    a remote one at most ``REMOTE_BYTES`` (compressed) are held for each handle: its
    row groups are fetched whole where they are no larger, in a few large requests side by side; else they are streamed,
    column by column (in buffers of 64 KiB at least). Pages with a checksum are verified; a bit that flips in one without
    may pass unseen, as a wrong value.
    """

    def __init__(self, manifest: Manifest, columns: list[str], hashed: set[str]) -> None:
        self._columns = columns
        self._hashed = hashed
        self._storage = Storage(manifest.root)
        self._schemas = manifest.schemas
        self._paths = [{column: find_column(schema, column) for column in columns} for schema in manifest.schemas]
        self._partition_types = manifest.partition_types
        self._places = [(file, index) for file in manifest.files for index in range(len(file.row_groups))]
        self._lock = threading.Lock()
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()

    @property
    def count(self) -> int:
        return len(self._places)

    def place(self, row_group: int) -> tuple[str, int]:
        """Path and number within the file."""
        file, index = self._places[row_group]
        return file.path, index

    def num_rows(self, row_group: int) -> int:
        file, index = self._places[row_group]
        return file.row_groups[index]

    def read(self, row_group: int, rows: int, handle: "Handle") -> Iterator[pa.Table]:
        """The row group in order, in tables of ``rows`` rows or, now and then, fewer. Each has ``columns`` in their order.

        Transient errors are retried from where reading stopped, so that no row comes twice. Raises ``UserError`` where
        the file is not the one that was scanned or is damaged, ``StorageError`` where it is gone or its storage keeps
        failing, ``OSError`` where it cannot be read otherwise; all name file and row group.
        """
        file, index = self._places[row_group]
        where = f"'{file.path}', row group {index}"
        retries = self._storage.retries(file.path, where)
        done = 0
        while True:
            try:
                self._check_unchanged(file, where)
                for table in self._tables(file, index, rows, done, handle):
                    if self._storage.local:  # a file that somebody writes over gives a mixture of two
                        self._check_unchanged(file, where)
                    yield table
                    done += table.num_rows
                return self._check_rows(done, file, index, where)
            except (OSError, pa.ArrowException) as error:
                handle.close()
                self._explain(error, file, where)
                retries.again(error)

    def size(self, row_group: int) -> int:
        """About how many bytes the row group takes in memory."""
        file, index = self._places[row_group]
        chunks = self._wanted_chunks(self._footer(file), index)
        return sum(max(chunk.total_uncompressed_size, 8 * chunk.num_values) for chunk in chunks)

    def _tables(self, file: File, index: int, rows: int, done: int, handle: "Handle") -> Iterator[pa.Table]:
        """The row group's rows behind the first ``done``."""
        parquet = handle.open(file, self._open)
        names = [column for column, path in self._paths[file.schema].items() if path]
        for batch in parquet.iter_batches(rows, row_groups=[index], columns=names, use_threads=False):
            skipped = min(done, batch.num_rows)
            done -= skipped
            if skipped < batch.num_rows:
                yield self._asked(batch.slice(skipped), file)

    def _asked(self, batch: pa.RecordBatch, file: File) -> pa.Table:
        if batch.schema.names == self._columns:
            return pa.Table.from_batches([batch])
        partitions = dict(file.partitions)
        arrays = []
        for column, path in self._paths[file.schema].items():
            if path is None:
                arrays.append(_constant(partitions.get(column), self._partition_types[column], batch.num_rows))
            else:
                arrays.append(_child(batch.column(path[0]), path[1:]))
        return pa.Table.from_arrays(arrays, names=self._columns)

    def _explain(self, error: Exception, file: File, where: str) -> None:
        """Raises the error to report, unless a retry may help."""
        if is_transient(error) or isinstance(error, StorageError):
            return
        if isinstance(error, FileNotFoundError):
            raise _gone(where) from error
        if isinstance(error, PermissionError):
            raise OSError(f"{where}: {error}") from error
        self._check_unchanged(file, where)  # what looks like damage may be another file
        raise UserError(f"{where}: {error}; check access to the file, and write it again if it is damaged") from error

    def _check_unchanged(self, file: File, where: str) -> None:
        try:
            now = self._storage.retries(file.path, where).run(lambda: self._storage.stat(file.path))
        except FileNotFoundError as error:
            raise _gone(where) from error
        if (now.size, now.mtime_ns) != (file.size, file.mtime_ns):
            raise _changed(file, f"now {now.size} bytes, then {file.size}")

    def _check_rows(self, rows: int, file: File, index: int, where: str) -> None:
        if rows != file.row_groups[index]:
            raise UserError(
                f"{where}: its pages hold {rows} rows, its footer counts {file.row_groups[index]}: the file is damaged; write "
                "it again, or take it away"
            )

    def _open(self, file: File) -> pq.ParquetFile:
        footer = self._footer(file)
        return pq.ParquetFile(
            self._storage.open(file.path),
            metadata=footer,
            read_dictionary=self._dictionaries(file, footer),
            page_checksum_verification=True,
            **(self._buffering(footer) if is_uri(file.path) else {"buffer_size": LOCAL_BUFFER}),
        )

    def _buffering(self, footer: pq.FileMetaData) -> dict[str, int]:
        """How to read a remote file within ``REMOTE_BYTES``."""
        groups = [list(self._wanted_chunks(footer, index)) for index in range(footer.num_row_groups)]
        if max(sum(chunk.total_compressed_size for chunk in chunks) for chunks in groups) <= REMOTE_BYTES:
            return {"pre_buffer": True}
        return {"pre_buffer": False, "buffer_size": max(_SMALLEST_REQUEST, REMOTE_BYTES // len(groups[0]))}

    def _footer(self, file: File) -> pq.FileMetaData:
        with self._lock:
            if file.path in self._footers:
                self._footers.move_to_end(file.path)
                return self._footers[file.path]
        content = self._storage.retries(file.path).run(lambda: footers.read(self._storage, file.path, file.size))
        if footers.digest(content) != file.footer:
            raise _changed(file, "its footer differs")
        footer = footers.parse(content)
        with self._lock:
            self._footers[file.path] = footer
            if len(self._footers) > _KEPT_FOOTERS:
                self._footers.popitem(last=False)
        return footer

    def _wanted_chunks(self, footer: pq.FileMetaData, index: int) -> Iterator[pq.ColumnChunkMetaData]:
        row_group = footer.row_group(index)
        chunks = map(row_group.column, range(row_group.num_columns))
        return (chunk for chunk in chunks if _root(chunk.path_in_schema, self._columns))

    def _dictionaries(self, file: File, footer: pq.FileMetaData) -> list[str]:
        schema = self._schemas[file.schema]
        found = []
        for chunk in self._wanted_chunks(footer, 0):
            path = chunk.path_in_schema  # 'column', or 'column.list.element'
            column = _root(path, self._hashed)
            # A small dictionary is complete: the writer gives it up only when it has grown large.
            place = self._paths[file.schema][column] if column else None
            if not place or not _holds_text(column_type(schema, place)) or not chunk.has_dictionary_page:
                continue
            if chunk.data_page_offset - chunk.dictionary_page_offset <= _SMALL_DICTIONARY:
                found.append(path)
        return found


def _gone(where: str) -> StorageError:
    return StorageError(
        f"{where}: No such file any more, though it was there when the run began: put it back and start the same command "
        "again; the run resumes from its last checkpoint"
    )


def _changed(file: File, how: str) -> UserError:
    return UserError(
        f"data file '{file.path}' has changed since it was scanned ({how}): the order of rows is no longer that of this "
        "run; restore the file or start a new run"
    )


def _constant(value: str | None, kind: pa.DataType, rows: int) -> pa.Array:
    """A partition column's value, ``rows`` times."""
    if kind == pa.int64():
        return pa.nulls(rows, kind) if value is None else pa.array(np.full(rows, int(value)))
    indices = pa.nulls(rows, pa.int32()) if value is None else pa.array(np.zeros(rows, np.int32))
    return pa.DictionaryArray.from_arrays(indices, pa.array([] if value is None else [value], pa.string()))


def _child(array: pa.Array, path: tuple[str, ...]) -> pa.Array:
    """A struct's child, null where the struct is."""
    for name in path:
        array = array.flatten()[array.type.get_field_index(name)]
    return array


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

    def close(self) -> None:
        """The next ``open`` opens anew."""
        self._parquet = None


class TableStream:
    """One stream of segments, which come in the order of their row groups; used by one thread at a time."""

    def __init__(self, row_groups: RowGroups) -> None:
        self._row_groups = row_groups
        self._row_group = -1
        self._tables: Iterator[pa.Table] = iter(())
        self._position = 0  # of the first row of ``_rest``, or else of the next table
        self._rest: pa.Table | None = None
        self.handle = Handle()

    def tables(self, row_group: int, start: int, stop: int) -> Iterator[pa.Table]:
        """Rows [start, stop) of a row group. Within it, calls come in order; rows between them are skipped."""
        if row_group != self._row_group:
            self._row_group, self._position, self._rest = row_group, 0, None
            self._tables = self._row_groups.read(row_group, READ_ROWS, self.handle)
        assert start >= self._position, "segments come in order"
        while self._position < stop:
            table = next(self._tables, None) if self._rest is None else self._rest
            assert table is not None, "read() gives all rows or raises"
            first, end = self._position, self._position + table.num_rows
            self._rest = table.slice(stop - first) if stop < end else None
            self._position = min(stop, end)
            if self._position > max(first, start):
                yield table.slice(max(first, start) - first, self._position - max(first, start))
        if stop == self._row_groups.num_rows(row_group):
            self._row_group = -1  # drops the last table
