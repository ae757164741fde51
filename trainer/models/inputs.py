"""What models say alike of their inputs: which features, in which order, how wide.

Models over *fields* give every feature one vector of the same width: pooled features first, then numbers. Others put
numbers first, then pooled features as wide as their tables are.
"""

from collections.abc import Sequence
from itertools import combinations

from data_loaders.errors import UserError
from data_loaders.schema import Schema
from trainer.models import FeatureAxes
from trainer.modules.embeddings import DEFAULT_INIT_STD
from trainer.modules.mlp import DenseFields


def concatenated(schema: Schema, model: str) -> list[tuple[str, int]]:
    """``(feature, width)`` of the numbers and pooled features beside each other. Raises ``UserError`` where the schema has
    no sparse feature or sequence."""
    pooled = schema.layout().pooled
    if not pooled:
        raise UserError(f"schema.features has no sparse feature or sequence: model {model} needs at least one")
    return [*((name, 1) for name in schema.dense), *((key, schema.dim(schema.features[key].table)) for key in pooled)]


def total_width(inputs: list[tuple[str, int]]) -> int:
    return sum(width for _, width in inputs)


def field_dim(schema: Schema, model: str) -> int:
    """The one ``embedding_dim`` of all tables that features read. Raises ``UserError`` where they differ, or where the
    schema has no sparse feature or sequence."""
    concatenated(schema, model)
    tables = (schema.features[key].table for key in schema.layout().pooled)
    dims = {table: schema.dim(table) for table in tables}
    if len(set(dims.values())) > 1:
        shown = ", ".join(f"{table}: {dim}" for table, dim in dims.items())
        raise UserError(
            f"schema.tables: embedding_dim differs ({shown}), but model {model} multiplies every field with every "
            "other: give all its tables one embedding_dim"
        )
    return next(iter(dims.values()))


def field_names(schema: Schema) -> list[str]:
    return [*schema.layout().pooled, *schema.dense]


def dense_fields(schema: Schema, dim: int) -> DenseFields | None:
    """The numbers as fields, under the name ``dense_fields`` of a head; None where there are none."""
    return DenseFields(len(schema.dense), dim, init_std=DEFAULT_INIT_STD) if schema.dense else None


def dense_field_axes(schema: Schema) -> FeatureAxes:
    numbers = [(name, 1) for name in schema.dense]
    return {f"head.dense_fields.{name}": (0, numbers) for name in ("weights", "vectors")} if numbers else {}


def field_axes(schema: Schema) -> FeatureAxes:
    """Of ``Fields`` under the name ``fields`` of a head."""
    return {"head.fields.vectors": (0, [(name, 1) for name in schema.dense])} if schema.dense else {}


def pairs(owners: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], int]]:
    """To which features each product of two vectors belongs, in the order of ``interactions.InnerProduct``. ``owners``: the
    features of each vector."""
    return [((*left, *right), 1) for left, right in combinations(owners, 2)]


def first_order(schema: Schema) -> list[str]:
    """The pooled features with a linear weight in a factorization machine: sparse ones, and sequences with ``wide: true``."""
    return [key for key in schema.layout().pooled if key in schema.wide or key in schema.sparse]
