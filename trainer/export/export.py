"""A run's checkpoint to a version of an export folder."""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa

from data_loaders.errors import UserError
from data_loaders.manifest import Manifest
from data_loaders.schema import Schema
from data_loaders.state_files import read_json as read_plain_json
from data_loaders.state_files import write_text
from trainer import __version__
from trainer.checkpoint import AnyPath, Reader, read_facts, read_json
from trainer.config.compose import Composed
from trainer.config.data import DataConfig
from trainer.config.job import TrainConfig
from trainer.export.onnx_head import HEAD, OnnxHead, SeenInputs, write_onnx
from trainer.export.parity import Parity, compare, read_rows
from trainer.export.write import write_dense, write_tables
from trainer.models.construct import build_model
from trainer.modules.head import Head
from trainer.run.training_files import DATA
from trainer.runtime.run_folder import METRICS
from trainer.serve.artifact import CONFIG, GOLDEN, LOGIT, Artifact, TableEntry, new_version, types_text
from trainer.serve.model import load_model, load_tables
from trainer.serve.scorer import Scorer

GOLDEN_ROWS = 256
TOLERANCE = 1e-4  # of a logit: kernels of another machine add up in another order
REFERENCE = "reference"  # a folder beside the files while they are compared


@dataclass(frozen=True)
class Exported:
    """A version, and how it compares on ``split`` with the model in fp32. ``bytes``: of the tables in fp32, and as they are.
    ``onnx``: the same of ``head.onnx`` with its bytes, or why there is none; None: it was not asked for."""

    path: Path
    split: str
    parity: Parity
    form: str
    bytes: tuple[int, int]
    onnx: tuple[Parity, int] | str | None = None

    def lines(self) -> list[tuple[str, int, float | None, float | None, float]]:
        """Form, bytes, AUC, log loss, largest difference of a logit."""
        parity = self.parity
        found = [("fp32", self.bytes[0], parity.auc[0], parity.logloss[0], 0.0)]
        if self.form != "fp32":
            found.append((self.form, self.bytes[1], parity.auc[1], parity.logloss[1], parity.largest))
        if isinstance(self.onnx, tuple):
            parity, size = self.onnx
            found.append((HEAD, size, parity.auc[1], parity.logloss[1], parity.largest))
        return found


def export(composed: Composed, run: Path, checkpoint: AnyPath, output: Path) -> Exported:
    """Raises ``UserError`` where the export would cost more AUC than ``export.max_auc_loss``: nothing is written then."""
    config, reader = composed.config, Reader(checkpoint)
    schema, form = config.data.schema, config.export.tables
    layout = build_model(config.model, schema, config.seed).layout
    columns = schema.columns(layout)
    types = trained_types(checkpoint, columns)
    split, manifest = held_out(config.data, [*columns, schema.label, *([schema.weight] if schema.weight else [])])
    with new_version(output, read_facts(checkpoint)["progress"]["step"]) as (folder, serving):
        write_text(folder / CONFIG, composed.text)
        write_dense(folder, reader)
        entries = write_tables(folder, reader, form)
        correction = math.log(config.loss.negative_sampling_rate)
        scorer = open_scorer(config, folder, folder, entries, types, correction)
        reference, reference_bytes = scorer, size_of(folder, entries)
        if form != "fp32":
            (folder / REFERENCE).mkdir()
            exact = write_tables(folder / REFERENCE, reader, "fp32")
            reference = open_scorer(config, folder / REFERENCE, folder, exact, types, correction)
            reference_bytes = size_of(folder / REFERENCE, exact)
        wanted = [*columns, *(name for name in (schema.label, schema.weight) if name and name not in columns)]
        parity = compare(reference, scorer, read_rows(manifest, wanted, config.export.rows), schema)
        check(parity, config, split)
        write_golden(folder / GOLDEN, scorer, manifest, columns)
        onnx: tuple[Parity, int] | str | None = None
        if config.export.onnx:
            rows = read_rows(manifest, wanted, config.export.rows)
            by_onnx = open_scorer(config, folder, folder, entries, types, correction)
            onnx = add_onnx(folder / HEAD, scorer, by_onnx, rows, schema)
        shutil.rmtree(folder / REFERENCE, ignore_errors=True)
        serving |= {
            "run": run.absolute().name,
            "model": config.model["name"],
            "correction": correction,
            "tolerance": TOLERANCE,
            "tables": [asdict(entry) for entry in entries],
            "types": types_text(types),
            "metrics": {
                "run": read_plain_json(run / METRICS, {}, quiet=True),
                "export": {"split": split, **asdict(parity)},
                "onnx": asdict(onnx[0]) if isinstance(onnx, tuple) else None,
            },
            "made_with": {"clicktrainer": __version__},
        }
        sizes = reference_bytes, size_of(folder, entries)
    path = serving["published"]
    Artifact(path)  # reads as it will be read
    return Exported(path, split, parity, form, sizes, onnx)


def add_onnx(
    path: Path, scorer: Scorer, by_onnx: Scorer, tables: Iterator[pa.Table], schema: Schema
) -> tuple[Parity, int] | str:
    """``head.onnx`` compared with ``scorer`` by ``by_onnx``, a further scorer of the same version, and its bytes; or why this
    model has none."""
    head = getattr(scorer.model, "head", None)
    if not isinstance(head, Head):
        return "the model has no head of its own (trainer.modules.head)"
    first, seen = next(tables), SeenInputs(head)
    by_onnx.model.add_module("head", seen)
    by_onnx.logits_of_rows(first)
    try:
        write_onnx(path, head, seen.inputs, scorer.correction)
    except UserError as error:
        return str(error)
    by_onnx.model.add_module("head", OnnxHead(path, scorer.correction))
    return compare(scorer, by_onnx, chain([first], tables), schema), path.stat().st_size


def open_scorer(
    config: TrainConfig,
    tables: Path,
    dense: Path,
    entries: Sequence[TableEntry],
    types: Mapping[str, pa.DataType],
    correction: float,
) -> Scorer:
    model = load_model(config, load_tables(tables, entries), dense)
    return Scorer(config.data.schema, model, types, correction=correction)


def size_of(folder: Path, entries: Sequence[TableEntry]) -> int:
    return sum((folder / entry.file).stat().st_size for entry in entries)


def trained_types(checkpoint: AnyPath, columns: Sequence[str]) -> dict[str, pa.DataType]:
    """The Arrow types of the training data: ids are hashed by them."""
    recorded = Manifest.from_dict(read_json(checkpoint, DATA, {"manifest": dict})["manifest"], "/")
    return recorded.types(columns)[0][1]


def held_out(data: DataConfig, columns: Sequence[str]) -> tuple[str, Manifest]:
    """The split to compare on, and its files. Raises ``UserError``."""
    for split in ("valid", "test", "train"):
        if paths := getattr(data, split):
            try:
                return split, Manifest.scan(paths, data.root, columns)
            except UserError as error:
                raise UserError(
                    f"the export is compared with its run on data.{split}, which cannot be read: {error}; give data.root=… or "
                    f"data.{split}=[…] of today"
                ) from None
    raise UserError("the export is compared with its run on held-out rows: give data.valid=[…]")


def check(parity: Parity, config: TrainConfig, split: str) -> None:
    most, form = config.export.max_auc_loss, config.export.tables
    if parity.auc_loss > most:
        raise UserError(
            f"tables as {form} cost {parity.auc_loss:.2g} AUC on {parity.rows:,} rows of {split}, more than export.max_auc_loss="
            f"{most:g}: nothing is exported. Choose export.tables=fp16 or fp32, or allow more"
        )


def write_golden(path: Path, scorer: Scorer, manifest: Manifest, columns: Sequence[str]) -> None:
    """Some rows and their logits, by which a server sees that it scores as the exporting process did."""
    tables = list(read_rows(manifest, columns, GOLDEN_ROWS))
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    table = table.append_column(LOGIT, pa.array(scorer.logits_of_rows(table)))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
