"""The Parquet files of the output: NOT NULL columns, row groups of 128 Ki rows, pages with checksums."""

import os
import queue
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 131_072
FILE_GROUPS = 32  # row groups of a file


def write_parts(batches: Iterable[pa.RecordBatch], folder: Path, schema: pa.Schema, first: str = "part") -> int:
    """Writes rows in the order they come, to ``folder/<first>-00000.parquet`` and on; no file for no rows.

    A file appears under its name only when it is whole. Returns the number of rows. Raises ``ValueError`` for a null in a
    column that ``schema`` calls not null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, number, writer = 0, 0, None
    unfinished = folder / f".{first}.unfinished"
    try:
        for count, group in enumerate(_groups(batches, schema)):
            if writer is None:
                writer = pq.ParquetWriter(unfinished, schema, compression="snappy", write_page_checksum=True)
            writer.write_table(group, row_group_size=ROW_GROUP)
            rows += group.num_rows
            if (count + 1) % FILE_GROUPS == 0:
                writer, number = _finish(writer, unfinished, folder / f"{first}-{number:05}.parquet"), number + 1
        if writer is not None:
            writer = _finish(writer, unfinished, folder / f"{first}-{number:05}.parquet")
    finally:
        if writer is not None:
            writer.close()
    return rows


def write_file(batches: Iterable[pa.RecordBatch], path: Path, schema: pa.Schema) -> int:
    """The same into one file, which is made for no rows too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    rows = 0
    with pq.ParquetWriter(unfinished, schema, compression="snappy", write_page_checksum=True) as writer:
        for group in _groups(batches, schema):
            writer.write_table(group, row_group_size=ROW_GROUP)
            rows += group.num_rows
    os.replace(unfinished, path)
    return rows


def ahead(batches: Iterable[pa.RecordBatch], depth: int = 4) -> Iterator[pa.RecordBatch]:
    """The same batches, made in a thread of their own while the caller writes earlier ones."""
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: object) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - raised again where the batches are taken
            put(error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def _finish(writer: pq.ParquetWriter, unfinished: Path, path: Path) -> None:
    writer.close()
    os.replace(unfinished, path)


def _groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of ``ROW_GROUP`` rows, the last one shorter."""
    waiting, rows = [], 0
    for batch in batches:
        waiting.append(_conform(batch, schema))
        rows += batch.num_rows
        while rows >= ROW_GROUP:
            table = pa.Table.from_batches(waiting, schema)
            yield table.slice(0, ROW_GROUP)
            rows -= ROW_GROUP
            waiting = table.slice(ROW_GROUP).to_batches() if rows else []
    if rows:
        yield pa.Table.from_batches(waiting, schema)


def _conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns = []
    for field in schema:
        column = batch.column(field.name)
        if not field.nullable and column.null_count:
            raise ValueError(
                f"column '{field.name}' has {column.null_count:,} missing value(s) and nothing that stands for them: give "
                f"the feature a fill (schema.features.{field.name}.fill=0)"
            )
        columns.append(column if column.type == field.type else column.cast(field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)
