"""The Parquet files of the output: NOT NULL columns, row groups of 128 Ki rows, pages with checksums."""

import os
import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_loaders.errors import UserError
from data_loaders.footer_checks import ROW_ORDER, shuffled_mark
from data_loaders.state_files import publish

ROW_GROUP = 131_072
FILE_GROUPS = 32  # row groups of a file


def write_parts(
    batches: Iterable[pa.RecordBatch],
    folder: Path,
    schema: pa.Schema,
    first: str = "part",
    by: str | None = None,
    shuffled: bool = False,
) -> int:
    """Writes rows in the order they come, to ``folder/<first>-00000.parquet`` and on; no file for no rows. ``by``: a string
    column that names the folder in ``folder`` that a row belongs to. ``shuffled``: files say that their rows are.

    A file appears under its name only when it is whole. Returns the number of rows. Raises ``UserError`` for a null in a
    column that ``schema`` calls not null.
    """
    written: dict[str, _Parts] = {}
    try:
        for batch in batches:
            for name, rows in _divided(batch, by):
                if name not in written:
                    written[name] = _Parts(folder / name, schema, first, shuffled)
                written[name].add(_conform(rows, schema))
        for parts in written.values():
            parts.end()
    finally:
        for parts in written.values():
            parts.close()
    return sum(parts.rows for parts in written.values())


def write_file(batches: Iterable[pa.RecordBatch], path: Path, schema: pa.Schema) -> int:
    """The same into one file, which is made for no rows too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    rows = 0
    with pq.ParquetWriter(unfinished, schema, compression="snappy", write_page_checksum=True) as writer:
        groups = _Groups(schema)
        for group in (*(g for batch in batches for g in groups.add(_conform(batch, schema))), *groups.rest()):
            writer.write_table(group, row_group_size=ROW_GROUP)
            rows += group.num_rows
    publish(unfinished, path)
    return rows


def sorted_apart(
    batches: Iterable[pa.RecordBatch], keys: list[str], bound: int, parts: int, folder: Path
) -> Iterator[pa.RecordBatch]:
    """The batches' rows sorted by ``keys``, out of core: the first key's values, evenly spread over [0, bound), divide them
    into ``parts`` files of ``folder``, of which one at a time is read, sorted in memory, and deleted."""
    paths = [folder / f"part-{number}.arrow" for number in range(parts)]
    writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
    with ExitStack() as files:
        for batch in batches:
            for number, rows in _by_part(batch, keys[0], bound, parts):
                if number not in writers:
                    options = pa.ipc.IpcWriteOptions(compression="lz4")
                    writers[number] = files.enter_context(pa.ipc.new_file(paths[number], batch.schema, options=options))
                writers[number].write_batch(rows)
    for number in sorted(writers):
        with pa.memory_map(str(paths[number])) as source:
            rows = pa.ipc.open_file(source).read_all().sort_by([(key, "ascending") for key in keys])
        paths[number].unlink()
        yield from rows.to_batches(max_chunksize=ROW_GROUP)


def _by_part(batch: pa.RecordBatch, key: str, bound: int, parts: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    number = batch.column(key).to_numpy() * parts // bound
    order = np.argsort(number, kind="stable")
    ordered, counts = batch.take(pa.array(order)), np.bincount(number, minlength=parts)
    for part, (count, end) in enumerate(zip(counts.tolist(), np.cumsum(counts).tolist())):
        if count:
            yield part, ordered.slice(end - count, count)


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


class _Parts:
    """Files of a folder, one after the other."""

    def __init__(self, folder: Path, schema: pa.Schema, first: str, shuffled: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.schema, self.first, self.rows = folder, schema, first, 0
        self._shuffled = shuffled
        self._groups, self._written, self._rows_before = _Groups(schema), 0, 0
        self._unfinished = folder / f".{first}.unfinished"
        self._writer: pq.ParquetWriter | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        for group in self._groups.add(batch):
            self._write(group)

    def end(self) -> None:
        for group in self._groups.rest():
            self._write(group)
        if self._writer is not None:
            self._finish()

    def close(self) -> None:
        """Leaves nothing open; a file that is not whole keeps its other name."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, group: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._unfinished, self.schema, compression="snappy", write_page_checksum=True
            )
        self._writer.write_table(group, row_group_size=ROW_GROUP)
        self.rows += group.num_rows
        self._written += 1
        if self._written % FILE_GROUPS == 0:
            self._finish()

    def _finish(self) -> None:
        if self._shuffled:
            mark = shuffled_mark(self.rows - self._rows_before)
            self._writer.add_key_value_metadata({ROW_ORDER.decode(): mark.decode()})
        self._rows_before = self.rows
        self._writer.close()
        self._writer = None
        number = (self._written - 1) // FILE_GROUPS
        os.replace(self._unfinished, self.folder / f"{self.first}-{number:05}.parquet")


class _Groups:
    """Batches of any length to tables of ``ROW_GROUP`` rows."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema, self._waiting, self._rows = schema, [], 0

    def add(self, batch: pa.RecordBatch) -> Iterator[pa.Table]:
        self._waiting.append(batch)
        self._rows += batch.num_rows
        while self._rows >= ROW_GROUP:
            table = pa.Table.from_batches(self._waiting, self._schema)
            yield table.slice(0, ROW_GROUP)
            self._rows -= ROW_GROUP
            self._waiting = table.slice(ROW_GROUP).to_batches() if self._rows else []

    def rest(self) -> Iterator[pa.Table]:
        if self._rows:
            yield pa.Table.from_batches(self._waiting, self._schema)
        self._waiting, self._rows = [], 0


def _divided(batch: pa.RecordBatch, by: str | None) -> Iterator[tuple[str, pa.RecordBatch]]:
    if by is None:
        yield "", batch
        return
    names = batch.column(by)
    for name in sorted(pc.unique(names).to_pylist()):
        yield name, batch.filter(pc.equal(names, name))


def _conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns = []
    for field in schema:
        column = batch.column(field.name)
        if not field.nullable and column.null_count:
            raise UserError(
                f"column '{field.name}' has {column.null_count:,} missing value(s) and nothing that stands for them: give "
                f"the feature a fill (schema.features.{field.name}.fill=0)"
            )
        columns.append(column if column.type == field.type else column.cast(field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)
