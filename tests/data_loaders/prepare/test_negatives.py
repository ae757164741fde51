"""Negative sampling: never a touched item, the same draws everywhere, and the frequencies of its distribution."""

import random
from collections import Counter, defaultdict

import pyarrow as pa
import pytest

from data_loaders.prepare import negatives
from data_loaders.prepare.declaration import Negatives
from tests.helpers import raw_tables


def add(engine, table, touched=None, step="step", **changes):
    spec = Negatives(**{"user": "user", "item": "item", "count": 2, **changes})
    return negatives.add(engine, table, table if touched is None else touched, spec, step)


def log(seed=0, rows=200, users=15, items=40):
    draw = random.Random(seed)
    item = [min(draw.randrange(items), draw.randrange(items)) for _ in range(rows)]
    return {
        "user": [draw.randrange(users) for _ in range(rows)],
        "item": [f"item {number}" for number in item],
        "category": [number % 7 for number in item],
    }


@pytest.mark.parametrize("strategy", negatives.STRATEGIES)
def test_negatives_follow_their_row_and_are_items_that_the_user_never_touched(engine, tmp_path, strategy):
    columns = log()
    table = raw_tables.make(engine, tmp_path, **columns, time=list(range(200)))
    found = raw_tables.rows(engine, add(engine, table, strategy=strategy, count=3, attributes=["category"]))
    assert len(found) == 4 * 200
    touched = defaultdict(set)
    for user, item in zip(columns["user"], columns["item"]):
        touched[user].add(item)
    category = dict(zip(columns["item"], columns["category"]))
    for row, group in enumerate(zip(*(found[place::4] for place in range(4)))):
        assert [(r["__row"], r["__part"], r["label"]) for r in group] == [(row, n, int(n == 0)) for n in range(4)]
        assert {(r["user"], r["time"]) for r in group} == {(columns["user"][row], row)}
        assert group[0]["item"] == columns["item"][row]
        drawn = [r["item"] for r in group[1:]]
        assert len(set(drawn)) == 3 and not set(drawn) & touched[columns["user"][row]]
        assert all(r["category"] == category[r["item"]] for r in group)


def test_both_engines_draw_the_same(tmp_path, spark_session):
    from tests.data_loaders.prepare.conftest import open_engine

    found = []
    for name in ("duckdb", "spark"):
        engine = open_engine(name, tmp_path / name)
        table = raw_tables.make(engine, tmp_path, **log())
        made = [add(engine, table, strategy=strategy, step=strategy, seed=5) for strategy in negatives.STRATEGIES]
        found.append([raw_tables.column(engine, table, "item") for table in made])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_draws_depend_on_seed_and_place_alone(engine, tmp_path):
    columns = log()
    whole = raw_tables.make(engine, tmp_path, **columns)
    order = random.Random(1).sample(range(200), 200)
    shuffled = {name: [values[place] for place in order] for name, values in columns.items()}
    mixed = raw_tables.make(engine, tmp_path, **shuffled, __row=order)

    def drawn(table, step, seed=1):
        return raw_tables.column(engine, add(engine, table, whole, step, seed=seed), "item")

    assert drawn(whole, "one") == drawn(mixed, "two")
    assert drawn(whole, "one") != drawn(whole, "three", seed=2)


def chi_square(counts, shares):
    total = sum(counts.values())
    return sum((counts[item] - total * share) ** 2 / (total * share) for item, share in shares.items())


# Nobody among the positives touched anything, so each draw has the whole distribution. 19 degrees of freedom: the
# 99.9th percentile of chi-square is 43.8.
@pytest.mark.parametrize("strategy", negatives.STRATEGIES)
def test_frequencies_are_those_of_the_strategy(engine, tmp_path, strategy):
    rows = 20_000 if engine.name == "duckdb" else 4_000
    popularity = {item: item + 1 for item in range(20)}
    items = [item for item, count in popularity.items() for _ in range(count)]
    touched = raw_tables.make(engine, tmp_path, user=[-1] * len(items), item=items)
    table = raw_tables.make(engine, tmp_path, user=list(range(rows)), item=[None] * (rows - 1) + [0])
    made = add(engine, table, touched, strategy=strategy, count=1)
    counts = Counter(row["item"] for row in raw_tables.rows(engine, made) if row["label"] == 0)
    shares = {item: 1 / 20 if strategy == "uniform" else popularity[item] / len(items) for item in range(20)}
    assert sum(counts.values()) == rows
    assert chi_square(counts, shares) < 43.8


def test_pairs_of_negatives_are_independent(engine, tmp_path):
    rows = 20_000 if engine.name == "duckdb" else 4_000
    touched = raw_tables.make(engine, tmp_path, user=[-1] * 5, item=list(range(5)))
    table = raw_tables.make(engine, tmp_path, user=list(range(rows)), item=[None] * (rows - 1) + [0])
    items = [row["item"] for row in raw_tables.rows(engine, add(engine, table, touched)) if row["label"] == 0]
    counts = Counter(zip(items[::2], items[1::2]))
    shares = {(a, b): 1 / 20 for a in range(5) for b in range(5) if a != b}
    assert chi_square(counts, shares) < 43.8
    following = Counter(zip(items[1::2], items[2::2]))  # the next row's first: any of the 25 pairs
    assert chi_square(following, {(a, b): 1 / 25 for a in range(5) for b in range(5)}) < 51.2  # 24 degrees of freedom


def test_rows_whose_draws_are_nearly_all_refused_are_served_in_later_rounds(engine, tmp_path):
    items = list(range(300))
    touched = raw_tables.make(engine, tmp_path, user=[1] * 297 + [2] * 3, item=items)
    table = raw_tables.make(engine, tmp_path, user=[1, 1, 2], item=[5, 6, 298])
    found = raw_tables.rows(engine, add(engine, table, touched, count=3))
    drawn = [[row["item"] for row in found[place + 1 : place + 4]] for place in (0, 4, 8)]
    assert sorted(drawn[0]) == sorted(drawn[1]) == [297, 298, 299]
    assert max(drawn[2]) < 297


def test_an_item_that_is_not_in_the_touched_table_is_not_its_own_negative(engine, tmp_path):
    touched = raw_tables.make(engine, tmp_path, user=[1, 1, 1], item=[1, 2, 3])
    table = raw_tables.make(engine, tmp_path, user=pa.array([None] * 20, pa.int64()), item=[1] * 20)
    drawn = {row["item"] for row in raw_tables.rows(engine, add(engine, table, touched, count=1)) if row["label"] == 0}
    assert drawn == {2, 3}


def test_a_user_who_touched_too_much_is_named_with_numbers(engine, tmp_path):
    touched = {"user": ["ann"] * 9 + ["bob"], "item": list(range(10))}
    table = raw_tables.make(engine, tmp_path, **touched)
    with pytest.raises(ValueError, match="user='ann' touched 9 of 10 items, .* draw 2 negatives"):
        add(engine, table)
    assert not list(engine.work.glob("steps/step/round-*"))  # known before anything is drawn
    with pytest.raises(ValueError, match=r"10 negatives from 10 item\(s\) are not possible"):
        add(engine, table, count=10)


def test_what_is_nearly_impossible_ends_after_the_last_round(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(negatives, "_ROUNDS", 2)
    popular = {"user": [1] * 5000 + [2, 2], "item": [7] * 5000 + [8, 9]}
    table = raw_tables.make(engine, tmp_path, user=[1], item=[7])
    with pytest.raises(ValueError, match="user=1 touched 1 of 3 items"):
        add(engine, table, raw_tables.make(engine, tmp_path, **popular), strategy="popularity")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item": "itm"}, "did you mean 'item'"),
        ({"strategy": "popular"}, "strategy: 'popular' .* did you mean 'popularity'"),
        ({"count": 0}, "count is 0"),
        ({"attributes": ["category"]}, "table 'None': 'category'"),
    ],
)
def test_what_does_not_fit_is_named(engine, tmp_path, changes, message):
    table = raw_tables.make(engine, tmp_path, user=[1], item=[1], category=[1])
    with pytest.raises(ValueError, match=message):
        add(engine, table, table.drop("category"), **changes)
