"""Histories against a naive reference, which goes through the whole log for each example."""

import random
from datetime import datetime, timedelta

import pyarrow as pa
import pytest

from data_loaders.prepare import history
from data_loaders.prepare.declaration import History
from tests.helpers import raw_tables


def encode_value(feature, events, column):
    """Stands for a vocabulary: the id is the value + 2, 0 for a missing value."""
    return events.mutate(**{feature: (events[column].cast("int32") + 2).fill_null(0)})


def reference(examples, events, k, value):
    """For each example the ids of the k events before it that have the smallest distance, oldest first."""
    found = {}
    for example in examples:
        user, time = example["user"], example["time"]
        before = [
            (event["time"], place, event[value])
            for place, event in enumerate(events)
            if None not in (user, time, event["user"], event["time"]) and event["user"] == user and event["time"] < time
        ]
        ids = [0 if found is None else found + 2 for _, _, found in sorted(before, key=lambda event: event[:2])]
        found[example["__row"]] = ids[-k:]
    return {row: ids for row, ids in found.items() if ids}


def log(seed, rows, users, times):
    """Random rows with ties of time, and with missing users, times and values."""
    draw = random.Random(seed)

    def maybe(value):
        return None if draw.random() < 0.05 else value

    return [
        {
            "__row": row,
            "user": maybe(draw.randrange(users)),
            "time": maybe(draw.randrange(times)),
            "item": maybe(draw.randrange(1000)),
            "kind": draw.randrange(10),
        }
        for row in range(rows)
    ]


def make(engine, tmp_path, rows, **changed):
    kinds = {name: pa.int64() for name in ("__row", "user", "time", "item")} | {"kind": pa.int32()} | changed
    return raw_tables.make(
        engine,
        tmp_path,
        **{name: pa.array([row.get(name) for row in rows], kind) for name, kind in kinds.items()},
    )


def build(engine, examples, events, spec=None, **features):
    spec = spec or History("log", ["user"], "time", "item")
    return history.build(engine, examples, events, spec, features, encode_value)


def found(engine, table, feature):
    return {row["__row"]: row[feature] for row in raw_tables.rows(engine, table)}


@pytest.mark.parametrize(("seed", "k"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)])
def test_events_before_each_event_as_the_reference_finds_them(engine, tmp_path, seed, k):
    rows = log(seed, rows=400, users=1 + 4 * seed, times=60)
    events = make(engine, tmp_path, rows)
    built = build(engine, events, events, items=("item", k), kinds=("kind", 2 * k))
    assert found(engine, built, "items") == reference(rows, rows, k, "item")
    assert found(engine, built, "kinds") == reference(rows, rows, 2 * k, "kind")


def test_histories_that_reach_over_blocks(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(history, "_SMALLEST_BLOCK", 1)
    rows = log(6, rows=300, users=2, times=1000)
    events = make(engine, tmp_path, rows)
    built = build(engine, events, events, items=("item", 7), kinds=("kind", 3))
    assert found(engine, built, "items") == reference(rows, rows, 7, "item")
    assert found(engine, built, "kinds") == reference(rows, rows, 3, "kind")


def test_an_example_after_a_whole_number_of_blocks(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(history, "_SMALLEST_BLOCK", 1)
    rows = log(15, rows=100, users=12, times=20)
    asked = [{"__row": row, "user": row % 12, "time": 20 + row // 12, "item": 0, "kind": 0} for row in range(24)]
    built = build(engine, make(engine, tmp_path, asked), make(engine, tmp_path, rows), items=("item", 2))
    assert found(engine, built, "items") == reference(asked, rows, 2, "item")


def test_blocks_are_in_order_whatever_the_order_of_the_rows(engine, tmp_path):
    places = random.Random(16).sample(range(1, 21), 20)
    events = raw_tables.make(engine, tmp_path, __by_0=[1] * 20, __seen=places, items=places)
    blocks = history._blocks(events, History("log", ["user"], "time", "item"), ["items"], 8)
    lists = {row["__block"]: row["items"] for row in engine.fetch(blocks).to_pylist()}
    assert lists == {0: list(range(1, 9)), 1: list(range(9, 17)), 2: list(range(17, 21))}


def test_portions_of_users_give_the_same(engine, tmp_path, monkeypatch):
    rows = log(7, rows=300, users=20, times=100)
    events = make(engine, tmp_path, rows)
    monkeypatch.setattr(engine, "chunk_bytes", 40)
    built = build(engine, events, events, items=("item", 4))
    assert found(engine, built, "items") == reference(rows, rows, 4, "item")
    assert len(list(engine.work.glob("histories/items/blocks-*"))) >= 8


def test_examples_need_not_be_events(engine, tmp_path):
    rows, asked = log(8, rows=200, users=5, times=40), log(9, rows=100, users=8, times=60)
    built = build(engine, make(engine, tmp_path, asked), make(engine, tmp_path, rows), items=("item", 5))
    assert found(engine, built, "items") == reference(asked, rows, 5, "item")


def test_the_future_changes_no_history(engine, tmp_path):
    rows = log(10, rows=200, users=4, times=50)
    past = [row for row in rows if row["time"] is not None and row["time"] < 25]
    examples = make(engine, tmp_path, past)
    seen, whole = make(engine, tmp_path, past), make(engine, tmp_path, rows)
    assert found(engine, build(engine, examples, seen, a=("item", 5)), "a") == found(
        engine, build(engine, examples, whole, b=("item", 5)), "b"
    )


def test_events_of_the_examples_own_time_never_count(engine, tmp_path):
    events = make(engine, tmp_path, [{"__row": row, "user": 1, "time": 5, "item": row, "kind": 0} for row in range(3)])
    assert found(engine, build(engine, events, events, items=("item", 5)), "items") == {}


def test_events_of_equal_time_keep_the_order_of_the_log(engine, tmp_path):
    times = [5, 5, 4, 5, 6]
    rows = [{"__row": row, "user": 1, "time": time, "item": row, "kind": 0} for row, time in enumerate(times)]
    events = make(engine, tmp_path, list(reversed(rows)))
    assert found(engine, build(engine, events, events, items=("item", 5)), "items")[4] == [4, 2, 3, 5]


def test_a_condition_chooses_the_events(engine, tmp_path):
    rows = log(11, rows=200, users=4, times=50)
    events = make(engine, tmp_path, rows)
    spec = History("log", ["user"], "time", "item", where="kind < 5")
    built = build(engine, events, events, spec, items=("item", 5))
    chosen = [row for row in rows if row["kind"] < 5]
    assert found(engine, built, "items") == reference(rows, chosen, 5, "item")


def test_users_of_two_columns_and_times_that_are_timestamps(engine, tmp_path):
    rows = log(12, rows=200, users=6, times=50)
    start = datetime(2024, 1, 1)
    for row in rows:
        row["time"] = None if row["time"] is None else start + timedelta(microseconds=row["time"])
        row["user"] = None if row["user"] is None else f"u{row['user']}"
    events = make(engine, tmp_path, rows, user=pa.string(), time=pa.timestamp("us"))
    built = build(engine, events, events, History("log", ["user", "kind"], "time", "item"), items=("item", 5))
    for row in rows:
        row["user"] = None if row["user"] is None else (row["user"], row["kind"])
    assert found(engine, built, "items") == reference(rows, rows, 5, "item")


def test_widths_of_integers_may_differ_but_not_families(engine, tmp_path):
    rows = log(13, rows=50, users=3, times=20)
    events, narrow = make(engine, tmp_path, rows), make(engine, tmp_path, rows, user=pa.int32(), time=pa.int16())
    assert found(engine, build(engine, narrow, events, items=("item", 5)), "items") == reference(rows, rows, 5, "item")
    text = make(engine, tmp_path, [{**row, "user": "a"} for row in rows], user=pa.string())
    with pytest.raises(ValueError, match="'user' is string here and 'user' is int64 in 'log'"):
        build(engine, text, events, items=("item", 5))


def test_missing_columns_are_named(engine, tmp_path):
    events = make(engine, tmp_path, log(14, rows=5, users=2, times=3))
    with pytest.raises(
        ValueError, match="features.items.make.history.value, table 'log': 'itm' .* did you mean 'item'"
    ):
        build(engine, events, events, items=("itm", 5))
    with pytest.raises(ValueError, match="the examples: 'time'"):
        build(engine, events.drop("time"), events, items=("item", 5))
