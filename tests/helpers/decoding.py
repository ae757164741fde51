"""Decoding of a single column."""

import numpy as np
import pyarrow as pa

from data_loaders.column_decoders import Counters
from data_loaders.decode import Decoder
from data_loaders.schema import Feature, Schema, Table


def schema(rows=100, **options):
    ids = {name: Feature("sparse", table="t", **options) for name in ("a", "b", "c")}
    return Schema(
        tables={"t": Table(rows)}, features={**ids, "x": Feature("dense", fill=-7.0), "y": Feature("dense", fill=-7.0)}
    )


def decoded(columns, given=None, chunks=1):
    given = given or schema()
    table = pa.table(columns)
    if chunks > 1:
        bounds = np.linspace(0, table.num_rows, chunks + 1).astype(int)
        table = pa.concat_tables([table.slice(a, b - a) for a, b in zip(bounds, bounds[1:])])
    counters = Counters()
    decoder = Decoder(given, given.layout(), {f.name: f.type for f in table.schema}, counters)
    return decoder([table], table.num_rows), counters.snapshot(), decoder
