"""Recipes on ``raw/`` of ../shared/data, beside the ready splits made from the same files."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from data_loaders.prepare import compose
from tests.helpers.made_tables import UNKNOWN, history, known, run, vocabulary

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
RAW = DATA / "raw"

pytestmark = pytest.mark.skipif(not RAW.is_dir(), reason="no real click logs at ../shared/data/raw")


def raw(name):
    return pq.read_table(RAW / f"{name}.parquet").to_pandas()


def ready(name, split, **options):
    return pq.read_table(DATA / name / f"{split}.parquet", **options)


def spec(name):
    return json.loads((DATA / name / "spec.json").read_text())


def only(recipe, condition, *overrides):
    """The recipe for the rows of a source where ``condition`` holds: all steps act inside a user, so some users do."""
    declaration = compose.load(recipe, overrides)
    for view in (*declaration.views.values(), declaration.examples):
        if view.start in declaration.sources:
            view.steps.insert(0, {"where": condition})
    return declaration


# MovieLens-1M


@pytest.fixture(scope="module")
def ml1m(tmp_path_factory):
    return run(only("ml1m_raw", "user_id % 100 = 0", "order.shuffle=false"), RAW, tmp_path_factory.mktemp("m") / "out")


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_ml1m_raw_is_the_ready_split_row_by_row(ml1m, split):
    expected = {
        (row["user_id"], row["movie_id"]): row
        for row in ready("ml1m", split, filters=[("user_id", "in", range(100, 6041, 100))]).to_pylist()
    }
    users, movies, genres, zips = (set(ml1m.vocabularies[name].values()) for name in ("user", "movie", "genre", "zip"))
    found = ml1m.raw(split)
    ids = pq.read_table(next((ml1m.folder / split).glob("*.parquet")))
    assert len(found) == len(expected) == len(ids) > 500
    left = dict(expected)
    for row in found:
        if row["movie_id"] == UNKNOWN:
            continue
        own = left.pop((row["user_id"], row["movie_id"]))
        assert row["label"] == own["label"]
        assert (row["user_id"], row["gender"], row["age"]) == (own["user_id"], own["gender"], own["age"])
        assert [row["zip"]] == known([own["zip"]], zips)
        assert row["genre1"] == own["genre1"] and row["genres"] == known(own["genres"], genres)
        assert row["hist_movie_id"] == known(own["hist_movie_id"], movies)
        assert row["hist_genre1"] == known(own["hist_genre1"], genres)
    assert {movie for _, movie in left}.isdisjoint(movies), (
        "rows left over are those of movies that train does not have"
    )
    assert users >= {user for user, _ in expected}


def test_ml1m_raw_splits_as_many_rows_of_each_user_as_the_ready_split():
    """All users, without making the histories: the counts of the ready split's description."""
    counts = raw("ml1m").groupby("user_id").size()
    tenth = int((counts // 10).sum())
    assert (len(raw("ml1m")) - 2 * tenth, tenth, tenth) == (805_443, 97_383, 97_383)


# Trivago


@pytest.fixture(scope="module")
def trivago(tmp_path_factory):
    return run("trivago_raw", RAW, tmp_path_factory.mktemp("t") / "out", "order.shuffle=false")


def test_trivago_raw_has_the_rows_clicks_and_histories_of_the_ready_split(trivago):
    splits = ("train", "valid", "test")
    ours = pd.concat([pq.read_table(trivago.folder / split).to_pandas().assign(split=split) for split in splits])
    theirs = pd.concat([ready("trivago", split).to_pandas() for split in splits])
    assert len(ours) == len(theirs) == 245_022 + 31_166 + 36_326
    assert ours.label.sum() == theirs.label.sum() == 13_596
    assert [round(ours.split.eq(split).mean(), 2) for split in splits] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert ours.groupby("session_id").split.nunique().max() == 1
    values = trivago.vocabularies

    def keys(frame, items, positions, price):
        """A row as one tuple, without the order of rows."""
        return sorted(zip(frame.user_id, frame.session_id, positions, items, price, frame.label))

    codes = {value: code for code, value in values["item"].items()}
    places = {value: code for code, value in values["position"].items()}
    theirs_items = theirs.item_id.map(codes).fillna(1).astype(int)
    assert keys(ours, ours.item_id, ours.position, np.expm1(ours.price).round().astype(int)) == keys(
        theirs, theirs_items, theirs.position.map(places), theirs.price
    )
    encoded = [tuple(codes.get(item, 1) for item in row) for row in theirs.hist_items]
    assert sum(map(len, ours.hist_items)) == sum(map(len, encoded)) == 2_995_655
    found = sorted(zip(ours.user_id, ours.session_id, ours.position, map(tuple, ours.hist_items)))
    assert found == sorted(zip(theirs.user_id, theirs.session_id, theirs.position.map(places), encoded))


def test_trivago_raw_has_a_vocabulary_of_train_alone(trivago):
    train = trivago.raw("train", ["item_id", "city", "position"])
    for table, column in (("item", "item_id"), ("city", "city"), ("position", "position")):
        values = [row[column] for row in train]
        assert vocabulary(values) == {k: v for k, v in trivago.vocabularies[table].items() if k > 1}
        assert sum(trivago.counts(table).values()) == len(train)


# Criteo


def test_criteo_raw_keeps_every_row_and_knows_what_train_saw_twice(tmp_path):
    made = run("criteo_raw", RAW, tmp_path / "out", "order.shuffle=false", "keep=[src]")
    frame = raw("criteo_39f")
    tables = {split: pq.read_table(tmp_path / "out" / split).to_pandas() for split in ("train", "valid", "test")}
    assert sum(map(len, tables.values())) == len(frame) == 19_332
    assert sum(table.label.sum() for table in tables.values()) == frame.label.sum()
    assert len(tables["train"]) / 19_332 == pytest.approx(0.8, abs=0.01)
    for split, rows in (("valid", 1906), ("test", 1891)):
        assert len(tables[split]) == pytest.approx(rows, rel=0.1)
    train = made.raw("train", ["C1", "C3", "C20"])
    for name in ("C1", "C3", "C20"):
        values = [row[name] for row in train]
        known_values = made.counts(name)
        assert min(known_values.values()) >= 2
        assert sum(known_values.values()) + values.count(UNKNOWN) + values.count(None) == len(train)
        assert len(known_values) <= (frame[name].value_counts() >= 2).sum()
    missing = sum(int((table.C3 == 0).sum()) for table in tables.values())
    assert missing == frame.C3.isna().sum()
    numbers = np.sort(np.concatenate([table.I2 for table in tables.values()]))
    assert numbers == pytest.approx(np.sort(np.log1p(frame.I2.fillna(0).clip(lower=0))), rel=1e-6)


# Amazon Grocery


@pytest.fixture(scope="module")
def grocery(tmp_path_factory):
    """Examples of one user in ten; negatives and histories are of the whole log."""
    declaration = compose.load("amazon_grocery_raw", ["order.shuffle=false"])
    declaration.examples.steps.insert(0, {"where": "user_id % 10 = 0"})
    return run(declaration, RAW, tmp_path_factory.mktemp("g") / "out")


def test_amazon_grocery_raw_pairs_each_purchase_with_an_item_never_bought(grocery):
    purchases, items = raw("amazon_grocery_interactions"), raw("amazon_grocery_items")
    assert purchases.split.value_counts().to_dict() == {"train": 121_892, "dev": 14_681, "test": 14_681}
    bought = set(zip(purchases.user_id, purchases.item_id))
    category = dict(zip(items.item_id, items.cate_id))
    categories = set(grocery.vocabularies["category"].values())
    for split, their_name in (("train", "train"), ("valid", "dev"), ("test", "test")):
        found = grocery.raw(split, ["label", "user_id", "item_id", "cate_id"])
        positives, negatives = found[0::2], found[1::2]
        own = purchases[(purchases.split == their_name) & (purchases.user_id % 10 == 0)]
        assert len(positives) == len(negatives) == len(own) > 1000
        assert [row["user_id"] for row in positives] == own.user_id.tolist()
        assert {row["label"] for row in positives} == {1} and {row["label"] for row in negatives} == {0}
        for row, item in zip(positives, own.item_id):
            assert row["item_id"] == item or row["item_id"] == UNKNOWN
        for row in negatives:
            assert (row["user_id"], row["item_id"]) not in bought
        for row in found:
            assert row["item_id"] == UNKNOWN or [row["cate_id"]] == known([category[row["item_id"]]], categories)


def test_amazon_grocery_raw_joins_the_items_lists(grocery):
    items = raw("amazon_grocery_items").set_index("item_id")
    values = set(grocery.vocabularies["item"].values())
    for row in grocery.raw("test", ["item_id", "also_view_or_buy", "substitute"]):
        if row["item_id"] == UNKNOWN:
            continue
        for column in ("also_view_or_buy", "substitute"):
            assert row[column] == known(items.loc[row["item_id"], column].tolist()[-50:], values)


def test_amazon_grocery_raw_histories_are_of_earlier_days(grocery):
    of_user = {}
    for purchase in raw("amazon_grocery_interactions").to_dict("records"):
        of_user.setdefault(purchase["user_id"], []).append(purchase)
    items, categories = (set(grocery.vocabularies[name].values()) for name in ("item", "category"))
    wanted = ["user_id", "timestamp", "hist_items", "hist_categories"]
    for row in grocery.raw("test", wanted) + grocery.raw("train", wanted)[:5000]:
        before = (of_user[row["user_id"]], "user_id", "timestamp")
        key = (row["user_id"], row["timestamp"])
        assert row["hist_items"] == known(history(*before, "item_id", *key), items)
        assert row["hist_categories"] == known(history(*before, "cate_id", *key), categories)


# Census


def plain(column):
    return [value if isinstance(value, str) else None for value in column]


def test_census_raw_makes_the_columns_of_the_tutorial(tmp_path):
    made = run("census_raw", RAW, tmp_path / "out", "order.shuffle=false")
    frame = raw("census_income")
    place = np.arange(len(frame))
    parts = {
        "train": frame[(frame.split == "train") & (place % 10 != 0)],
        "valid": frame[(frame.split == "train") & (place % 10 == 0)],
        "test": frame[frame.split == "test"],
    }
    train = parts["train"]
    bounds = [18, 25, 30, 35, 40, 45, 50, 55, 60, 65]
    hours = np.sort(train.hours_per_week.to_numpy())
    quantiles = [hours[int(np.ceil(k * len(hours) / 20)) - 1] for k in range(1, 20)]
    for split, own in parts.items():
        found, decoded = pd.DataFrame(made.rows(split)), made.raw(split)
        assert found.label.tolist() == own.label.tolist()
        assert found.age_bucket.tolist() == (1 + np.searchsorted(bounds, own.age, side="right")).tolist()
        standard = (own.age - train.age.mean()) / train.age.std(ddof=0)
        assert found.age.to_numpy() == pytest.approx(standard.to_numpy(), abs=1e-4)
        assert found.education_num.to_numpy() == pytest.approx((own.education_num.to_numpy() - 1) / 15, abs=1e-6)
        assert found.capital_gain.to_numpy() == pytest.approx(np.log1p(own.capital_gain).to_numpy(), rel=1e-6)
        normal = np.searchsorted(quantiles, own.hours_per_week, side="right") / 19
        assert found.hours_per_week.to_numpy() == pytest.approx(normal, abs=1e-6)
        assert [row["occupation"] for row in decoded] == plain(own.occupation)
        crossed = own.education.str.cat(own.occupation, sep="\x1f")  # NaN where a part is missing
        kept = set(vocabulary(train.education.str.cat(train.occupation, sep="\x1f").dropna().tolist(), 2).values())
        pairs = known(plain(crossed), kept)
        assert [row["education_x_occupation"] for row in decoded] == pairs
    assert len(parts["test"]) == 16_281
