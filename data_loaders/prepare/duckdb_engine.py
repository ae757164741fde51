"""DuckDB: one machine, memory bounded, what does not fit goes to disk."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from data_loaders.errors import UserError
from data_loaders.messages import one_line
from data_loaders.prepare import bad_rows, csv_lines, engine_errors, json_keys, parquet_files, pipes, text_files, values
from data_loaders.prepare.declaration import Source
from data_loaders.prepare.engine import (
    FILE,
    FILE_SHIFT,
    PART,
    PLACE,
    ROW,
    Engine,
    EngineError,
    Shuffle,
    declared_columns,
)
from data_loaders.prepare.sql import identifier
from data_loaders.prepare.text_files import TextFile
from data_loaders.prepare.writer import ahead, sorted_apart, write_file, write_parts
from data_loaders.schema import one_of
from data_loaders.state_files import publish, write_text
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


class DuckDBEngine(Engine):
    name = "duckdb"
    joins_at_once = 4  # measured: 39 joins of a chunk took 5.4 s by fours, 7.7 s one by one, 17.7 s in one chain

    def __init__(self, work: Path, memory: int, threads: int, options: dict[str, str]) -> None:
        super().__init__(work)
        self._spill = Path(tempfile.mkdtemp(prefix="spill-", dir=_made(work)))
        self.chunk_bytes = int(memory * _CHUNK_SHARE)
        limit = f"{int(memory * _SHARE / 1e6)}MB"
        for option in options:
            one_of(option, _OPTIONS, f"engine_options.{option}")
        try:
            self.backend = ibis.duckdb.connect(
                threads=threads, memory_limit=limit, temp_directory=str(self._spill), **options
            )
            for key, value in _SETTINGS.items():
                self.backend.con.execute(f"SET {key} = {value}")
        except duckdb.Error as error:
            shown = ", ".join(f"engine_options.{key}={value}" for key, value in options.items())
            raise UserError(f"{shown or 'DuckDB'}: {one_line(error, 200)}") from None

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

    def read(
        self,
        name: str,
        source: Source,
        root: str,
        optional: frozenset[str] = frozenset(),
        needed: frozenset[str] | None = None,
    ) -> ibis.Table:
        if source.format == "parquet":
            files = self.raw_files(name, source, root)
            parts = parquet_files.groups(name, source, files, root, optional, needed)
            return parquet_files.united(name, source, parts, [self._group(name, source, group) for group in parts])
        texts = self.text_files(name, source, root)
        copies = [self._copy(name, source, file, number, optional) for number, file in enumerate(texts)]
        found = self.inputs[name]
        if found.bad_rows and not any(pq.read_metadata(copy).num_rows for copy in copies):
            raise bad_rows.no_good(name, found.bad_rows, found.first_bad)
        return self._rows(name, source, copies, [file.name for file in texts], optional)

    def store(self, table: ibis.Table, name: str) -> ibis.Table:
        path = self.work / f"{name}.parquet"
        if not path.exists():
            unfinished = _made(path.parent) / f".{path.name}.unfinished"
            table.to_parquet(unfinished, compression="snappy")
            publish(unfinished, path)
        return self.backend.read_parquet(path)

    def write(
        self,
        chunks: Iterable[list[ibis.Table]],
        folder: Path,
        schema: pa.Schema,
        keys: list[str],
        by: str | None = None,
        shuffle: Shuffle | None = None,
    ) -> int:
        names = [*schema.names, *([by] if by else [])]
        if shuffle is None:
            return write_parts(ahead(self._batches(chunks, names, keys)), folder, schema, by=by)
        names = list(dict.fromkeys([*names, shuffle.key, *keys]))
        batches = ahead(self._batches(chunks, names, keys))
        ordered = sorted_apart(batches, [shuffle.key, *keys], shuffle.bound, shuffle.parts, self._spill)
        return write_parts(ordered, folder, schema, by=by, shuffled=True)

    def write_file(self, table: ibis.Table, path: Path, schema: pa.Schema, keys: list[str]) -> int:
        return write_file(ahead(self._batches([[table]], schema.names, keys)), path, schema)

    def explain(self, error: Exception) -> Exception | None:
        if not isinstance(error, duckdb.Error):
            return None
        if "No space left" in str(error) or "failed to offload data block" in str(error):
            return EngineError("the disk is full: free space and run the same command again, which resumes")
        if isinstance(error, duckdb.OutOfMemoryException):
            return EngineError(
                f"memory_limit is too small for DuckDB: raise it, or lower threads ({self.store_error(error)})"
            )
        known = engine_errors.explanation(error)
        if known or isinstance(error, (duckdb.DataError, duckdb.ProgrammingError)):
            return UserError(known or f"an expression of the recipe cannot be computed ({self.store_error(error)})")
        return EngineError(
            f"DuckDB could not finish: run the same command again, which resumes ({self.store_error(error)})"
        )

    def close(self) -> None:
        self.backend.disconnect()
        shutil.rmtree(self._spill, ignore_errors=True)

    def _batches(
        self, chunks: Iterable[list[ibis.Table]], names: list[str], keys: list[str]
    ) -> Iterator[pa.RecordBatch]:
        for first, *others in chunks:
            rest = [name for name in names if name not in keys]
            beside = [self.backend.to_pyarrow(_ordered(table, rest, keys)) for table in others]
            place = 0
            for batch in self.backend.to_pyarrow_batches(_ordered(first, names, keys), chunk_size=_BATCH_ROWS):
                yield _side_by_side(batch, [table.slice(place, batch.num_rows) for table in beside])
                place += batch.num_rows
            assert all(table.num_rows == place for table in beside), "tables of a chunk differ in rows"

    def _group(self, name: str, source: Source, group: parquet_files.Group) -> ibis.Table:
        """Raw Parquet files of one schema, with the place of each row, each column as declared."""
        listed = ", ".join(map(_quoted, group.names))
        scan = f"read_parquet([{listed}], union_by_name = false, hive_partitioning = false)"
        # DuckDB gives names that differ by case alone other ones: by their places the columns are found.
        found = self._present(scan)
        assert len(found) == len(group.schema.names), "DuckDB and Arrow see other columns"
        chosen = {column: identifier(found[group.schema.names.index(column)]) for column in group.columns}
        for column in (*group.of_path, *group.doubled):
            texts = [parquet_files.path_value(file, column) for file in group.names]
            chosen[column if column in group.of_path else parquet_files.PATH + column] = _by_file(
                ["NULL" if text is None else _quoted(text) for text in texts], "VARCHAR"
            )
        if source.file_column:
            chosen[source.file_column] = _by_file(list(map(_quoted, group.names)), "VARCHAR")
        numbers = [number for number, _ in group.files]
        plain = numbers == list(range(len(numbers)))
        file = "file_index::BIGINT" if plain else _by_file(list(map(str, numbers)), "BIGINT")
        chosen |= {ROW: f"({file} << {FILE_SHIFT}) + file_row_number", PART: "0::BIGINT"}
        chosen |= {FILE: file, PLACE: "file_row_number"}
        listed = ", ".join(f"{value} AS {identifier(column)}" for column, value in chosen.items())
        table = self.backend.sql(f"SELECT {listed} FROM {scan}", dialect="duckdb")
        return self._typed(name, source, group, table)

    def _typed(self, name: str, source: Source, group: parquet_files.Group, table: ibis.Table) -> ibis.Table:
        typed = parquet_files.typed(name, source, group, table)
        if parquet_files.needs_look(source, group, table):
            bad = typed.filter(typed[values.BAD].notnull()).order_by(ROW).limit(1).select(values.BAD, ROW)
            for row in self.fetch(bad).to_pylist():
                file = dict(group.files)[row[ROW] >> FILE_SHIFT]
                raise parquet_files.misfit(name, source, file, row[ROW] % (1 << FILE_SHIFT), row[values.BAD])
        return typed.drop(values.BAD)

    def _rows(
        self, name: str, source: Source, files: list[str], origins: list[str], optional: frozenset[str]
    ) -> ibis.Table:
        """The Parquet files, with the place of each row; ``origins`` are the raw files they come from."""
        listed = ", ".join(map(_quoted, files))
        scan = f"read_parquet([{listed}], union_by_name = true)"
        present = self._present(scan)
        wanted = declared_columns(name, source, present, origins[0], optional)
        columns = [identifier(column) for column in wanted]
        if source.file_column:
            cases = " ".join(f"WHEN {number} THEN {_quoted(file)}" for number, file in enumerate(origins))
            columns.append(f"CASE file_index {cases} END AS {identifier(source.file_column)}")
        place = f"(file_index::BIGINT << {FILE_SHIFT}) + file_row_number"
        columns += [f"{place} AS {ROW}", f"0::BIGINT AS {PART}"]
        columns += [f"file_index::BIGINT AS {FILE}", f"file_row_number AS {PLACE}"]
        table = self.backend.sql(f"SELECT {', '.join(columns)} FROM {scan}", dialect="duckdb")
        return table.mutate(**values.nulls(source.columns, wanted))

    def _present(self, scan: str) -> list[str]:
        try:
            return list(self.backend.sql(f"SELECT * FROM {scan}", dialect="duckdb").columns)
        except duckdb.Error as error:
            raise UserError(f"a Parquet file cannot be read: {one_line(error, 300)}") from error

    def _copy(self, name: str, source: Source, file: TextFile, number: int, optional: frozenset[str]) -> str:
        """A text file as Parquet, rows in the file's order: later steps read single columns of it many times."""
        path = self.work / "raw" / name / f"{number:05}.parquet"
        skipped = path.with_suffix(".json")  # the number of bad rows, and the first
        if not path.exists():
            unfinished = _made(path.parent) / f".{path.name}.unfinished"
            found = self._copied(name, source, file, optional, unfinished)
            write_text(skipped, json.dumps(found))
            publish(unfinished, path)
        self.inputs[name].leave_out(*json.loads(skipped.read_text()))
        return str(path)

    def _copied(
        self, name: str, source: Source, file: TextFile, optional: frozenset[str], path: Path
    ) -> tuple[int, str | None]:
        """Makes the copy. Returns the number of bad rows that were skipped, and the first."""
        names = csv_lines.columns(name, file, source, optional) if source.format == "csv" else []
        chosen = declared_columns(name, source, names, f"'{file.name}'", optional) if names else []
        skipped = bad_rows.Skipped()
        try:
            try:
                self._execute_copy(source, self._text(name, source, file, skipped), names, chosen, path)
            except duckdb.Error as error:
                if _line(error) or not text_files.has_mixed_line_ends(name, file):
                    raise
                self._drop_rejects()
                skipped = bad_rows.Skipped()
                text = self._text(name, source, file, skipped, line_feeds=True)
                self._execute_copy(source, text, names, chosen, path)
        except duckdb.Error as error:
            raise self._bad_file(name, source, file, names, error) from error
        self._check_values(name, source, file, names, path, skipped)
        if source.format == "json":
            if source.bad_rows == "error":  # good_lines leaves such lines out
                self._check_nulls(name, source, file, path)
            self._check_keys(name, source, file, path, optional)
        elif source.bad_rows == "skip":
            self._count_rejects(name, source, file, names, skipped)
        return skipped.rows, skipped.first

    def _text(
        self, name: str, source: Source, file: TextFile, skipped: "bad_rows.Skipped", *, line_feeds: bool = False
    ) -> AbstractContextManager[str]:
        """A path that the engine can read the text from."""
        if source.format == "json" and source.bad_rows == "skip":
            return pipes.pipe(bad_rows.good_lines(name, source, file, skipped), self._spill)
        text = bad_rows.check_zeros(name, file, text_files.chunks(name, file, line_feeds=line_feeds))
        if file.is_plain and not line_feeds:
            return pipes.beside(text, file.name)
        return pipes.pipe(text, self._spill)

    def _execute_copy(
        self, source: Source, text: AbstractContextManager[str], names: list[str], chosen: list[str], path: Path
    ) -> None:
        with text as place:
            scan = _csv_scan(source, place, names, chosen) if source.format == "csv" else _json_scan(source, place)
            columns = {column: source.columns[column] for column in (chosen or source.columns)}
            self.backend.con.execute(
                f"COPY ({_typed_text(scan, columns)}) TO {_quoted(str(path))} "
                "(FORMAT parquet, COMPRESSION snappy, DICTIONARY_SIZE_LIMIT 20000)"
            )

    def _check_values(
        self, name: str, source: Source, file: TextFile, names: list[str], path: Path, skipped: "bad_rows.Skipped"
    ) -> None:
        """Raises ``UserError`` for a value that its declared type does not hold, or leaves such rows out."""
        copy, bad = f"read_parquet({_quoted(str(path))})", identifier(values.BAD)
        first = self.backend.con.execute(
            f"SELECT file_row_number, {bad} FROM {copy} WHERE {bad} IS NOT NULL ORDER BY 1 LIMIT 1"
        ).fetchone()
        if first is None:
            return
        hint = bad_rows.Hint(first[0] + 1 + (source.format == "csv" and source.header))
        if source.format == "csv" and source.quote:
            hint = bad_rows.Hint()  # rows may go over several lines, so that a row's number is not its line's
        error = bad_rows.explain(name, source, file, names, hint) or UserError(
            f"sources.{name}: '{file.name}', row {first[0] + 1:,}: {values.misfit(name, source.columns, first[1])}"
        )
        if source.bad_rows == "error":
            raise error
        (rows,) = self.backend.con.execute(f"SELECT count({bad}) FROM {copy}").fetchone()
        good = path.with_name(f"{path.name}.good")
        self.backend.con.execute(
            f"COPY (SELECT * FROM {copy} WHERE {bad} IS NULL) TO {_quoted(str(good))} (FORMAT parquet, COMPRESSION snappy)"
        )
        os.replace(good, path)
        skipped.add(rows, bad_rows.without_remedy(error, name))

    def _check_keys(self, name: str, source: Source, file: TextFile, path: Path, optional: frozenset[str]) -> None:
        """Raises ``UserError`` for a declared column that the file has nowhere."""
        columns = [column for column in source.columns if column not in optional]
        counts = ", ".join(f"count({identifier(column)})" for column in columns)
        query = f"SELECT count(*), {counts} FROM read_parquet({_quoted(str(path))})"
        rows, *found = self.backend.con.execute(query).fetchone()
        absent = [column for column, count in zip(columns, found) if not count]
        if rows and absent:
            json_keys.check(name, file, absent)

    def _check_nulls(self, name: str, source: Source, file: TextFile, path: Path) -> None:
        """A line that is null alone is no object, but DuckDB makes a row of it. Raises ``UserError``."""
        empty = " AND ".join(f"{identifier(column)} IS NULL" for column in source.columns)
        query = f"SELECT count(*) FROM read_parquet({_quoted(str(path))}) WHERE {empty}"
        if not self.backend.con.execute(query).fetchone()[0]:
            return
        for number, line in enumerate(text_files.lines(name, file), 1):
            if line.strip() == b"null":
                raise bad_rows.explain(name, source, file, [], bad_rows.Hint(number))

    def _count_rejects(
        self, name: str, source: Source, file: TextFile, names: list[str], skipped: "bad_rows.Skipped"
    ) -> None:
        """Counts what DuckDB left out. Raises ``UserError`` where an open quote took the rows behind it along."""
        rows, first = self.backend.con.execute(f"SELECT count(DISTINCT line), min(line) FROM {_REJECTS}").fetchone()
        swallowed = self.backend.con.execute(
            f"SELECT min(line) FROM {_REJECTS} WHERE error_type = 'UNQUOTED VALUE' AND contains(csv_line, chr(10))"
        ).fetchone()[0]
        self._drop_rejects()
        if rows:
            found = bad_rows.explain(name, source, file, names, bad_rows.Hint(swallowed or first))
            if swallowed:
                raise found or UserError(f"sources.{name}: '{file.name}', line {swallowed:,}: a quote is not closed")
            skipped.add(rows, bad_rows.without_remedy(found, name) or f"'{file.name}', line {first:,}")

    def _drop_rejects(self) -> None:
        for table in (_REJECTS, _REJECTS_SCANS):
            self.backend.con.execute(f"DROP TABLE IF EXISTS {table}")

    def _bad_file(self, name: str, source: Source, file: TextFile, names: list[str], error: duckdb.Error) -> Exception:
        """One line for a file that is not as declared; other errors as they are."""
        if not isinstance(
            error, (duckdb.InvalidInputException, duckdb.ConversionException, duckdb.OutOfRangeException)
        ):
            return error
        value = re.search(r"Could not convert string \"(.*?)\" to '", str(error), re.DOTALL)
        hint = bad_rows.Hint(_line(error), value.group(1) if value else None)
        return bad_rows.explain(name, source, file, names, hint) or UserError(
            f"sources.{name}: '{file.name}'{f', line {hint.line:,}' if hint.line else ''}: cannot be read as it is declared: "
            f"check sources.{name}.format, .separator, .quote, .escape and .columns ({self.store_error(error)})"
        )


def _load_httpfs(connection: duckdb.DuckDBPyConnection) -> None:
    try:
        connection.execute("INSTALL httpfs; LOAD httpfs")
    except duckdb.Error as error:
        raise UserError(
            "input= is an address, for which DuckDB needs its extension httpfs, and that cannot be loaded "
            f"({one_line(error, 120)}): copy the files to this machine"
        ) from None


def _ordered(table: ibis.Table, names: list[str], keys: list[str]) -> ibis.Table:
    """The table's columns of those named. One at least, so that its rows can be counted."""
    found = [name for name in names if name in table.columns] or [keys[0]]
    return table.order_by([table[key] for key in keys]).select(found)


def _by_file(values_by_index: list[str], kind: str) -> str:
    """SQL of a value that depends on the file alone."""
    cases = " ".join(f"WHEN {index} THEN {value}" for index, value in enumerate(values_by_index))
    return f"CAST(CASE file_index {cases} END AS {kind})"


def _side_by_side(first: pa.RecordBatch, others: list[pa.Table]) -> pa.RecordBatch:
    columns = dict(zip(first.schema.names, first.columns))
    for table in others:
        columns |= {name: table.column(name).combine_chunks() for name in table.column_names}
    return pa.RecordBatch.from_pydict(columns)


_REJECTS, _REJECTS_SCANS = "__rejects", "__rejects_scans"


def _csv_scan(source: Source, place: str, names: list[str], chosen: list[str]) -> str:
    """Columns have names of ours inside, as those of a file may differ by case alone or be there twice."""
    inside = {name: f"c{number}" for number, name in enumerate(names)}
    options = {
        "columns": _struct(dict.fromkeys((f"c{number}" for number in range(len(names))), "VARCHAR")),
        "auto_detect": "false",
        "header": str(source.header).lower(),
        "delim": _quoted(source.separator),
        "quote": _quoted(source.quote),
        "escape": _quoted(source.escape or source.quote),
        "nullstr": "[" + ", ".join(map(_quoted, ["", *source.null_values])) + "]",
        "compression": "'none'",
    }
    if source.bad_rows == "skip":
        options |= {"store_rejects": "true", "rejects_limit": "0"}
        options |= {"rejects_table": _quoted(_REJECTS), "rejects_scan": _quoted(_REJECTS_SCANS)}
    columns = ", ".join(
        f"CAST({inside[name]} AS {_raw_type(source.columns[name])}) AS {identifier(name)}" for name in chosen
    )
    return f"SELECT {columns} FROM read_csv({_quoted(place)}, {', '.join(f'{k} = {v}' for k, v in options.items())})"


def _json_scan(source: Source, place: str) -> str:
    columns = _struct({column: _raw_type(kind) for column, kind in source.columns.items()})
    options = f"format = 'newline_delimited', compression = 'uncompressed', columns = {columns}"
    return f"SELECT * FROM read_json({_quoted(place)}, {options})"


def _raw_type(kind: str) -> str:
    return "VARCHAR[]" if kind.startswith("list<") else "VARCHAR"


def _typed_text(scan: str, columns: dict[str, str]) -> str:
    """SQL of a scan's texts as their declared types."""
    raw = ibis.table({column: values.raw_type(kind) for column, kind in columns.items()}, name="__raw")
    return f"WITH __raw AS ({scan}) {ibis.to_sql(values.typed(raw, columns), dialect='duckdb')}"


def _line(error: duckdb.Error) -> int | None:
    found = re.search(r"(?:CSV Error on Line|in line|Line): ?(\d+)", str(error)) or re.search(
        r"in line (\d+)", str(error)
    )
    return int(found.group(1)) if found else None


def _struct(columns: dict[str, str]) -> str:
    return "{" + ", ".join(f"{_quoted(name)}: {_quoted(kind)}" for name, kind in columns.items()) + "}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
