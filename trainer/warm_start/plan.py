"""The plan of a warm start: what becomes of every table and dense tensor, the same on all ranks and without asking them.

``make_plan`` decides and raises one error for all that no rule explains; ``Plan.apply`` writes the old values into the
pieces of a model that has its initial values already, so that what is new simply stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data_loaders.errors import UserError
from data_loaders.schema import Feature, Schema, Table
from trainer.checkpoint.format import Reader
from trainer.checkpoint.piece import Piece
from trainer.config.optim import TableOptimizerConfig
from trainer.config.warm_start import WarmStartConfig, matches
from trainer.warm_start.dense import DenseTransfer, load_dense, plan_dense
from trainer.warm_start.matching import DROPPED, NEW, Matching
from trainer.warm_start.sides import Side
from trainer.warm_start.tables import TableTransfer, load_clock, load_table, plan_tables
from trainer.warm_start.vocabularies import Vocabularies

MEANING = ("offset", "scale", "log1p", "fill", "missing_id")  # of a feature's values, though no shape shows it


@dataclass(frozen=True)
class Plan:
    """``notes``: differences that change no shape, and what a reader should know of them."""

    tables: tuple[TableTransfer, ...]
    dense: tuple[DenseTransfer, ...]
    notes: tuple[str, ...] = ()

    @torch.no_grad()
    def apply(self, pieces: Sequence[Piece], reader: Reader, wide: TableOptimizerConfig) -> None:
        """Fills this rank's pieces in place. ``wide``: the new run's optimizer of linear weights."""
        tables = {plan.table: plan for plan in self.tables if plan.status != DROPPED}
        dense = {plan.name: plan for plan in self.dense if plan.status != DROPPED}
        for piece in pieces:
            kind, _, rest = piece.name.partition("/")
            if kind == "tables":
                load_table(tables[rest.rpartition("/")[0]], piece, reader, wide)
            elif kind == "clock":
                load_clock(tables[rest], piece, reader)
            elif kind in ("dense", "optimizer"):
                load_dense(dense[rest if kind == "dense" else rest.rpartition("/")[0]], piece, reader)

    @property
    def keeps_table_state(self) -> bool:
        """Whether the tables' optimizers keep counting from the old run's number of steps."""
        return any(plan.source is not None and plan.has_state and plan.factor is not None for plan in self.tables)


def make_plan(rules: WarmStartConfig, old: Side, new: Side, vocabularies: Vocabularies) -> Plan:
    """Raises ``UserError`` that lists all differences that no rule explains, each with the rule that would."""
    matching = Matching(rules, old, new, vocabularies)
    matching.check_rules()
    matching.check_features()
    _check_columns_are_known(matching)
    tables, dense = plan_tables(matching), plan_dense(matching)
    _check_required(matching, tables, dense)
    if matching.problems:
        listed = "; ".join(f"({number}) {text}" for number, text in enumerate(matching.problems, 1))
        raise UserError(
            f"warm_start.path={rules.path}: {len(matching.problems)} difference(s) that no rule of warm_start explains, each "
            f"with the rules that would: {listed}"
        )
    return Plan(tuple(tables), tuple(dense), tuple(_notes(matching)))


def _check_columns_are_known(matching: Matching) -> None:
    """A model of the user's own may not say whose its columns are; that matters once features have changed."""
    inputs = [_inputs(side.schema) for side in (matching.old, matching.new)]
    dense = [name for name in matching.new.dense if not matches(f"dense/{name}", matching.rules.skip)]
    if matching.new.axes is None and inputs[0] != inputs[1] and dense:
        matching.problem(
            "the model",
            "does not say which columns belong to which feature, and features have changed",
            "give it feature_axes (trainer/models), or skip: ['dense/*']",
        )


def _inputs(schema: Schema) -> list[tuple[str, str, int]]:
    return [(name, f.kind, schema.dim(f.table) if f.table else 1) for name, f in schema.features.items()]


def _check_required(matching: Matching, tables: Sequence[TableTransfer], dense: Sequence[DenseTransfer]) -> None:
    statuses = {f"tables/{plan.table}": plan.status for plan in tables if plan.new_rows}
    statuses |= {f"dense/{plan.name}": plan.status for plan in dense if plan.status != DROPPED}
    statuses |= {f"features/{key}": NEW for key in matching.new.features if matching.source_feature(key) is None}
    for name, status in statuses.items():
        if status == NEW and matches(name, matching.rules.require):
            matching.problem(
                name, "is required, but would begin anew", "take it out of skip, rename the old one, or require less"
            )


def _notes(matching: Matching) -> list[str]:
    old, new = matching.old.schema, matching.new.schema
    notes = []
    for name in new.features:
        before = matching.source_part(name)
        if before is not None:
            notes += _changes(f"feature '{name}'", old.features[before], new.features[name], MEANING)
    for name in new.tables:
        if name in old.tables:
            notes += _changes(f"table '{name}'", old.tables[name], new.tables[name], ("pooling", "dtype"))
    return notes


def _changes(what: str, old: Feature | Table, new: Feature | Table, keys: Sequence[str]) -> list[str]:
    return [
        f"{what}: {key} was {getattr(old, key)}, is {getattr(new, key)}; what was learnt from it is kept"
        for key in keys
        if getattr(old, key) != getattr(new, key)
    ]
