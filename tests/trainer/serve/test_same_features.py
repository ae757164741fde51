"""The same row through Parquet and the training loader, JSON, and an Arrow stream: the same batch, bit by bit.

Over random rows of a schema with every kind of feature and column: nulls, empty and long lists, numbers that are not finite or
beyond float32, ids out of range, past 2^53 and of uint64, any text, decimals, times, UUIDs.
"""

import contextlib
import datetime
import decimal
import io
import random
import uuid

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_loaders.column_decoders import Counters
from data_loaders.manifest import Manifest
from data_loaders.schema import Cross, Feature, Schema, Table
from trainer.config.data import StreamConfig
from trainer.run.build import build_ordered_loader
from trainer.runtime.distributed import Ranks
from trainer.serve import requests
from trainer.serve.features import Features

ROWS, ROUNDS, OWNERS = 60, 8, 5
LOST = {"on_out_of_range": "missing", "missing_id": 0}


def ids(table="t", **options):
    return Feature("sparse", table=table, **options)


SCHEMA = Schema(
    embedding_dim=4,
    tables={"t": Table(1000), "small": Table(7), "item": Table(9), "kind": Table(1000)},
    features={
        **{name: ids(ids="hash") for name in ("big", "text", "coded", "device")},
        "byte": ids("small", **LOST),
        "near": ids("item", **LOST),
        "long": ids("kind", ids="hash"),
        "bag": ids(ids="hash", max_length=4),
        "words": ids(ids="hash", max_length=3),
        "items": Feature("sequence", table="item", max_length=5, history="h", target="near", **LOST),
        "kinds": Feature("sequence", table="kind", ids="hash", missing_id=3, max_length=5, history="h", target="long"),
        "x": Feature("dense", fill=-1.0, offset=0.5, scale=3.0),
        "half": Feature("dense", fill=2.0, log1p=True),
        "seconds": Feature("dense", fill=0.0, offset=1.7e9, scale=1e-5),
        "amount": Feature("dense", fill=0.0),
        "cost": Feature("dense", fill=0.0),
        "flag": Feature("dense", fill=0.5),
        "vector": Feature("vector", dim=3, fill=0.25, normalize="l2"),
    },
    crosses={"near_x_text": Cross(["near", "text"], 300)},
)
LAYOUT = SCHEMA.layout(crosses=True, attention=True)
TYPES = {
    "long": pa.int64(),
    "big": pa.uint64(),
    "text": pa.string(),
    "coded": pa.dictionary(pa.int32(), pa.string()),
    "cost": pa.decimal128(20, 0),
    "device": pa.string(),
    "flag": pa.bool_(),
    "near": pa.int32(),
    "byte": pa.int8(),
    "bag": pa.list_(pa.int64()),
    "words": pa.large_list(pa.string()),
    "items": pa.list_(pa.int32()),
    "kinds": pa.list_(pa.uint64()),
    "x": pa.float64(),
    "half": pa.float32(),
    "seconds": pa.int64(),
    "amount": pa.int32(),
    "vector": pa.list_(pa.float32()),
}
FLOATS = (0.0, -0.0, 1.5, -2.25, 5e-324, 1e39, -1e308, float("nan"), float("inf"), float("-inf"), 0.1)
TEXTS = ("", "a", "é", "e\u0301", "日本", "\U0001f600", "0", "-1", " a", "a\x00b", "\x1f", "x" * 300)


def value(kind, draw):
    """Of an Arrow type, or None."""
    if draw.random() < 0.15:
        return None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [value(kind.value_type, draw) for _ in range(draw.choice((0, 0, 1, 2, 3, 9)))]
    if pa.types.is_integer(kind):
        width, unsigned = kind.bit_width, pa.types.is_unsigned_integer(kind)
        low, high = (0, 2**width - 1) if unsigned else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
        near = (0, 1, 2, 6, 7, 2**53, 2**53 + 1, low, high, draw.randint(low, high))
        return draw.choice([one for one in near if low <= one <= high])
    if pa.types.is_floating(kind):
        found = draw.choice((*FLOATS, draw.uniform(-50, 50)))
        with np.errstate(over="ignore"):
            return float(np.float32(found)) if kind == pa.float32() else found
    if pa.types.is_boolean(kind):
        return draw.random() < 0.5
    if pa.types.is_decimal(kind):
        return decimal.Decimal(draw.choice((0, -7, 10**19, draw.randint(-(10**19), 10**19))))
    if pa.types.is_date(kind):
        return datetime.date(1970, 1, 1) + datetime.timedelta(draw.randint(-40000, 40000))
    return draw.choice((*TEXTS, str(uuid.UUID(int=draw.getrandbits(128)))))


def made(draw):
    columns = {name: [value(kind, draw) for _ in range(ROWS)] for name, kind in TYPES.items()}
    for i, items in enumerate(columns["items"]):  # of the same events
        wanted = TYPES["kinds"].value_type
        columns["kinds"][i] = None if items is None else [value(wanted, draw) for _ in items]
    columns["vector"] = [
        None if one is None else [value(pa.float32(), draw) or 0.0 for _ in range(3)] for one in columns["vector"]
    ]
    return pa.table({name: pa.array(values, TYPES[name]) for name, values in columns.items()})


def written(table, path):
    """What the training loader makes of it."""
    pq.write_table(table, path, row_group_size=23)
    manifest = Manifest.scan([path.name], str(path.parent), SCHEMA.columns(LAYOUT))
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    stream = StreamConfig(shards=1, shuffle_rows=1, threads=1)
    loader = build_ordered_loader(manifest, SCHEMA, LAYOUT, ROWS, stream, ranks, labeled=False)
    with contextlib.closing(loader.epoch(0)) as batches:
        (batch,) = batches
    return batch


def in_json(value):
    """As a client writes it: what is larger than JavaScript's integers, and what JSON has no number for, as text or null."""
    if isinstance(value, list):
        return [in_json(one) for one in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**53:
        return str(value)
    return str(value) if isinstance(value, (decimal.Decimal, datetime.date)) else value


def by_json(table):
    body = orjson.dumps({name: in_json(table[name].to_pylist()) for name in table.column_names})
    return requests.table_of(orjson.loads(body), TYPES, "candidates")


def by_arrow(table):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=17)
    return requests.cast(pa.ipc.open_stream(sink.getvalue()).read_all(), TYPES, "candidates")


def served(context, candidates, owners):
    features = Features(SCHEMA, LAYOUT, TYPES, Counters())
    batch, dropped = features(context, candidates, max(context.num_rows, 1), owners)
    assert dropped is None
    return batch


def ids_of(found, key):
    """A list of ids a row."""
    if not hasattr(found, "request"):
        return [part.tolist() for part in found[key].values().split(found[key].lengths().tolist())]
    jagged, shared = found[key]
    parts = [part.tolist() for part in jagged.values().split(jagged.lengths().tolist())]
    return [parts[owner] for owner in found.request.tolist()] if shared else parts


def assert_same(found, expected):
    assert torch.equal(found.dense.view(torch.int32), expected.dense.view(torch.int32))
    for kind in ("sparse", "sequence"):
        keys = getattr(expected, kind).keys()
        assert keys
        for key in keys:
            assert ids_of(getattr(found, kind), key) == ids_of(getattr(expected, kind), key), key


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_row_is_the_same_whichever_way_it_comes(tmp_path, seed):
    table = made(random.Random(seed))
    expected, alone = written(table, tmp_path / "rows.parquet"), np.zeros(ROWS, np.int64)
    for way in (by_json, by_arrow):
        assert_same(served(pa.table({}), way(table), alone), expected)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_and_where_some_of_it_is_the_contexts(tmp_path, seed):
    draw = random.Random(seed)
    shared = [name for name in TYPES if draw.random() < 0.5 and name not in ("items", "kinds")]
    shared += ["items", "kinds"] if draw.random() < 0.5 else []
    owners = np.sort(np.array([draw.randrange(OWNERS) for _ in range(ROWS)]))
    contexts = made(draw).select(shared).slice(0, OWNERS)
    candidates = made(draw).drop_columns(shared)
    rows = candidates
    for name in shared:
        rows = rows.append_column(name, contexts[name].take(pa.array(owners)))
    expected = written(rows.select(list(TYPES)), tmp_path / "rows.parquet")
    for way in (by_json, by_arrow):
        assert_same(served(way(contexts) if shared else pa.table({}), way(candidates), owners), expected)
