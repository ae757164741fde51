"""Columns of a file of predictions: those kept of the input, and the probability."""

from collections.abc import Sequence

import pyarrow as pa

from data_loaders.arrow import value_type
from data_loaders.manifest import Manifest

PREDICTION = pa.field("prediction", pa.float32())


def kept_schema(manifest: Manifest, keep: Sequence[str]) -> pa.Schema:
    """The kept columns, of types wide enough for all files."""
    schemas = [
        pa.schema([(name, value_type(kind)) for name, kind in types.items()]) for _, types in manifest.types(keep)
    ]
    return pa.unify_schemas(schemas, promote_options="permissive")
