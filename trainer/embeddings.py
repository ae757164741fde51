"""Writes the rows of a trained table, for analysis and retrieval.

``clicktrainer embeddings RUN --table item --output items.parquet [--checkpoint step-100]``

Columns: ``row`` (int64), the number of the row; ``value``, where the table has a vocabulary (``data.prepared``): the raw value
that has the row, null for the rows of missing and unknown values and for rows that no value has; ``embedding`` (float32, a list
of fixed size). One process; memory is that of one slab of rows, on however many ranks the run was trained.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_loaders.errors import UserError
from data_loaders.output_files import MAKER, check_output, is_made_by
from data_loaders.schema import Schema, one_of
from data_loaders.state_files import publish
from trainer.checkpoint import Reader
from trainer.checkpoint.tensor_file import SLAB_BYTES
from trainer.config import arguments
from trainer.config.compose import from_yaml
from trainer.export.write import TABLE, WEIGHT, table_names
from trainer.modules.embeddings import is_wide_table
from trainer.run.load import find_checkpoint
from trainer.runtime import run_folder
from trainer.runtime.process import guarded
from trainer.warm_start.vocabularies import vocabulary_file

MADE_BY = (MAKER, b"trainer.embeddings")
ROW, VALUE, EMBEDDING = "row", "value", "embedding"
_STEP = 1 << 16  # values of a vocabulary that are read at once


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments.embeddings().parse_intermixed_args(argv)
    guarded(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Raises ``UserError``; the output is whole, or what it was."""
    check_output("--output", options.output, [".parquet"], is_embeddings)
    config = from_yaml(options.run / run_folder.CONFIG, options.overrides).config
    reader = Reader(find_checkpoint(options.run, options.checkpoint, prefer_best=config.checkpoint.restore_best))
    table = table_of(options.table, reader, config.data.schema, "--table")
    rows = write(reader, table, vocabulary_of(config.data.prepared, table), options.output)
    print(f"{rows:,} rows of table {table} written to {options.output}", flush=True)


def is_embeddings(path: Path) -> bool:
    """Whether a file is an output of this command, which a new one may replace."""
    return is_made_by(path, MADE_BY[1])


def table_of(name: str, reader: Reader, schema: Schema, where: str) -> str:
    """A table of the checkpoint by its name, or by a feature's that reads it. Raises ``UserError`` with the nearest names."""
    tables = [table for table in table_names(reader) if not is_wide_table(table)]
    readers = {key: feature.table for key, feature in schema.features.items() if feature.table in tables}
    one_of(name, [*tables, *(key for key in readers if key not in tables)], where)
    return name if name in tables else str(readers[name])


def vocabulary_of(prepared: str | None, table: str) -> Path | None:
    """The table's vocabulary; None where its ids are no rows of one. Raises ``UserError`` where the folder is gone."""
    if prepared is not None and not Path(prepared).is_dir():
        raise UserError(
            f"data.prepared={prepared}, which holds the vocabularies, is not there: name it where it is, data.prepared=DIR, or "
            "give data.prepared=null for rows by number alone"
        )
    return vocabulary_file(Path(prepared) if prepared else None, table)


def write(reader: Reader, table: str, vocabulary: Path | None, output: Path) -> int:
    """One file in the order of the rows, whole or not at all. Returns the number of rows."""
    name = f"{TABLE}{table}{WEIGHT}"
    rows, dim = reader.shape(name)
    values = Values(vocabulary, rows) if vocabulary else None
    fields = [pa.field(ROW, pa.int64(), False)]
    fields += [pa.field(VALUE, values.type)] if values else []
    fields += [pa.field(EMBEDDING, pa.list_(pa.field("element", pa.float32(), False), dim), False)]
    schema = pa.schema(fields, metadata=dict([MADE_BY]))
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.part")
    step = max(1, SLAB_BYTES // (4 * dim))
    try:
        with pq.ParquetWriter(unfinished, schema) as writer:
            for start in range(0, rows, step):
                count = min(step, rows - start)
                slab = reader.read(name, (start, 0), (count, dim)).float().numpy()
                columns = [pa.array(np.arange(start, start + count))]
                columns += [values.take(start, count)] if values else []
                columns += [pa.FixedSizeListArray.from_arrays(pa.array(slab.reshape(-1)), type=fields[-1].type)]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        publish(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    return rows


class Values:
    """A vocabulary's raw values by row, read beside the rows. Raises ``UserError`` where the file is no vocabulary of a table of
    ``rows`` rows, its ids ascending."""

    def __init__(self, path: Path, rows: int) -> None:
        self._path, self._rows = path, rows
        self.type = pq.read_schema(path).field("value").type
        self._batches = self._read()
        self._left = pa.record_batch([pa.array([], pa.int64()), pa.array([], self.type)], names=["id", "value"])

    def take(self, start: int, count: int) -> pa.Array:
        """Of the rows [start, start + count), which follow those taken before."""
        parts = [self._left]
        while parts[-1].num_rows == 0 or parts[-1]["id"][-1].as_py() < start + count:
            if (batch := next(self._batches, None)) is None:
                break
            parts.append(batch)
        known = pa.Table.from_batches(parts).combine_chunks()
        ids = known["id"].to_numpy()
        until = int(np.searchsorted(ids, start + count))
        places = np.full(count, -1, np.int64)
        places[ids[:until] - start] = np.arange(until)
        self._left = (known.slice(until).to_batches() or [self._left.slice(0, 0)])[0]
        return known["value"].combine_chunks().take(pa.array(places, mask=places < 0))

    def _read(self) -> Iterator[pa.RecordBatch]:
        last = -1
        with pq.ParquetFile(self._path) as file:
            for batch in file.iter_batches(_STEP, columns=["id", "value"]):
                ids = batch["id"].cast(pa.int64())
                steps = np.diff(ids.to_numpy(), prepend=last)
                if len(steps) and (steps.min() < 1 or ids[-1].as_py() >= self._rows):
                    raise UserError(
                        f"{self._path} is no vocabulary of a table of {self._rows:,} rows: name the folder that the run's data "
                        "come from, data.prepared=DIR"
                    )
                last = ids[-1].as_py() if len(ids) else last
                yield pa.record_batch([ids, batch["value"]], names=["id", "value"])


if __name__ == "__main__":
    main()
