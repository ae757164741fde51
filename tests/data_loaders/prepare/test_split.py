"""Which rows are train, valid or test."""

import hashlib
from datetime import date, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders.prepare import compose
from data_loaders.prepare.declaration import HashSplit, LastSplit, Split, TimeSplit
from data_loaders.prepare.split import assign, sample_negatives
from tests.helpers import made_tables, raw_tables


def splits(engine, tmp_path, split, **columns):
    """By row; None for one that is left out."""
    table = raw_tables.make(engine, tmp_path, **columns)
    found = {row["__row"]: row["__split"] for row in raw_tables.rows(engine, assign(table, split))}
    assert None not in found.values()
    return [found.get(row["__row"]) for row in raw_tables.rows(engine, table)]


def test_without_a_rule_all_rows_are_train(engine, tmp_path):
    assert splits(engine, tmp_path, Split(), x=[1, 2]) == ["train", "train"]


def test_negatives_of_train_are_sampled_and_nothing_else_is(engine, tmp_path):
    kinds = [(name, label) for name in ("train", "valid") for label in (0, 1, None)]
    columns = {"s": [name for name, _ in kinds] * 2000, "label": [label for _, label in kinds] * 2000}
    table = assign(raw_tables.make(engine, tmp_path, **columns), Split(column="s"))
    found = [(row["s"], row["label"]) for row in raw_tables.rows(engine, sample_negatives(table, "label", 0.3))]
    counts = {kind: found.count(kind) for kind in kinds}
    drawn = counts.pop(("train", 0))
    assert set(counts.values()) == {2000}
    assert abs(drawn - 600) < 4 * (2000 * 0.3 * 0.7) ** 0.5  # four standard deviations


def test_bounds_of_time_belong_to_what_they_begin(engine, tmp_path):
    split = Split(time=TimeSplit("t", valid=10, test=20))
    found = splits(engine, tmp_path, split, t=[9, 10, 19, 20, 99, None])
    assert found == ["train", "valid", "valid", "test", "test", None]


def test_either_bound_of_time_may_be_left_out(engine, tmp_path):
    t = [1.0, 2.5, float("nan")]
    assert splits(engine, tmp_path, Split(time=TimeSplit("t", test=2.5)), t=t) == ["train", "test", None]
    assert splits(engine, tmp_path, Split(time=TimeSplit("t", valid=2.5)), t=t) == ["train", "valid", None]


@pytest.mark.parametrize("bound", ["2014-10-28T12:00:00", "2014-10-28 14:00:00+02:00", "2014-10-28T12:00:00Z"])
def test_bounds_of_timestamps_are_iso_dates_in_utc(engine, tmp_path, bound):
    times = [datetime(2014, 10, 28, 11, 59, 59, 999999), datetime(2014, 10, 28, 12), None]
    found = splits(engine, tmp_path, Split(time=TimeSplit("t", test=bound)), t=pa.array(times, pa.timestamp("us")))
    assert found == ["train", "test", None]


def test_a_bound_of_whole_numbers_may_lie_between_them(engine, tmp_path):
    assert splits(engine, tmp_path, Split(time=TimeSplit("t", test=10.5)), t=[10, 11]) == ["train", "test"]


def test_bounds_of_timestamps_with_a_zone_are_moments(engine, tmp_path):
    times = [datetime(2014, 10, 28, 11, 59, 59), datetime(2014, 10, 28, 12)]
    split = Split(time=TimeSplit("t", test="2014-10-28T14:00:00+02:00"))
    assert splits(engine, tmp_path, split, t=pa.array(times, pa.timestamp("us", "UTC"))) == ["train", "test"]


def test_bounds_of_dates_are_iso_dates(engine, tmp_path):
    split = Split(time=TimeSplit("d", valid="2014-10-27", test=date(2014, 10, 28)))
    found = splits(engine, tmp_path, split, d=[date(2014, 10, 26), date(2014, 10, 27), date(2014, 10, 28)])
    assert found == ["train", "valid", "test"]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (TimeSplit("tme", test=1), "'time'"),
        (TimeSplit("time", test="2014-10-28"), "so give a number"),
        (TimeSplit("time", valid=3, test=1), "exchange them"),
        (TimeSplit("name", test=1), "select step"),
        (TimeSplit("day", test="28.10.2014"), "ISO date"),
    ],
)
def test_bounds_that_do_not_fit_are_named(engine, tmp_path, split, message):
    columns = {"time": [1], "name": ["a"], "day": [date(2014, 10, 26)]}
    with pytest.raises(ValueError, match=message):
        splits(engine, tmp_path, Split(time=split), **columns)


def test_hash_is_md5_of_seed_and_values(engine, tmp_path):
    users, days = [7, 7, 8, 9, None, None, 1, 2, 3] * 4, ["a", "b", "a", None] * 9
    split = HashSplit(["user", "day"], valid=0.3, test=0.4, seed=5)
    found = splits(engine, tmp_path, Split(hash=split), user=users, day=days)
    expected = []
    for user, day in zip(users, days):
        text = "\x1f".join(["5", *("\x1e" if value is None else str(value) for value in (user, day))])
        place = int(hashlib.md5(text.encode()).hexdigest()[:13], 16) / 16**13
        expected.append("test" if place < 0.4 else "valid" if place < 0.7 else "train")
    assert found == expected
    assert {found for user, found in zip(users, expected) if user is None} == {"test", "valid"}


def test_hash_gives_the_shares_and_keeps_users_whole(engine, tmp_path):
    users = [f"user {number // 2}" for number in range(20_000)]
    found = splits(engine, tmp_path, Split(hash=HashSplit(["user"], valid=0.1, test=0.25)), user=users)
    assert found[::2] == found[1::2]
    # Four standard deviations of a binomial of 10,000 users.
    assert abs(found.count("valid") / 20_000 - 0.1) < 4 * (0.1 * 0.9 / 10_000) ** 0.5
    assert abs(found.count("test") / 20_000 - 0.25) < 4 * (0.25 * 0.75 / 10_000) ** 0.5


def test_hash_of_a_float_is_refused(engine, tmp_path):
    with pytest.raises(ValueError, match="'price' is float64"):
        splits(engine, tmp_path, Split(hash=HashSplit(["price"], test=0.5)), price=[0.5])


def last(engine, tmp_path, users, times, **counts):
    split = Split(last=LastSplit(["user"], ["time"], **counts))
    return splits(engine, tmp_path, split, user=users, time=times)


def test_last_rows_of_each_user_by_count(engine, tmp_path):
    users = [1, 2, 1, 1, 2, 1, 3]
    times = [9, 1, 2, 3, 1, None, 5]
    # User 2's times are equal: the later row is the last. A missing time is the earliest.
    found = last(engine, tmp_path, users, times, valid=1, test=1)
    assert found == ["test", "valid", "train", "valid", "test", "train", "test"]


def test_last_rows_by_share_are_rounded_down(engine, tmp_path):
    users = [1] * 100 + [2] * 3
    found = last(engine, tmp_path, users, list(range(103)), valid=0.1, test=0.29)
    assert found == ["train"] * 61 + ["valid"] * 10 + ["test"] * 29 + ["train"] * 3


def test_rows_of_nobody_are_train(engine, tmp_path):
    assert last(engine, tmp_path, [None, None, 1], [1, 2, 3], test=1) == ["train", "train", "test"]


def test_last_refuses_a_number_that_is_neither_count_nor_share(engine, tmp_path):
    with pytest.raises(ValueError, match="split.last.test is 1.5"):
        last(engine, tmp_path, [1], [1], test=1.5)


def test_a_column_says_the_split_and_other_values_leave_out(engine, tmp_path):
    found = splits(engine, tmp_path, Split(column="part"), part=["test", "train", "holdout", None, "valid"])
    assert found == ["test", "train", None, None, "valid"]
    with pytest.raises(ValueError, match="must hold train, valid or test"):
        splits(engine, tmp_path, Split(column="part"), part=[1])


RECIPE = """
name: tiny
sources:
  clicks: {files: [clicks.parquet]}
examples: {start: clicks}
split: {column: part}
schema:
  label: click
  tables: {item: {vocabulary: {}}}
  features: {item: {kind: sparse, table: item}}
"""


def test_prepared_train_has_its_share_of_negatives_and_their_vocabulary(tmp_path):
    columns = {"item": list(range(4000)), "click": [0, 0, 0, 1] * 1000, "part": ["train"] * 3000 + ["test"] * 1000}
    pq.write_table(pa.table(columns), tmp_path / "clicks.parquet")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    recipe = compose.load(str(tmp_path / "tiny.yaml"), ["negative_sampling_rate=0.2"])
    prepared = made_tables.run(recipe, tmp_path, tmp_path / "out")
    train = prepared.raw("train")
    negatives = [row["item"] for row in train if row["click"] == 0]
    assert len(train) - len(negatives) == 750 and len(prepared.rows("test")) == 1000
    assert abs(len(negatives) - 450) < 4 * (2250 * 0.2 * 0.8) ** 0.5
    assert set(prepared.counts("item")) == {row["item"] for row in train}
    recipe.negative_sampling_rate = 10.0
    with pytest.raises(ValueError, match="negative_sampling_rate is 10.0: it is the share"):
        recipe.check()
