"""Scores Parquet input with an exported model, row order kept.

``clicktrainer serve.score EXPORT --input FILE_OR_FOLDER … --output scores.parquet [--keep COLUMN …]``

The engine is the server's: no run, no checkpoint and no process group. Memory is that of the tables' pages in use and one
block of rows.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_loaders.column_decoders import RowError
from data_loaders.errors import UserError
from data_loaders.manifest import Manifest
from data_loaders.order import Segment
from data_loaders.output_files import MAKER, check_apart, check_output, is_made_by
from data_loaders.predictions import PREDICTION, kept_schema
from data_loaders.reader import Handle, RowGroups
from data_loaders.state_files import publish
from data_loaders.streams import located
from trainer.config import arguments
from trainer.runtime.process import guarded
from trainer.serve import requests
from trainer.serve.opened import open_checked
from trainer.serve.scorer import BLOCK, Scorer, probabilities
from trainer.serve.versions import current

MADE_BY = (MAKER, b"trainer.serve.score")


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments.serve_score()
    options = parser.parse_intermixed_args(argv)
    if PREDICTION.name in options.keep:
        parser.error(f"--keep {PREDICTION.name}: the output's own column has that name")
    guarded(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Raises ``UserError``; the output is whole, or what it was."""
    check_output("--output", options.output, [".parquet"], is_scores)
    check_apart(options.output, "--input", options.input, options.root)
    if options.output.resolve().is_relative_to(options.export.resolve()):
        raise UserError(f"--output {options.output} lies in the export: choose a name elsewhere")
    scorer = open_checked(current(options.export), hashes=True).scorer
    manifest = Manifest.scan(options.input, options.root, list(dict.fromkeys([*scorer.types, *options.keep])))
    rows = write(scorer, manifest, options.keep, options.output)
    print(f"{rows:,} predictions of {scorer.name}/{scorer.version} written to {options.output}", flush=True)


def is_scores(path: Path) -> bool:
    """Whether a file is an output of this command, which a new one may replace."""
    return is_made_by(path, MADE_BY[1])


def write(scorer: Scorer, manifest: Manifest, keep: Sequence[str], output: Path) -> int:
    """One file in input order, whole or not at all. Returns the number of rows."""
    kept = kept_schema(manifest, keep)
    schema = kept.append(PREDICTION).with_metadata(dict([MADE_BY]))
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.part")
    rows = 0
    try:
        with pq.ParquetWriter(unfinished, schema) as writer:
            for table, found in scored(scorer, manifest, kept.names):
                columns = [table[field.name].cast(field.type).combine_chunks() for field in kept]
                writer.write_batch(pa.record_batch([*columns, found], schema=schema))
                rows += table.num_rows
        publish(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    return rows


def scored(scorer: Scorer, manifest: Manifest, keep: Sequence[str]) -> Iterator[tuple[pa.Table, pa.Array]]:
    """The rows in order, block by block, with their probabilities; null where a policy of the schema leaves a row out. Raises
    ``UserError`` with file and row for a value that the schema does not allow."""
    groups = RowGroups(manifest, list(dict.fromkeys([*scorer.types, *keep])), set())
    handle = Handle()
    for number in range(groups.count):
        start = 0
        for table in groups.read(number, BLOCK, handle):
            stop = start + table.num_rows
            try:
                given = requests.cast(table.select(list(scorer.types)), scorer.types, groups.place(number)[0])
                logits = scorer.logits_of_rows(given)
            except RowError as error:
                raise located(error, groups, [Segment(number, start, stop, stop)]) from error
            yield table, pa.array(probabilities(logits), mask=np.isnan(logits))
            start = stop


if __name__ == "__main__":
    main()
