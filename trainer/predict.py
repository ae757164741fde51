"""Writes click probabilities for Parquet input, row order kept.

``torchrun … -m trainer.predict RUN_FOLDER --input FILE_OR_FOLDER … --output predictions.parquet [--keep COLUMN …]``
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.distributed.elastic.multiprocessing.errors import record

from data_loaders.manifest import Manifest
from trainer import build
from trainer.distributed import from_first
from trainer.process import guarded
from trainer.scoring import score
from trainer.trained import Trained, opened

PREDICTION = pa.field("prediction", pa.float32(), nullable=False)


@record
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="trainer.predict", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument(
        "--input", nargs="+", required=True, help="Parquet files, folders or globs; a label is not needed"
    )
    parser.add_argument("--output", type=Path, required=True, help="the Parquet file to write")
    parser.add_argument(
        "--keep", nargs="*", default=[], metavar="COLUMN", help="input columns to copy beside the prediction"
    )
    parser.add_argument("--checkpoint", help="such as step-100; the newest by default")
    options = parser.parse_intermixed_args(sys.argv[1:] if argv is None else list(argv))
    guarded(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    with opened(options.run, options.checkpoint, options.overrides) as trained:
        # Paths are the caller's own here, relative to the working folder and not to data.root.
        columns = [*trained.config.data.schema.columns(trained.layout), *options.keep]
        manifest = from_first(lambda: Manifest.scan(options.input, ".", columns))
        part = options.output.with_name(f".{options.output.name}.rank-{trained.ranks.rank}")
        write_part(trained, manifest, part)
        parts = [part.with_name(f".{options.output.name}.rank-{rank}") for rank in range(trained.ranks.world_size)]
        torch.distributed.barrier()
        rows = from_first(lambda: merge(parts, manifest, options.keep, options.output))
        if trained.ranks.is_first:
            print(f"{rows:,} predictions written to {options.output}", flush=True)


def write_part(trained: Trained, manifest: Manifest, path: Path) -> None:
    """This rank's contiguous part of the rows."""
    config = trained.config
    batch_size = config.evaluation.batch_size or config.batch_size
    loader = build.build_ordered_loader(
        manifest, config.data.schema, trained.layout, batch_size, config.data.stream, trained.ranks, labeled=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, pa.schema([PREDICTION])) as writer:
        for outputs in score(trained.built.pipeline, loader):
            probabilities = torch.sigmoid(outputs.logits[: outputs.cursor.local_rows].float()).cpu().numpy()
            writer.write_batch(pa.record_batch([pa.array(probabilities)], schema=pa.schema([PREDICTION])))


def merge(parts: Sequence[Path], manifest: Manifest, keep: Sequence[str], output: Path) -> int:
    """One file in input order, whole or not at all; the parts are removed. Returns the number of rows."""
    unfinished = output.with_name(f".{output.name}.part")
    predictions = _Reader(parts)
    rows = 0
    with pq.ParquetWriter(unfinished, pa.schema([*_fields(manifest, keep), PREDICTION])) as writer:
        for count, columns in _kept(manifest, keep):
            table = pa.table([*columns, pa.array(predictions.take(count))], schema=writer.schema)
            writer.write_table(table)
            rows += count
    assert rows == manifest.num_rows, (rows, manifest.num_rows)
    os.replace(unfinished, output)
    for part in parts:
        part.unlink()
    return rows


class _Reader:
    """Predictions of all parts as one stream."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._batches = (batch.column(0).to_numpy() for part in parts for batch in pq.ParquetFile(part).iter_batches())
        self._left = np.empty(0, dtype=np.float32)

    def take(self, rows: int) -> np.ndarray:
        pieces = [self._left]
        while sum(map(len, pieces)) < rows:
            pieces.append(next(self._batches))
        joined = np.concatenate(pieces)
        self._left = joined[rows:]
        return joined[:rows]


def _fields(manifest: Manifest, keep: Sequence[str]) -> list[pa.Field]:
    schema = pq.read_schema(manifest.files[0].path)
    return [schema.field(name).remove_metadata() for name in keep]


def _kept(manifest: Manifest, keep: Sequence[str]) -> Iterator[tuple[int, list[pa.ChunkedArray]]]:
    """Rows and kept columns of every non-empty row group, in input order."""
    for file in manifest.files:
        parquet = pq.ParquetFile(file.path)
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if rows:
                table = parquet.read_row_group(group, columns=list(keep)) if keep else None
                yield rows, [table[name] for name in keep]


if __name__ == "__main__":
    main()
