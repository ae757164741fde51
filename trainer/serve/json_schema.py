"""A request as JSON Schema (draft 2020-12), from the schema and the Arrow types of the training data."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from data_loaders.arrow import is_list, value_type
from data_loaders.schema import Layout, Schema


def request_schema(schema: Schema, layout: Layout, types: Mapping[str, pa.DataType]) -> dict[str, Any]:
    """A column stands in ``context``, with one value, or among ``candidates``, with a list of one value a candidate.
    ``x-context``: those that are a user's, whoever the candidate is: histories."""
    described = {name: {**value_schema(kind), **_meaning(schema, layout, name)} for name, kind in types.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "additionalProperties": False,
        "required": ["candidates"],
        "properties": {
            "context": {"type": "object", "additionalProperties": False, "properties": described},
            "candidates": {
                "type": "object",
                "additionalProperties": False,
                "minProperties": 1,
                "properties": {name: {"type": "array", "items": value} for name, value in described.items()},
            },
            "top": {"type": "integer", "minimum": 1},
            "explain": {"type": "boolean"},
        },
        "x-context": [schema.column(name) for name in schema.sequences if schema.column(name) in types],
    }


def value_schema(kind: pa.DataType) -> dict[str, Any]:
    """What JSON may say for a value of an Arrow type; null always may (the schema's policy follows)."""
    kind = value_type(kind)
    if is_list(kind):
        return {"type": ["array", "null"], "items": value_schema(kind.value_type)}
    if pa.types.is_boolean(kind):
        return {"type": ["boolean", "null"]}
    if pa.types.is_integer(kind):
        return {"type": ["integer", "string", "null"], "pattern": "^-?[0-9]+$"}
    if pa.types.is_floating(kind):
        return {"type": ["number", "null"]}
    if pa.types.is_decimal(kind):
        return {"type": ["number", "string", "null"]}
    if pa.types.is_temporal(kind):
        return {"type": ["string", "null"], "description": f"{kind}, ISO 8601"}
    return {"type": ["string", "null"]}


def _meaning(schema: Schema, layout: Layout, column: str) -> dict[str, Any]:
    """The features that read a column, and what a null of it means."""
    names = [name for name in schema.features if schema.column(name) == column]
    policies = {name: schema.features[name].on_null for name in names}
    kinds = ", ".join(f"{schema.features[name].kind} feature {name}" for name in names)
    return {"title": kinds or column, "x-on-null": policies}
