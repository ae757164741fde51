"""Rows that a policy drops keep their place, without ids, weight or influence on the number of steps."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders.column_decoders import RowError
from data_loaders.loader import Loader
from data_loaders.manifest import Manifest
from data_loaders.schema import Feature, Schema, Table
from tests.helpers.decoding import decoded

SCHEMA = Schema(
    tables={"t": Table(50), "h": Table(100), "p": Table(9)},
    on_bad_label="drop",
    features={
        "place": Feature("sparse", table="p", column="other", on_null="missing"),
        "plain": Feature("sparse", table="t", on_out_of_range="drop"),
        "other": Feature("sparse", table="t", on_null="missing"),
        "hashed": Feature("sparse", table="h", ids="hash", on_null="drop"),
        "items": Feature("sequence", table="t", max_length=4, target="plain", history="e", on_out_of_range="drop"),
        "kinds": Feature("sequence", table="h", ids="hash", max_length=4, target="hashed", history="e", on_null="drop"),
        "price": Feature("dense", on_non_finite="drop", on_null="drop"),
    },
)


def good_rows(count):
    return [
        {
            "label": i % 2,
            "plain": i % 50,
            "other": i % 7,
            "hashed": f"h{i}",
            "items": list(range(i % 4)),
            "kinds": [f"k{j}" for j in range(i % 4)],
            "price": float(i),
        }
        for i in range(count)
    ]


FAULTS = [
    ("label", None, {"label.null": 1}),
    ("label", 2, {"label.not_0_or_1": 1}),
    ("label", -1, {"label.not_0_or_1": 1}),
    ("plain", 50, {"plain.out_of_range": 1}),
    ("plain", -1, {"plain.out_of_range": 1}),
    ("hashed", None, {"hashed.null": 1}),
    ("items", [1, 99, -3], {"items.out_of_range": 2}),
    ("kinds", None, {"kinds.null": 1}),
    ("price", None, {"price.null": 1}),
    ("price", float("nan"), {"price.non_finite": 1}),
    ("price", float("-inf"), {"price.non_finite": 1}),
]
TYPES = pa.schema(
    [
        ("label", pa.int64()),
        ("plain", pa.int64()),
        ("other", pa.int64()),
        ("hashed", pa.string()),
        ("items", pa.list_(pa.int64())),
        ("kinds", pa.list_(pa.string())),
        ("price", pa.float64()),
    ]
)


def faulty(count=600):
    """Rows with every fault, and which rows they are."""
    rows = good_rows(count)
    places = [37 * i + 5 for i in range(len(FAULTS))]
    for place, (name, value, _) in zip(places, FAULTS):
        rows[place][name] = value
        if name == "items":
            rows[place]["kinds"] = ["k"] * 3
    return rows, places


def test_decoding_drops_whole_rows_and_counts_why():
    rows, places = faulty()
    table = {name: pa.array([row[name] for row in rows], TYPES.field(name).type) for name in TYPES.names}
    columns, counts, decoder = decoded(table, SCHEMA)
    assert columns.dropped.nonzero()[0].tolist() == places
    expected = {"rows.dropped": len(places)}
    for _, _, counted in FAULTS:
        for name, number in counted.items():
            expected[name] = expected.get(name, 0) + number
    assert counts == expected
    assert (columns.ids[:, places] == -1).all() and (columns.numbers[:, places] == 0).all()
    for bags in columns.bags:
        assert (np.diff(bags.offsets)[places] == 0).all()
    clean, _, _ = decoded(
        {name: array.take(np.delete(np.arange(600), places)) for name, array in table.items()}, SCHEMA
    )
    kept = np.delete(np.arange(600), places)
    assert np.array_equal(columns.ids[:, kept], clean.ids) and np.array_equal(columns.numbers[:, kept], clean.numbers)
    for bags, alone in zip(columns.bags, clean.bags):
        assert np.array_equal(bags.values, alone.values)
        assert np.array_equal(np.diff(bags.offsets)[kept], np.diff(alone.offsets))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_keep_their_steps(tmp_path, shuffle, world_size):
    rows, places = faulty()
    pq.write_table(pa.Table.from_pylist(rows, TYPES), tmp_path / "log.parquet", row_group_size=100)
    manifest = Manifest.scan(["log.parquet"], str(tmp_path), [])
    options = {
        "batch_size": 36,
        "shards": 12,
        "shuffle": shuffle,
        "shuffle_rows": 144,
        "threads": 2,
        "prefetch_batches": 2,
    }
    loaders = [
        Loader(
            manifest,
            SCHEMA,
            SCHEMA.layout(attention=True),
            **options,
            rank=rank,
            world_size=world_size,
            seed=1,
            record_origin=True,
        )
        for rank in range(world_size)
    ]
    epochs = [list(loader.epoch(0)) for loader in loaders]
    seen = []
    for batches in zip(*epochs, strict=True):
        assert sum(batch.cursor.local_rows for batch in batches) == batches[0].cursor.rows
        counted = 0
        for batch in batches:
            cursor, real = batch.cursor, batch.cursor.local_rows
            dropped = np.isin(cursor.origin, places)
            assert np.array_equal(dropped, np.zeros(real, bool) if cursor.dropped is None else cursor.dropped)
            assert batch.weights[:real].tolist() == (~dropped).astype(float).tolist()
            assert not batch.weights[real:].any()
            assert batch.normalizer.item() == (~dropped).sum()
            counted += int(batch.normalizer.item())
            for jagged in (batch.sparse, batch.sequence):
                lengths = jagged.lengths().view(len(jagged.keys()), -1)  # [K, B]
                assert not lengths[:, :real][:, dropped].any()
            seen += cursor.origin.tolist()
        assert (
            counted
            == batches[0].cursor.rows - np.isin(np.concatenate([b.cursor.origin for b in batches]), places).sum()
        )
    assert sorted(seen) == list(range(600))
    assert sum(loader.counters.get("rows.dropped", 0) for loader in loaders) == len(places)


def test_a_history_may_lose_an_id_where_its_row_is_dropped_anyway():
    features = {
        "target": Feature("sparse", table="t"),
        "items": Feature("sequence", table="t", max_length=4, target="target", history="e", on_null="missing"),
        "kinds": Feature("sequence", table="t", max_length=4, target="target", history="e", on_out_of_range="drop"),
    }
    given = Schema(tables={"t": Table(50)}, features=features)
    table = {"label": [0, 1], "target": [1, 2], "items": [[1, None], [3]], "kinds": [[1, 99], [3]]}
    columns, _, _ = decoded(table, given)
    assert columns.dropped.tolist() == [True, False]
    with pytest.raises(RowError, match="'items' .* has a missing id in a history"):
        decoded({**table, "kinds": [[1, 2], [3]]}, given)


def test_without_the_policy_the_same_rows_are_errors():
    strict = Schema(
        tables=SCHEMA.tables, features={"plain": Feature("sparse", table="t"), "other": Feature("sparse", table="t")}
    )
    rows, places = faulty()
    table = {
        name: pa.array([row[name] for row in rows], TYPES.field(name).type) for name in ("label", "plain", "other")
    }
    with pytest.raises(RowError, match="on_bad_label=drop") as failed:
        decoded(table, strict)
    assert failed.value.row == places[0]
