"""DuckDB: one machine, memory bounded, what does not fit goes to disk."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa

from data_loaders.prepare import csv_header
from data_loaders.prepare.declaration import Source
from data_loaders.prepare.engine import (
    FILE,
    FILE_SHIFT,
    PART,
    PLACE,
    ROW,
    Engine,
    EngineError,
    declared_columns,
    raw_files,
)
from data_loaders.prepare.writer import ahead, write_file, write_parts
from data_loaders.schema import one_of
from data_loaders.storage import is_uri

# DuckDB counts its own buffers; Python, Arrow batches on their way and the Parquet writer come on top.
_SHARE = 0.65
_CHUNK_SHARE = 0.08
_BATCH_ROWS = 65_536
_SETTINGS = {
    "TimeZone": "'UTC'",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",  # a name in SQL is never a variable of ours
}
# Those that change how fast it goes and how much room it takes, never what comes out or which files are opened.
_OPTIONS = (
    *("allocator_background_threads", "allocator_bulk_deallocation_flush_threshold", "allocator_flush_threshold"),
    *("enable_external_file_cache", "max_temp_directory_size", "parquet_metadata_cache", "pin_threads"),
    *("temp_file_encryption",),
)
_TYPES = {
    "int8": "TINYINT",
    "int16": "SMALLINT",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "string": "VARCHAR",
    "boolean": "BOOLEAN",
    "date": "DATE",
    "timestamp": "TIMESTAMP",
    "list<int64>": "BIGINT[]",
    "list<float64>": "DOUBLE[]",
    "list<string>": "VARCHAR[]",
}


class DuckDBEngine(Engine):
    name = "duckdb"
    joins_at_once = 4  # measured: 39 joins of a chunk took 5.4 s by fours, 7.7 s one by one, 17.7 s in one chain

    def __init__(self, work: Path, memory: int, threads: int, options: dict[str, str]) -> None:
        super().__init__(work)
        self._spill = Path(tempfile.mkdtemp(prefix="spill-", dir=_made(work)))
        self.chunk_bytes = int(memory * _CHUNK_SHARE)
        limit = f"{int(memory * _SHARE / 1e6)}MB"
        for option in options:
            one_of(option, _OPTIONS, "engine_options")
        try:
            self.backend = ibis.duckdb.connect(
                threads=threads, memory_limit=limit, temp_directory=str(self._spill), **options
            )
            for key, value in _SETTINGS.items():
                self.backend.con.execute(f"SET {key} = {value}")
        except duckdb.Error as error:
            shown = ", ".join(f"engine_options.{key}={value}" for key, value in options.items())
            raise ValueError(f"{shown or 'DuckDB'}: {' '.join(str(error).split())[:200]}") from None

    def confine(self, reads: list[str]) -> None:
        connection = self.backend.con
        if any(is_uri(file) for file in reads):
            _load_httpfs(connection)
        folders = [str(self.work), *(file for file in reads if os.path.isdir(file))]
        paths = [file for file in reads if file not in folders]
        connection.execute(f"SET allowed_directories = [{', '.join(map(_quoted, folders))}]")
        connection.execute(f"SET allowed_paths = [{', '.join(map(_quoted, paths))}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")

    def read(self, name: str, source: Source, root: str, optional: frozenset[str] = frozenset()) -> ibis.Table:
        files = raw_files(name, source, root)
        if source.format == "parquet":
            return self._rows(name, source, files, files, optional)
        copies = [self._copy(name, source, file, number, optional) for number, file in enumerate(files)]
        return self._rows(name, source, copies, files, optional)

    def store(self, table: ibis.Table, name: str) -> ibis.Table:
        path = self.work / f"{name}.parquet"
        if not path.exists():
            unfinished = _made(path.parent) / f".{path.name}.unfinished"
            table.to_parquet(unfinished, compression="snappy")
            os.replace(unfinished, path)
        return self.backend.read_parquet(path)

    def write(
        self,
        chunks: Iterable[list[ibis.Table]],
        folder: Path,
        schema: pa.Schema,
        keys: list[str],
        by: str | None = None,
    ) -> int:
        names = [*schema.names, *([by] if by else [])]
        return write_parts(ahead(self._batches(chunks, names, keys)), folder, schema, by=by)

    def write_file(self, table: ibis.Table, path: Path, schema: pa.Schema, keys: list[str]) -> int:
        return write_file(ahead(self._batches([[table]], schema.names, keys)), path, schema)

    def explain(self, error: Exception) -> Exception | None:
        if not isinstance(error, duckdb.Error):
            return None
        message = " ".join(str(error).split())[:400]
        if "No space left" in message or "failed to offload data block" in message:
            return EngineError(
                f"the disk is full: free space and run the same command again, which goes on ({message})"
            )
        if isinstance(error, duckdb.OutOfMemoryException):
            return EngineError(f"memory_limit is too small for DuckDB: raise it, or lower threads ({message})")
        if isinstance(error, (duckdb.DataError, duckdb.ProgrammingError)):
            return ValueError(message)
        return EngineError(message)

    def close(self) -> None:
        self.backend.disconnect()
        shutil.rmtree(self._spill, ignore_errors=True)

    def _batches(
        self, chunks: Iterable[list[ibis.Table]], names: list[str], keys: list[str]
    ) -> Iterator[pa.RecordBatch]:
        for first, *others in chunks:
            beside = [self.backend.to_pyarrow(_ordered(table, names, keys)) for table in others]
            place = 0
            for batch in self.backend.to_pyarrow_batches(_ordered(first, names, keys), chunk_size=_BATCH_ROWS):
                yield _side_by_side(batch, [table.slice(place, batch.num_rows) for table in beside])
                place += batch.num_rows
            assert all(table.num_rows == place for table in beside), "tables of a chunk differ in rows"

    def _rows(
        self, name: str, source: Source, files: list[str], origins: list[str], optional: frozenset[str]
    ) -> ibis.Table:
        """The Parquet files, with the place of each row; ``origins`` are the raw files they come from."""
        listed = ", ".join(map(_quoted, files))
        scan = f"read_parquet([{listed}], union_by_name = true)"
        present = self._present(scan)
        wanted = declared_columns(name, source, present, origins[0], optional)
        columns = [_cast(source, column) for column in wanted]
        absent = [column for column in source.columns if column not in wanted]
        columns += [f"CAST(NULL AS {_TYPES[source.columns[column]]}) AS {_identifier(column)}" for column in absent]
        if source.file_column:
            cases = " ".join(f"WHEN {number} THEN {_quoted(file)}" for number, file in enumerate(origins))
            columns.append(f"CASE file_index {cases} END AS {_identifier(source.file_column)}")
        place = f"(file_index::BIGINT << {FILE_SHIFT}) + file_row_number"
        columns += [f"{place} AS {ROW}", f"0::BIGINT AS {PART}"]
        columns += [f"file_index::BIGINT AS {FILE}", f"file_row_number AS {PLACE}"]
        return self.backend.sql(f"SELECT {', '.join(columns)} FROM {scan}", dialect="duckdb")

    def _present(self, scan: str) -> list[str]:
        try:
            return list(self.backend.sql(f"SELECT * FROM {scan}", dialect="duckdb").columns)
        except duckdb.Error as error:
            raise ValueError(f"a Parquet file cannot be read: {' '.join(str(error).split())[:300]}") from error

    def _copy(self, name: str, source: Source, file: str, number: int, optional: frozenset[str]) -> str:
        """A text file as Parquet, rows in the file's order: later steps read single columns of it many times."""
        path = self.work / "raw" / name / f"{number:05}.parquet"
        if not path.exists():
            unfinished = _made(path.parent) / f".{path.name}.unfinished"
            try:
                self.backend.con.execute(
                    f"COPY ({_scan(name, source, file, optional)}) TO {_quoted(str(unfinished))} "
                    "(FORMAT parquet, COMPRESSION snappy, DICTIONARY_SIZE_LIMIT 20000)"
                )
            except duckdb.Error as error:
                raise _bad_file(name, file, error) from error
            os.replace(unfinished, path)
        return str(path)


def _load_httpfs(connection: duckdb.DuckDBPyConnection) -> None:
    try:
        connection.execute("INSTALL httpfs; LOAD httpfs")
    except duckdb.Error as error:
        raise ValueError(
            "input= is an address, for which DuckDB needs its extension httpfs, and that cannot be loaded "
            f"({' '.join(str(error).split())[:120]}): copy the files to this machine"
        ) from None


def _ordered(table: ibis.Table, names: list[str], keys: list[str]) -> ibis.Table:
    """The table's columns of those named. One at least, so that its rows can be counted."""
    found = [name for name in names if name in table.columns] or [keys[0]]
    return table.order_by([table[key] for key in keys]).select(found)


def _side_by_side(first: pa.RecordBatch, others: list[pa.Table]) -> pa.RecordBatch:
    columns = dict(zip(first.schema.names, first.columns))
    for table in others:
        columns |= {name: table.column(name).combine_chunks() for name in table.column_names}
    return pa.RecordBatch.from_pydict(columns)


def _cast(source: Source, column: str) -> str:
    if column not in source.columns:
        return _identifier(column)
    return f"CAST({_identifier(column)} AS {_TYPES[source.columns[column]]}) AS {_identifier(column)}"


def _scan(name: str, source: Source, file: str, optional: frozenset[str]) -> str:
    declared = {column: _TYPES[kind] for column, kind in source.columns.items()}
    if source.format == "json":
        columns = _struct(declared)
        return f"SELECT * FROM read_json({_quoted(file)}, format = 'newline_delimited', columns = {columns})"
    names = csv_header.columns(name, file, source, optional)
    chosen = ", ".join(map(_identifier, declared_columns(name, source, names, f"'{file}'", optional)))
    declared = {column: declared.get(column, "VARCHAR") for column in names}
    options = {
        "columns": _struct(declared),
        "auto_detect": "false",
        "header": str(source.header).lower(),
        "delim": _quoted(source.separator),
        "quote": _quoted(source.quote),
        "escape": _quoted(source.quote),
        "nullstr": "[" + ", ".join(map(_quoted, ["", *source.null_values])) + "]",
        "encoding": _quoted(source.encoding),
    }
    return f"SELECT {chosen} FROM read_csv({_quoted(file)}, {', '.join(f'{k} = {v}' for k, v in options.items())})"


def _bad_file(name: str, file: str, error: duckdb.Error) -> Exception:
    """One line for a file that is not as declared; other errors as they are."""
    text = str(error)
    line = re.search(r"(?:CSV Error on Line|in line|Line): ?(\d+)", text)
    place = f"sources.{name}: {file}" + (f", line {line.group(1)}" if line else "")
    value = re.search(r'Error when converting column "(.+?)"\. Could not convert string "(.*?)" to \'(\w+)\'', text)
    if value:
        kinds = {engine: ours for ours, engine in _TYPES.items()}
        column, found, kind = value.groups()
        return ValueError(
            f"{place}: column '{column}' holds {found!r}, which is not {kinds.get(kind, kind)}: declare another type "
            f"(sources.{name}.columns.{column}=string), or name what stands for a missing value "
            f"(sources.{name}.null_values=[{found}])"
        )
    if isinstance(error, (duckdb.InvalidInputException, duckdb.ConversionException)):
        return ValueError(f"{place}: {' '.join(text.split())[:300]}")
    return error


def _struct(columns: dict[str, str]) -> str:
    return "{" + ", ".join(f"{_quoted(name)}: {_quoted(kind)}" for name, kind in columns.items()) + "}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
