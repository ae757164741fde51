"""What there is on either side of a warm start: schema, tensors by name, and which part of them belongs to which feature.

The old side is what a checkpoint says of itself, the new one what the new run has built. Neither needs other ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from data_loaders.errors import UserError
from data_loaders.schema import Cross, Feature, Schema, Table
from data_loaders.typed import check as check_type
from trainer.checkpoint.format import Reader
from trainer.checkpoint.piece import Piece
from trainer.models import FeatureAxes, load_model_class
from trainer.modules.embeddings import is_wide_table, wide_table

PREFIX = "model."  # of the model's own names in the task's


@dataclass(frozen=True)
class Spec:
    shape: tuple[int, ...]
    dtype: torch.dtype
    widths: tuple[int, ...] | None


@dataclass(frozen=True)
class FeatureParts:
    """Of a dense tensor: each of ``axes`` is made of the same ``parts``, in this order. A part is ``(features that it belongs
    to together, width)``."""

    axes: tuple[int, ...]
    parts: tuple[tuple[tuple[str, ...], int], ...]

    @property
    def features(self) -> list[str]:
        return list(dict.fromkeys(feature for features, _ in self.parts for feature in features))

    @property
    def width(self) -> int:
        return sum(width for _, width in self.parts)


@dataclass(frozen=True)
class Side:
    """``tables``: {table: {weight or state: …}}, ``dense``: {parameter or buffer: …}, ``states``: {dense parameter: {state:
    …}}, ``optimizers``: {table: name}. ``axes`` and ``modules`` are those of the model (``trainer.models``), by names in
    ``dense``; None where it has none."""

    schema: Schema
    tables: dict[str, dict[str, Spec]]
    dense: dict[str, Spec]
    states: dict[str, dict[str, Spec]]
    optimizers: Mapping[str, str]
    axes: dict[str, FeatureParts] | None
    modules: dict[str, tuple[str, ...]]

    @property
    def features(self) -> list[str]:
        """Features and crosses that the model uses."""
        keys = [*self.schema.sparse, *self.schema.sequences]
        embedded = [key for key in keys if self.schema.features[key].table in self.tables]
        linear = [key for key in (*keys, *self.schema.crosses) if wide_table(key) in self.tables]
        return list(dict.fromkeys((*self.schema.dense, *embedded, *linear)))

    def readers(self, table: str) -> list[str]:
        """The features that read a table; of a wide table the feature or cross it belongs to."""
        if is_wide_table(table):
            return [self._wide[table]] if table in self._wide else []
        return [name for name, feature in self.schema.features.items() if feature.table == table]

    def vocabulary(self, table: str) -> str:
        """The table whose vocabulary gives the ids of ``table``: for a wide one that of its feature."""
        (key, *_) = self.readers(table) or [None]
        return self.schema.features[key].table if is_wide_table(table) and key in self.schema.features else table

    def rows(self, table: str) -> int:
        return self.tables[table]["weight"].shape[0]

    @cached_property
    def _wide(self) -> dict[str, str]:
        return {wide_table(key): key for key in (*self.schema.sparse, *self.schema.sequences, *self.schema.crosses)}


def old_side(reader: Reader, facts: Mapping[str, Any], model_name: str, model_class: type) -> Side:
    """Of a checkpoint. ``model_name``, ``model_class`` are the new run's: of another model's layers it is not known which
    columns belong to which feature, unless the class names it in ``initialised_by``. Raises ``UserError`` for facts that
    are no schema and model."""
    identity = facts.get("identity", {})
    try:
        check_type(identity["schema"], Schema, "schema")
        schema, old_name = schema_of(identity["schema"]), identity["model"]["name"]
        optimizers = {row["table"]: row["optimizer"] for row in facts.get("plan", [])}
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise UserError(
            f"checkpoint {reader.path} does not say what its tensors mean ({error!r:.300}): train the old run on with this "
            "version of the program and start from its next checkpoint"
        ) from None
    specs = {name: Spec(reader.shape(name), reader.dtype(name), reader.widths(name)) for name in reader.names}
    side = _side(schema, specs, optimizers, _old_class(old_name, model_name, model_class))
    for table, parts in side.tables.items():
        rows = {spec.shape[0] if len(spec.shape) == 2 else None for spec in parts.values()}
        if "weight" not in parts or None in rows or len(rows) > 1:
            raise UserError(f"checkpoint {reader.path}: tables/{table:.200} is no table with rows and their states")
    return side


def _old_class(old_name: str, model_name: str, model_class: type) -> type | None:
    """None for a model that has nothing to do with the new one. (It is the new one's code that says what is loaded, never
    the checkpoint.)"""
    if old_name == model_name:
        return model_class
    return load_model_class(old_name) if old_name in getattr(model_class, "initialised_by", ()) else None


def new_side(pieces: Sequence[Piece], schema: Schema, optimizers: Mapping[str, str], model_class: type) -> Side:
    specs = {piece.name: Spec(piece.shape, piece.tensor.dtype, piece.widths) for piece in pieces}
    return _side(schema, specs, optimizers, model_class)


def schema_of(plain: Mapping[str, Any]) -> Schema:
    """A schema from JSON. Raises ``TypeError`` for unknown keys, ``UserError`` where it contradicts itself."""
    kinds = {"tables": Table, "features": Feature, "crosses": Cross}
    parts = {key: {name: kind(**spec) for name, spec in plain[key].items()} for key, kind in kinds.items()}
    return Schema(**{**plain, **parts})


def _side(schema: Schema, specs: Mapping[str, Spec], optimizers: Mapping[str, str], model_class: type | None) -> Side:
    tables: dict[str, dict[str, Spec]] = {}
    states: dict[str, dict[str, Spec]] = {}
    dense: dict[str, Spec] = {}
    for name, spec in specs.items():
        kind, _, rest = name.partition("/")
        owner, _, state = rest.rpartition("/")
        if kind == "dense":
            dense[rest] = spec
        elif kind in ("tables", "optimizer"):  # metrics and the like are no part of a model
            (tables if kind == "tables" else states).setdefault(owner, {})[state] = spec
    axes = model_class.feature_axes(schema) if hasattr(model_class, "feature_axes") else None
    modules = model_class.feature_modules(schema) if hasattr(model_class, "feature_modules") else {}
    modules = {PREFIX + name: features for name, features in modules.items()}
    return Side(schema, tables, dense, states, optimizers, None if axes is None else _feature_parts(axes), modules)


def _feature_parts(axes: FeatureAxes) -> dict[str, FeatureParts]:
    """Those of ``trainer.models``, by names in the task."""
    found = {}
    for name, (axis, blocks) in axes.items():
        parts = tuple(((owner,) if isinstance(owner, str) else tuple(owner), width) for owner, width in blocks)
        found[PREFIX + name] = FeatureParts((axis,) if isinstance(axis, int) else axis, parts)
    return found
