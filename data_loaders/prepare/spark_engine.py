"""PySpark: a cluster, or this machine. Needs Java 17 and the package pyspark.

Files, the work folder and the output must lie where all executors reach them by the same path. A session that exists
already (spark-submit, a notebook) is used as it is; otherwise one is started on this machine.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ibis
import pyarrow as pa
from py4j.protocol import Py4JJavaError
from pyspark import TaskContext, cloudpickle
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

import data_loaders
from data_loaders.errors import UserError
from data_loaders.prepare import (
    bad_rows,
    csv_lines,
    engine_errors,
    json_keys,
    parquet_files,
    spark_text,
    text_files,
    values,
    writer,
)
from data_loaders.prepare.declaration import Source
from data_loaders.prepare.engine import FILE_SHIFT, PART, ROW, Engine, EngineError, Shuffle, declared_columns
from data_loaders.prepare.text_files import TextFile
from data_loaders.state_files import sync_below, write_text

_SETTINGS = {
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.timestampType": "TIMESTAMP_NTZ",
    "spark.sql.ansi.enabled": "true",  # what does not fit is an error, not a null or another number
    "spark.sql.caseSensitive": "true",
    "spark.sql.legacy.parquet.nanosAsLong": "true",
    "spark.log.level": "FATAL",
}
_ERRORS = (PySparkException, Py4JJavaError)
_FIXED = tuple(key for key in _SETTINGS if key.startswith("spark.sql."))


class SparkEngine(Engine):
    name = "spark"
    chunk_bytes = None
    joins_at_once = None

    def __init__(self, work: Path, memory: int, threads: int, options: dict[str, str]) -> None:
        super().__init__(work)
        for option in options:
            _check_option(option)
        self.session, self._started = _session(memory, threads, options)
        self.backend = ibis.pyspark.connect(self.session)

    def confine(self, reads: list[str]) -> None:
        """Nothing: Spark has no such bounds. What keeps a recipe within them is that its expressions name no file, and
        that the program itself opens its sources alone."""

    def read(
        self,
        name: str,
        source: Source,
        root: str,
        optional: frozenset[str] = frozenset(),
        needed: frozenset[str] | None = None,
    ) -> ibis.Table:
        if source.format != "parquet":
            return self._text(name, source, self.text_files(name, source, root), optional)
        files = self.raw_files(name, source, root)
        try:
            parts = parquet_files.groups(name, source, files, root, optional, needed)
            table = parquet_files.united(name, source, parts, [self._group(name, source, group) for group in parts])
            return self._placed(source, self._frame(table), files, files)
        except _ERRORS as error:
            raise UserError(f"sources.{name}: a Parquet file cannot be read ({self.store_error(error)})") from error

    def store(self, table: ibis.Table, name: str) -> ibis.Table:
        try:
            return self._table(self._stored(name, lambda: self._frame(table)))
        except _ERRORS as error:
            raise self.explain(error) from error

    def write(
        self,
        chunks: Iterable[list[ibis.Table]],
        folder: Path,
        schema: pa.Schema,
        keys: list[str],
        by: str | None = None,
        shuffle: Shuffle | None = None,
    ) -> int:
        ((table,),) = chunks
        names = [*schema.names, *([by] if by else [])]
        keys = [*([shuffle.key] if shuffle else []), *keys]
        frame = self._frame(table).select(*dict.fromkeys([*keys, *names])).repartitionByRange(*keys)
        part_writer = _part_writer(str(folder), None, schema.serialize().to_pybytes(), by, shuffled=shuffle is not None)
        return self._write(frame, keys, names, part_writer)

    def write_file(self, table: ibis.Table, path: Path, schema: pa.Schema, keys: list[str]) -> int:
        frame = self._frame(table).select(*dict.fromkeys([*keys, *schema.names])).repartition(1)
        part_writer = _part_writer(str(path.parent), path.name, schema.serialize().to_pybytes(), None)
        rows = self._write(frame, keys, schema.names, part_writer)
        # A partition without rows is not even opened.
        return rows if rows else writer.write_file([], path, schema)

    def explain(self, error: Exception) -> Exception | None:
        if not isinstance(error, _ERRORS):
            return None
        raised = re.search(r"UserError: (.*?)(?: SQLSTATE: |$)", str(error), re.MULTILINE)  # ours, in an executor
        known = raised.group(1) if raised else engine_errors.explanation(error)
        if known:
            return UserError(known)
        return EngineError(
            f"Spark could not finish: run the same command again, which resumes ({self.store_error(error)})"
        )

    def close(self) -> None:
        if self._started:
            self.session.stop()

    def _write(self, frame: Any, keys: list[str], names: list[str], part_writer: Any) -> int:
        """Each partition, sorted, to files of its own."""
        ordered = frame.sortWithinPartitions(*keys).select(*names)
        return sum(row.rows for row in ordered.mapInArrow(part_writer, "rows bigint").collect())

    def _frame(self, table: ibis.Table) -> Any:
        self.backend._run_pre_execute_hooks(table)  # in-memory tables of the expression become views
        return self.session.sql(self.backend.compile(table))

    def _table(self, frame: Any) -> ibis.Table:
        self._views += 1
        name = f"stored_{id(self)}_{self._views}"
        frame.createOrReplaceTempView(name)
        return self.backend.table(name)

    def _stored(self, name: str, make: Any) -> Any:
        """The data frame that ``make`` returns, kept as Parquet; Spark's own marker says that it is whole."""
        path = self.work / name
        if not (path / "_SUCCESS").exists():
            shutil.rmtree(path, ignore_errors=True)
            make().write.parquet(str(path))
            sync_below(path)
        return self.session.read.parquet(str(path))

    def _group(self, name: str, source: Source, group: parquet_files.Group) -> ibis.Table:
        """Raw Parquet files of one schema, each column as declared, with ``__file`` and ``__place``."""
        frame = self.session.read.option("mergeSchema", "false").parquet(*group.names)
        chosen = [_moments(group, column, dict(frame.dtypes)).alias(column) for column in group.columns]
        place = F.col("_metadata.row_index").alias("__place")
        frame = frame.select(*chosen, F.col("_metadata.file_path").alias("__file"), place)
        given = (*group.of_path, *group.doubled)
        if given:
            known = [
                (uri, True, *(parquet_files.path_value(file, column) for column in given))
                for file in group.names
                for uri in _uris(file)
            ]
            names = [column if column in group.of_path else parquet_files.PATH + column for column in given]
            schema = ", ".join(
                ("__file string, __known boolean", *(f"{spark_text.identifier(column)} string" for column in names))
            )
            frame = frame.join(F.broadcast(self.session.createDataFrame(known, schema)), "__file", "left")
            file = F.when(F.col("__known"), F.col("__file")).otherwise(_unknown_file())
            frame = frame.withColumn("__file", file).drop("__known")
        return self._typed(name, source, group, self._table(frame))

    def _typed(self, name: str, source: Source, group: parquet_files.Group, table: ibis.Table) -> ibis.Table:
        typed = parquet_files.typed(name, source, group, table)
        if parquet_files.needs_look(source, group, table):
            frame = self._frame(typed.filter(typed[values.BAD].notnull()))
            for row in frame.select(values.BAD, "__file", "__place").orderBy("__file", "__place").limit(1).collect():
                file = next(file for file in group.names if row["__file"] in _uris(file))
                raise parquet_files.misfit(name, source, file, row["__place"], row[values.BAD])
        return typed.drop(values.BAD)

    def _text(self, name: str, source: Source, files: list[TextFile], optional: frozenset[str]) -> ibis.Table:
        names = self._columns(name, source, files, optional) if source.format == "csv" else list(source.columns)
        paths = [self._readable(name, file, number) for number, file in enumerate(files)]
        path = self.work / "raw" / name
        counts = path.with_suffix(".json")  # written last: the rows are whole, and checked
        if not counts.exists():
            shutil.rmtree(path, ignore_errors=True)
            found = self._store_text(name, source, files, paths, names, path)
            if source.format == "json":
                self._check_keys(name, source, files, paths, optional)
            sync_below(path)
            write_text(counts, json.dumps(found))
        shutil.rmtree(self.work / "text" / name, ignore_errors=True)
        self.inputs[name].leave_out(*json.loads(counts.read_text()))
        return self._numbered(source, self.session.read.parquet(str(path)), paths, [file.name for file in files])

    def _columns(self, name: str, source: Source, files: list[TextFile], optional: frozenset[str]) -> list[str]:
        names = csv_lines.columns(name, files[0], source, optional)
        declared_columns(name, source, names, f"'{files[0].name}'", optional)
        for file in files[1:]:
            if csv_lines.columns(name, file, source, optional) != names:
                raise UserError(
                    f"sources.{name}: '{files[0].name}' and '{file.name}' have different columns, or another order of them, "
                    "which engine=spark does not read as one: make two sources of them, or take engine=duckdb"
                )
        return names

    def _readable(self, name: str, file: TextFile, number: int) -> str:
        """A path that Spark can read as it is: that of the file, or of its text written anew."""
        if spark_text.reads_itself(file):
            return file.name
        path = self.work / "text" / name / f"{number:05}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as target:
            target.writelines(text_files.chunks(name, file))
        return str(path)

    def _store_text(
        self, name: str, source: Source, files: list[TextFile], paths: list[str], names: list[str], path: Path
    ) -> tuple[int, str | None]:
        """Makes the copy. Returns the number of bad rows that were skipped, and the first."""
        has_header = source.format == "csv" and source.header
        headers = sorted({csv_lines.first_line(name, file) for file in files}) if has_header else []
        lines = spark_text.Lines(self.session, source, names, headers, self._converter(source))
        try:
            lines.frame(paths).write.parquet(str(path))
        except _ERRORS as error:
            raise self._bad_files(name, source, files, names, error) from error
        seen = lines.seen()
        if seen["zero"]:
            raise bad_rows.zeros(name, _behind(seen["zero"], files, paths).name)
        if has_header and seen["headers"] > len(files):
            raise UserError(f"sources.{name}: the header of a file is there again among its rows: remove it there")
        return self._bad_rows(name, source, files, paths, names, seen) if seen["bad"] else (0, None)

    def _converter(self, source: Source) -> Callable[[Any, list[str]], Any]:
        def convert(frame: Any, names: list[str]) -> Any:
            table = self._table(frame)
            declared = {name: source.columns[name] for name in names}
            rest = [column for column in table.columns if column not in declared]
            return self._frame(values.typed(table, declared, rest).mutate(**values.nulls(source.columns, names)))

        return convert

    def _check_keys(
        self, name: str, source: Source, files: list[TextFile], paths: list[str], optional: frozenset[str]
    ) -> None:
        """Raises ``UserError`` for a declared column of JSON that a file has nowhere."""
        columns = [column for column in source.columns if column not in optional]
        counts = [
            F.count(F.col(spark_text.identifier(column))).alias(f"c{number}") for number, column in enumerate(columns)
        ]
        stored = self.session.read.parquet(str(self.work / "raw" / name))
        for row in stored.groupBy("__file").agg(*counts).orderBy("__file").collect():
            absent = [column for number, column in enumerate(columns) if not row[f"c{number}"]]
            if absent:
                json_keys.check(name, _behind(row["__file"], files, paths), absent)

    def _bad_rows(
        self,
        name: str,
        source: Source,
        files: list[TextFile],
        paths: list[str],
        names: list[str],
        seen: dict[str, Any],
    ) -> tuple[int, str]:
        """Raises ``UserError``, or returns how many were skipped, and the first."""
        uri, _, _, line = seen["first"].split("\n", 3)
        file = _behind(uri, files, paths)
        hint = bad_rows.Hint(bad_rows.find(name, file, line))
        found = bad_rows.explain(name, source, file, names, hint) or UserError(
            f"sources.{name}: '{file.name}': engine=spark cannot read the row {line[:60]!r} (where a quoted field goes over "
            f"several lines, engine=duckdb can); {bad_rows.remedy(name)}"
        )
        if source.bad_rows == "error":
            raise found
        first = bad_rows.without_remedy(found, name)
        if not seen["good"]:
            raise bad_rows.no_good(name, seen["bad"], first)
        return seen["bad"], first

    def _bad_files(
        self, name: str, source: Source, files: list[TextFile], names: list[str], error: Exception
    ) -> Exception:
        """What is wrong with the first file that cannot be read."""
        for file in files:
            found = bad_rows.explain(name, source, file, names, bad_rows.Hint())
            if found is not None:
                return found
        return EngineError(f"sources.{name}: Spark could not read the files; {self.store_error(error)}")

    def _numbered(self, source: Source, stored: Any, paths: list[str], files: list[str]) -> ibis.Table:
        """Places in the file, from ids that grow within each block of a file: a block's first row comes after all rows of
        the file's earlier blocks."""
        blocks = stored.groupBy("__file", "__block").agg(
            F.min("__place").alias("__first"), F.count(F.lit(1)).alias("__rows")
        )
        counted = sorted(blocks.collect(), key=lambda block: (block["__file"], block["__block"]))
        offsets, before = [], {}
        for block in counted:
            start = before.get(block["__file"], 0)
            offsets.append((block["__file"], block["__block"], start - block["__first"]))
            before[block["__file"]] = start + block["__rows"]
        if not offsets:
            return self._placed(source, stored.drop("__block"), paths, files)
        known = self.session.createDataFrame(offsets, "`__file` string, `__block` bigint, `__offset` bigint")
        frame = stored.join(F.broadcast(known), ["__file", "__block"])
        place = (F.col("__place") + F.col("__offset")).alias("__place")
        return self._placed(
            source, frame.select(*map(spark_text.identifier, source.columns), "__file", place), paths, files
        )

    def _placed(self, source: Source, frame: Any, paths: list[str], files: list[str]) -> ibis.Table:
        """``__row`` from the file (``__file``, one of ``paths``, which stand for ``files``) and the place in it (``__place``)."""
        named = enumerate(zip(paths, files))
        uris = [(uri, file, number) for number, (path, file) in named for uri in _uris(path)]
        known = self.session.createDataFrame(uris, "`__file` string, `__origin` string, `__number` bigint")
        frame = frame.join(F.broadcast(known), "__file", "left")
        number = F.coalesce("__number", _unknown_file().cast("bigint"))
        row = (F.shiftleft(number, FILE_SHIFT) + F.col("__place")).alias(ROW)
        columns = [spark_text.identifier(column) for column in frame.columns if not column.startswith("__")]
        origin = [F.col("__origin").alias(source.file_column)] if source.file_column else []
        return self._table(frame.select(*columns, *origin, row, F.lit(0).cast("bigint").alias(PART)))


def _session(memory: int, threads: int, options: dict[str, str]) -> tuple[Any, bool]:
    active = SparkSession.getActiveSession()
    builder = SparkSession.builder
    if active is None and "spark.master" not in options:
        builder = builder.master(f"local[{threads}]")
    settings = {**_SETTINGS, "spark.driver.memory": f"{max(memory // 2**20, 512)}m", **options}
    for key, value in settings.items():
        builder = builder.config(key, value)
    try:
        session = builder.getOrCreate()
        if active is None and session.sparkContext.master.startswith("local"):
            session.sparkContext.pythonExec = sys.executable  # for workers; else the environment alone says it
        return session, active is None
    except Exception as error:
        if "JAVA" in str(error).upper():
            raise UserError(
                "engine=spark needs Java 17 or newer (Debian: apt install openjdk-17-jre-headless)"
            ) from error
        raise


def _check_option(option: str) -> None:
    if not option.startswith("spark."):
        raise UserError(
            f"engine_options.{option}: a setting of Spark's begins with spark., such as spark.executor.memory"
        )
    if option in _FIXED:
        raise UserError(f"engine_options.{option}: the results rest on it ({_SETTINGS[option]}), so it stays as it is")


def _moments(group: parquet_files.Group, column: str, kinds: dict[str, str]) -> Any:
    """A column; times in UTC, and those of nanoseconds, which Spark reads as numbers, as times."""
    kind, value = group.schema.field(column).type, F.col(spark_text.identifier(column))
    if pa.types.is_timestamp(kind) and kind.unit == "ns" and kinds[column] == "bigint":
        return F.timestamp_micros(F.expr(f"{spark_text.identifier(column)} div 1000")).cast("timestamp_ntz")
    return value.cast("timestamp_ntz") if pa.types.is_timestamp(kind) else value


def _part_writer(folder: str, name: str | None, schema: bytes, by: str | None, shuffled: bool = False) -> Any:
    """A function for ``mapInArrow``: each partition writes files of its own, or the one file ``name``. Partitions are
    numbered in the rows' order."""
    cloudpickle.register_pickle_by_value(data_loaders)  # executors need pyarrow, but not us

    def write_partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        number = TaskContext.get().partitionId()
        wanted = pa.ipc.read_schema(pa.py_buffer(schema))
        if name is None:
            rows = writer.write_parts(
                batches, Path(folder), wanted, first=f"part-{number:05}", by=by, shuffled=shuffled
            )
        else:
            rows = writer.write_file(batches, Path(folder) / name, wanted)
        yield pa.record_batch([pa.array([rows], pa.int64())], names=["rows"])

    return write_partition


def _behind(uri: str, files: list[TextFile], paths: list[str]) -> TextFile:
    return next(file for file, path in zip(files, paths) if uri in _uris(path))


def _unknown_file() -> Any:
    """An error, in a column's place, for a row whose ``__file`` is none of ours: it would be lost, or have no place."""
    message = "UserError: engine=spark spells a file's name in a way of its own: rename it, or take engine=duckdb: "
    return F.raise_error(F.concat(F.lit(message), F.col("__file"))).cast("string")


_PLAIN_IN_URIS = "/_-!.~'()*,;:$&+=@"


def _uris(file: str) -> list[str]:
    """How Spark may spell a file's name."""
    if "://" in file:
        return [file, file.replace("s3://", "s3a://", 1)] if file.startswith("s3://") else [file]
    # Java leaves "=" of day=1 as it is, and characters beyond ASCII; the form differs between Spark's readers.
    java = "".join(quote(c, safe=_PLAIN_IN_URIS) if c.isascii() else c for c in file)
    spelled = dict.fromkeys((quote(file), quote(file, safe=_PLAIN_IN_URIS), java))
    return [prefix + path for path in spelled for prefix in ("file:", "file://")]
