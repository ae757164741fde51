"""Writes click probabilities for Parquet input, row order kept.

``clicktrainer predict RUN --input FILE_OR_FOLDER … --output predictions.parquet [--keep COLUMN …]``

Every input row has its row in the output, which replaces nothing but an earlier output. The column ``prediction`` is its
click probability, null where a policy of the schema (``on_null: drop`` and the like) leaves the row out. Input may lie in an
object store: ``s3://bucket/new/*.parquet``.

With ``--raw`` the one input is a folder of raw files, laid out as the recipe of ``clicktrainer prepare`` says; they go
through the vocabularies and statistics that the training data were made with (``data.prepared``).
"""

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.distributed.elastic.multiprocessing.errors import record

from data_loaders.errors import UserError
from data_loaders.manifest import Manifest
from data_loaders.output_files import MAKER, check_apart, check_output, is_made_by
from data_loaders.predictions import PREDICTION, kept_schema
from data_loaders.reader import Handle, RowGroups
from data_loaders.state_files import publish
from trainer.config import arguments
from trainer.config.data import DataConfig
from trainer.run import build
from trainer.run.evaluator import score
from trainer.run.load import LoadedRun, open_run
from trainer.runtime.cpu import start_again_with_variables
from trainer.runtime.distributed import from_first
from trainer.runtime.process import guarded

MADE_BY = (MAKER, b"trainer.predict")  # in the file's metadata
_PIECE = 1 << 16  # rows


@record
def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments.predict_alone()
    options = parser.parse_intermixed_args(argv)
    if PREDICTION.name in options.keep:
        parser.error(f"--keep {PREDICTION.name}: the output's own column has that name")
    if options.raw and len(options.input) > 1:
        parser.error("--raw: --input is one folder, which holds the recipe's files")
    guarded(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    check_apart(options.output, "--input", options.input, "." if options.raw else options.root)
    check_output("--output", options.output, [".parquet"], is_predictions)
    with open_run(options.run, options.checkpoint, options.overrides) as trained:
        data = trained.config.data
        from_first(lambda: check_apart_from_run(options, data))
        if not options.raw:
            return predict(trained, options, options.input, options.root)
        try:
            predict(trained, options, [from_first(lambda: str(prepare_raw(data.prepared, options)))], ".")
        finally:
            if trained.ranks.is_first:
                shutil.rmtree(prepared_beside(options.output), ignore_errors=True)


def predict(trained: LoadedRun, options: argparse.Namespace, paths: Sequence[str], root: str) -> None:
    """From the Parquet input to the output."""
    columns = [*trained.config.data.schema.columns(trained.layout), *options.keep]
    manifest = from_first(lambda: Manifest.scan(paths, root, columns))
    part = options.output.with_name(f".{options.output.name}.rank-{trained.ranks.rank}")
    try:
        write_part(trained, manifest, part)
        parts = [part.with_name(f".{options.output.name}.rank-{rank}") for rank in range(trained.ranks.world_size)]
        torch.distributed.barrier()
        rows = from_first(lambda: merge(parts, manifest, options.keep, options.output))
    finally:
        part.unlink(missing_ok=True)
    if trained.ranks.is_first:
        print(f"{rows:,} predictions written to {options.output}", flush=True)


def is_predictions(path: Path) -> bool:
    """Whether a file is an output of this command, which a new one may replace."""
    return is_made_by(path, MADE_BY[1])


def check_apart_from_run(options: argparse.Namespace, data: DataConfig) -> None:
    """Raises ``UserError`` where the output would lie among the run's data or checkpoints."""
    for split in ("train", "valid", "test"):
        check_apart(options.output, f"data.{split}", getattr(data, split), data.root)
    folders = {"the run's checkpoints": options.run / "checkpoints", "data.prepared": data.prepared}
    for what, folder in folders.items():
        if folder and options.output.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"--output {options.output} lies among the files of {what}: choose a name elsewhere")


def prepare_raw(prepared: str | None, options: argparse.Namespace) -> Path:
    """The raw rows as training-ready Parquet, in the folder ``prepared_beside`` the output. Raises ``UserError``."""
    if prepared is None:
        raise UserError(
            "data.prepared is not set, so the vocabularies of the training data are not known: name the output folder of "
            "clicktrainer prepare, data.prepared=DIR"
        )
    # Imported here: Ibis takes a second to load, and only raw rows need it.
    from data_loaders.prepare.pipeline import Options, transform
    from data_loaders.prepare.prepared import Prepared
    from data_loaders.prepare.progress import Progress

    folder = prepared_beside(options.output)
    wanted = Options(
        options.input[0], folder, memory_limit=options.memory_limit, threads=os.cpu_count() or 1, overwrite=True
    )
    transform(Prepared.open(prepared), wanted, Progress(), tuple(options.keep))
    return folder


def prepared_beside(output: Path) -> Path:
    return output.absolute().with_name(f".{output.name}.prepared")


def write_part(trained: LoadedRun, manifest: Manifest, path: Path) -> None:
    """This rank's contiguous part of the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, pa.schema([PREDICTION])) as writer:
        for column in predictions(trained, manifest):
            writer.write_batch(pa.record_batch([column], schema=pa.schema([PREDICTION])))


def predictions(trained: LoadedRun, manifest: Manifest) -> Iterator[pa.Array]:
    """Of this rank's contiguous part of the rows, batch by batch; null where a row is left out."""
    config = trained.config
    batch_size = config.evaluation.batch_size or config.batch_size
    loader = build.build_ordered_loader(
        manifest, config.data.schema, trained.layout, batch_size, config.data.stream, trained.ranks, labeled=False
    )
    for outputs in score(trained.built.pipeline, loader):
        probabilities = torch.sigmoid(outputs.logits[: outputs.cursor.local_rows].float()).cpu().numpy()
        yield pa.array(probabilities, mask=outputs.cursor.dropped)


def merge(parts: Sequence[Path], manifest: Manifest, keep: Sequence[str], output: Path) -> int:
    """One file in input order, whole or not at all; the parts are removed. Returns the number of rows."""
    unfinished = output.with_name(f".{output.name}.part")
    predictions = _Reader(parts)
    rows = 0
    schema = kept_schema(manifest, keep)
    try:
        with pq.ParquetWriter(unfinished, schema.append(PREDICTION).with_metadata(dict([MADE_BY]))) as writer:
            for count, columns in _kept(manifest, schema):
                writer.write_table(pa.table([*columns, predictions.take(count)], schema=writer.schema))
                rows += count
        assert rows == manifest.num_rows, (rows, manifest.num_rows)
        publish(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    for part in parts:
        part.unlink()
    return rows


class _Reader:
    """Predictions of all parts as one stream."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._batches = (batch.column(0) for part in parts for batch in pq.ParquetFile(part).iter_batches())
        self._left = pa.array([], PREDICTION.type)

    def take(self, rows: int) -> pa.Array:
        pieces = [self._left]
        while sum(map(len, pieces)) < rows:
            pieces.append(next(self._batches))
        joined = pa.concat_arrays(pieces)
        self._left = joined.slice(rows)
        return joined.slice(0, rows)


def _kept(manifest: Manifest, schema: pa.Schema) -> Iterator[tuple[int, list[pa.ChunkedArray]]]:
    """Rows and kept columns, piece by piece, in input order."""
    groups, handle = RowGroups(manifest, schema.names, set()), Handle()
    for number in range(groups.count):
        if not schema.names:
            yield groups.num_rows(number), []
            continue
        for table in groups.read(number, _PIECE, handle):
            yield table.num_rows, [table[field.name].cast(field.type) for field in schema]


if __name__ == "__main__":
    start_again_with_variables()
    main()
