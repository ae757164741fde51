"""PySpark: a cluster, or this machine. Needs Java 17 and the package pyspark.

Files, the work folder and the output must lie where all executors reach them by the same path. A session that exists
already (spark-submit, a notebook) is used as it is; otherwise one is started on this machine.
"""

import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ibis
import pyarrow as pa

from data_loaders.prepare import csv_header, writer
from data_loaders.prepare.declaration import Source
from data_loaders.prepare.engine import FILE_SHIFT, PART, ROW, Engine, EngineError, declared_columns, raw_files

_TYPES = {
    "int8": "tinyint",
    "int16": "smallint",
    "int32": "int",
    "int64": "bigint",
    "float32": "float",
    "float64": "double",
    "string": "string",
    "boolean": "boolean",
    "date": "date",
    "timestamp": "timestamp_ntz",
    "list<int64>": "array<bigint>",
    "list<float64>": "array<double>",
    "list<string>": "array<string>",
}
_SETTINGS = {
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.timestampType": "TIMESTAMP_NTZ",
    "spark.sql.ansi.enabled": "true",  # what does not fit is an error, not a null or another number
    "spark.sql.caseSensitive": "true",
    "spark.log.level": "ERROR",
}


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

    def read(self, name: str, source: Source, root: str, optional: frozenset[str] = frozenset()) -> ibis.Table:
        files = raw_files(name, source, root)
        try:
            if source.format == "parquet":
                return self._placed(source, self._parquet(name, source, files, optional), files)
            stored = self._stored(f"raw/{name}", lambda: self._text(name, source, files, optional))
            return self._numbered(source, stored, files)
        except _spark_errors() as error:
            raise ValueError(f"sources.{name}: {_first_line(error)}") from error

    def store(self, table: ibis.Table, name: str) -> ibis.Table:
        try:
            return self._table(self._stored(name, lambda: self._frame(table)))
        except _spark_errors() as error:
            raise _mismatch(error) from error

    def write(
        self,
        chunks: Iterable[list[ibis.Table]],
        folder: Path,
        schema: pa.Schema,
        keys: list[str],
        by: str | None = None,
    ) -> int:
        ((table,),) = chunks
        names = [*schema.names, *([by] if by else [])]
        frame = self._frame(table).select(*dict.fromkeys([*keys, *names])).repartitionByRange(*keys)
        return self._write(frame, keys, names, _part_writer(str(folder), None, schema.serialize().to_pybytes(), by))

    def write_file(self, table: ibis.Table, path: Path, schema: pa.Schema, keys: list[str]) -> int:
        frame = self._frame(table).select(*dict.fromkeys([*keys, *schema.names])).repartition(1)
        part_writer = _part_writer(str(path.parent), path.name, schema.serialize().to_pybytes(), None)
        rows = self._write(frame, keys, schema.names, part_writer)
        # A partition without rows is not even opened.
        return rows if rows else writer.write_file([], path, schema)

    def explain(self, error: Exception) -> Exception | None:
        if not isinstance(error, _spark_errors()):
            return None
        made = _mismatch(error)
        return made if made is not error else EngineError(_first_line(error))

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
        return self.session.read.parquet(str(path))

    def _parquet(self, name: str, source: Source, files: list[str], optional: frozenset[str]) -> Any:
        from pyspark.sql import functions as F

        frame = self.session.read.option("mergeSchema", "true").parquet(*files)
        columns = [
            F.col(column).cast(_TYPES[source.columns[column]]).alias(column)
            if column in source.columns
            else F.col(column)
            for column in declared_columns(name, source, frame.columns, files[0], optional)
        ]
        columns += _absent(source, frame.columns)
        place = F.col("_metadata.row_index").alias("__place")
        return frame.select(*columns, F.col("_metadata.file_path").alias("__file"), place)

    def _text(self, name: str, source: Source, files: list[str], optional: frozenset[str]) -> Any:
        from pyspark.sql import functions as F

        if source.format == "json":
            schema = ", ".join(f"`{column}` {_TYPES[kind]}" for column, kind in source.columns.items())
            frame = self.session.read.option("mode", "FAILFAST").schema(schema).json(files)
            columns = [F.col(column) for column in source.columns]
        else:
            frame = self._csv(name, source, files, optional)
            marks = ["", *source.null_values]
            # Read as text and cast here, so that the marks of missing values hold for columns of every type.
            columns = [
                F.when(F.col(column).isin(marks), None).otherwise(F.col(column)).cast(_TYPES[kind]).alias(column)
                if source.null_values or kind != "string"
                else F.col(column)
                for column, kind in source.columns.items()
                if column in frame.columns
            ]
            columns += _absent(source, frame.columns)
        return frame.select(
            *columns,
            F.col("_metadata.file_path").alias("__file"),
            F.col("_metadata.file_block_start").alias("__block"),
            F.monotonically_increasing_id().alias("__place"),
        )

    def _csv(self, name: str, source: Source, files: list[str], optional: frozenset[str]) -> Any:
        names = csv_header.columns(name, files[0], source, optional)
        declared_columns(name, source, names, f"'{files[0]}'", optional)
        for file in files[1:]:
            if csv_header.columns(name, file, source, optional) != names:
                raise ValueError(f"sources.{name}: {files[0]} and {file} have different columns")
        options = {
            "sep": source.separator,
            "header": str(source.header).lower(),
            "quote": source.quote or "\0",
            "escape": source.quote or "\0",
            "encoding": "iso-8859-1" if source.encoding == "latin-1" else source.encoding,
            "mode": "FAILFAST",
            "enforceSchema": "true",
        }
        schema = ", ".join(f"`{column}` string" for column in names)
        return self.session.read.options(**options).schema(schema).csv(files)

    def _numbered(self, source: Source, stored: Any, files: list[str]) -> ibis.Table:
        """Places in the file, from ids that grow within each block of a file: a block's first row comes after all rows of
        the file's earlier blocks."""
        from pyspark.sql import functions as F

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
            return self._placed(source, stored.drop("__block"), files)
        known = self.session.createDataFrame(offsets, "`__file` string, `__block` bigint, `__offset` bigint")
        frame = stored.join(F.broadcast(known), ["__file", "__block"])
        place = (F.col("__place") + F.col("__offset")).alias("__place")
        return self._placed(source, frame.select(*source.columns, "__file", place), files)

    def _placed(self, source: Source, frame: Any, files: list[str]) -> ibis.Table:
        """``__row`` from the file (``__file``) and the place in it (``__place``)."""
        from pyspark.sql import functions as F

        uris = [(uri, file, number) for number, file in enumerate(files) for uri in _uris(file)]
        known = self.session.createDataFrame(uris, "`__file` string, `__origin` string, `__number` bigint")
        frame = frame.join(F.broadcast(known), "__file", "left")
        row = (F.shiftleft(F.col("__number"), FILE_SHIFT) + F.col("__place")).alias(ROW)
        columns = [column for column in frame.columns if not column.startswith("__")]
        origin = [F.col("__origin").alias(source.file_column)] if source.file_column else []
        return self._table(frame.select(*columns, *origin, row, F.lit(0).cast("bigint").alias(PART)))


def _session(memory: int, threads: int, options: dict[str, str]) -> tuple[Any, bool]:
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise ValueError(
            "engine=spark needs the package pyspark (pip install 'pyspark>=4,<4.1') and Java 17; engine=duckdb needs neither"
        ) from None
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
            session.sparkContext.pythonExec = sys.executable  # workers on this machine run the same Python
        return session, active is None
    except Exception as error:
        if "JAVA" in str(error).upper():
            raise ValueError(
                "engine=spark needs Java 17 or newer (Debian: apt install openjdk-17-jre-headless)"
            ) from error
        raise


def _check_option(option: str) -> None:
    if not option.startswith("spark."):
        raise ValueError(
            f"engine_options.{option}: a setting of Spark's begins with spark., such as spark.executor.memory"
        )
    if option in _FIXED:
        raise ValueError(f"engine_options.{option}: the results rest on it ({_SETTINGS[option]}), so it stays as it is")


def _absent(source: Source, present: list[str]) -> list[Any]:
    """Declared columns that the files lack, null."""
    from pyspark.sql import functions as F

    return [
        F.lit(None).cast(_TYPES[kind]).alias(column) for column, kind in source.columns.items() if column not in present
    ]


def _part_writer(folder: str, name: str | None, schema: bytes, by: str | None) -> Any:
    """A function for ``mapInArrow``: each partition writes files of its own, or the one file ``name``. Partitions are
    numbered in the rows' order."""

    from pyspark import cloudpickle

    cloudpickle.register_pickle_by_value(writer)  # executors need pyarrow, but not us

    def write_partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        number = TaskContext.get().partitionId()
        wanted = pa.ipc.read_schema(pa.py_buffer(schema))
        if name is None:
            rows = writer.write_parts(batches, Path(folder), wanted, first=f"part-{number:05}", by=by)
        else:
            rows = writer.write_file(batches, Path(folder) / name, wanted)
        yield pa.record_batch([pa.array([rows], pa.int64())], names=["rows"])

    return write_partition


def _spark_errors() -> tuple[type, ...]:
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    return (PySparkException, Py4JJavaError)


def _mismatch(error: Exception) -> Exception:
    """A value that does not fit its declared type, or a null of ``write_parts``, is the user's; everything else stays."""
    raised = re.search(r"ValueError: (.*)", str(error))
    if raised:
        return ValueError(raised.group(1))
    text = _first_line(error)
    return ValueError(text) if "CAST_INVALID_INPUT" in text or "MALFORMED_RECORD" in text else error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if "CAST_INVALID_INPUT" in line or "MALFORMED" in line]
    return (causes or lines or [type(error).__name__])[0][:400]


def _uris(file: str) -> list[str]:
    """How Spark may tell a file's name."""
    if "://" in file:
        return [file, file.replace("s3://", "s3a://", 1)] if file.startswith("s3://") else [file]
    return ["file:" + quote(file), "file://" + quote(file)]
