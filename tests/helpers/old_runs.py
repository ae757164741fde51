"""Earlier runs to start from."""

import dataclasses
import inspect

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tests.helpers.samples import make_batch, randomize
from trainer.checkpoint import read_facts, write_commit_files, write_pieces
from trainer.checkpoint.format import Reader
from trainer.checkpoint.piece import whole_piece
from trainer.config.optim import OptimConfig, TableOptimizerConfig
from trainer.config.warm_start import WarmStartConfig
from trainer.models import load_model_class
from trainer.models.construct import build_model
from trainer.modules.embeddings import is_wide_table
from trainer.optim.tables import state_names
from trainer.sharding.table_plan import embedding_tables
from trainer.warm_start.plan import make_plan
from trainer.warm_start.report import make_report
from trainer.warm_start.sides import new_side, old_side
from trainer.warm_start.vocabularies import Vocabularies

ADAGRAD = TableOptimizerConfig("adagrad")
RUN_STEPS = 7


class Run:
    """A model with random parameters and optimizer state, in pieces as a job on one rank has them. ``optimizers``: of deep
    and of wide tables. A ``fresh`` one has the state of a run before its first step."""

    def __init__(self, schema, name="wide_deep", *, seed=0, fresh=False, optimizers=("adagrad", "adagrad"), **options):
        torch.manual_seed(seed)
        self.schema, self.name = schema, name
        if "hidden_units" in inspect.signature(load_model_class(name)).parameters:
            options = {"hidden_units": [6, 5]} | options
        self.model = build_model({"name": name, **options}, schema, seed=seed)
        self.model.to_empty(device="cpu")
        randomize(self.model, seed=seed)
        found = {table.parameter: table for table in embedding_tables(self.model, OptimConfig())}
        self.optimizers = {table.name: optimizers[is_wide_table(table.name)] for table in found.values()}
        self.pieces = []
        for key, value in self.model.state_dict().items():
            if key in found:
                self.pieces.append(whole_piece(f"tables/{found[key].name}/weight", value))
                self.pieces += self._states(found[key], fresh)
            else:
                self.pieces.append(whole_piece(f"dense/model.{key}", value))
        for key, value in self.model.named_parameters():
            if key not in found:
                for state in ("exp_avg", "exp_avg_sq"):
                    made = torch.zeros_like(value) if fresh else torch.rand_like(value)
                    self.pieces.append(whole_piece(f"optimizer/model.{key}/{state}", made))
                step = torch.tensor(0.0 if fresh else float(RUN_STEPS))
                self.pieces.append(whole_piece(f"optimizer/model.{key}/step", step))
        self.before = {piece.name: piece.tensor.clone() for piece in self.pieces}

    def _states(self, table, fresh):
        kind = self.optimizers[table.name]
        widths = (table.dim,) if kind == "rowwise_adagrad" else None
        for state in state_names(TableOptimizerConfig(kind)):
            shape = (table.rows, 1 if widths else table.dim)
            yield whole_piece(
                f"tables/{table.name}/{state}", torch.zeros(shape) if fresh else torch.rand(shape), widths
            )

    @property
    def plan_rows(self):
        return [{"table": table, "optimizer": name} for table, name in self.optimizers.items()]

    @property
    def identity(self):
        schema = {
            **{key: getattr(self.schema, key) for key in ("label", "on_bad_label", "weight", "embedding_dim")},
            **{
                key: {k: dataclasses.asdict(v) for k, v in getattr(self.schema, key).items()}
                for key in ("tables", "features", "crosses")
            },
        }
        return {"schema": schema, "model": {"name": self.name}}

    def save(self, folder):
        folder.mkdir()
        written = write_pieces(folder / "rank-00000.safetensors", self.pieces)
        facts = {"identity": self.identity, "plan": self.plan_rows, "optimizer_steps": RUN_STEPS}
        write_commit_files(folder, [("rank-00000.safetensors", written.to_dict())], facts, {})
        return folder

    def now(self, name):
        return next(piece.tensor for piece in self.pieces if piece.name == name)

    def logits(self, rows):
        self.model.eval()
        with torch.no_grad():
            return self.model(make_batch(self.schema, self.model.layout, rows))


def plan_of(old_folder, new, vocabularies=None, **rules):
    reader, model_class = Reader(old_folder), load_model_class(new.name)
    old = old_side(reader, read_facts(old_folder), new.name, model_class)
    side = new_side(new.pieces, new.schema, new.optimizers, model_class)
    return make_plan(WarmStartConfig("run", **rules), old, side, vocabularies or Vocabularies())


def start(old_folder, new, vocabularies=None, *, wide=ADAGRAD, **rules):
    plan = plan_of(old_folder, new, vocabularies, **rules)
    plan.apply(new.pieces, Reader(old_folder), wide)
    return make_report(plan, str(old_folder), RUN_STEPS)


def table(report, name):
    return next(it for it in report.tables if it.table == name)


def dense(report, name):
    return next(it for it in report.dense if it.name == name)


def vocabulary(folder, table, values, ids=None):
    (folder / "vocabulary").mkdir(parents=True, exist_ok=True)
    ids = np.arange(2, 2 + len(values)) if ids is None else ids
    columns = {"value": values, "id": pa.array(ids, pa.int32()), "count": ids, "unseen": pa.array(ids * 0, pa.int32())}
    pq.write_table(pa.table(columns), folder / "vocabulary" / f"{table}.parquet")
