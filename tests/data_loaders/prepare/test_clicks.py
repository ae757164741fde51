"""Labels from a click log against a naive reference, which gives clicks to impressions one by one."""

import random
from datetime import date, datetime, timedelta

import pyarrow as pa
import pytest

from data_loaders.prepare import clicks
from data_loaders.prepare.declaration import Clicks
from tests.helpers import raw_tables

SPEC = Clicks("clicks", ["user", "item"], "time", "at", 5, "label")


def reference(impressions, clicked, within):
    """The rows that have a click: each click looks for the latest impression of the same keys that is not too old."""
    labels = [0] * len(impressions["user"])
    for user, item, at in zip(clicked["user"], clicked["item"], clicked["at"]):
        possible = [
            (time, row)
            for row, (u, i, time) in enumerate(zip(impressions["user"], impressions["item"], impressions["time"]))
            if None not in (user, item, at, time) and (u, i) == (user, item) and time <= at <= time + within
        ]
        if possible:
            labels[max(possible)[1]] = 1
    return labels


def logs(seed, rows=300):
    draw = random.Random(seed)

    def values(count, below):
        return [None if draw.random() < 0.04 else draw.randrange(below) for _ in range(count)]

    impressions = {"user": values(rows, 5), "item": values(rows, 4), "time": values(rows, 60)}
    return impressions, {"user": values(rows, 5), "item": values(rows, 4), "at": values(rows, 80)}


def label(engine, tmp_path, impressions, clicked, spec=SPEC):
    table = clicks.label(
        raw_tables.make(engine, tmp_path, **impressions),
        raw_tables.make(engine, tmp_path, **clicked),
        spec,
        "examples.steps[0]",
    )
    return raw_tables.column(engine, table, spec.label)


@pytest.mark.parametrize(("seed", "within"), [(1, 0), (2, 3), (3, 20)])
def test_clicks_count_for_the_impressions_that_the_reference_finds(engine, tmp_path, seed, within):
    impressions, clicked = logs(seed)
    found = label(engine, tmp_path, impressions, clicked, Clicks("clicks", ["user", "item"], "time", "at", within))
    assert found == reference(impressions, clicked, within)
    assert 0 < sum(found) < len(found)


def test_rows_stay_and_a_label_that_was_there_is_replaced(engine, tmp_path):
    table = raw_tables.make(engine, tmp_path, user=[1, 1], item=[1, 1], time=[1, 3], label=["x", "y"], price=[0.5, 1.5])
    log = raw_tables.make(engine, tmp_path, user=[1, 1], item=[1, 1], at=[4, 4])
    made = clicks.label(table, log, SPEC, "examples.steps[0]")
    assert made.columns == table.columns
    assert [(row["time"], row["price"], row["label"]) for row in raw_tables.rows(engine, made)] == [
        (1, 0.5, 0),
        (3, 1.5, 1),
    ]


def test_of_impressions_at_the_same_time_the_later_row_has_the_click(engine, tmp_path):
    impressions = {"user": [1, 1, 1], "item": [1, 1, 1], "time": [2, 2, 1]}
    assert label(engine, tmp_path, impressions, {"user": [1], "item": [1], "at": [2]}) == [0, 1, 0]


def test_the_window_of_whole_numbers_is_exact(engine, tmp_path):
    start = 1_700_000_000_000_000_001  # nanoseconds, beyond the whole numbers of a float64
    impressions = {"user": [1, 2], "item": [1, 1], "time": [start, start]}
    clicked = {"user": [1, 2], "item": [1, 1], "at": [start + 5, start + 6]}
    assert label(engine, tmp_path, impressions, clicked) == [1, 0]


def test_timestamps_are_compared_in_seconds_and_dates_in_days(engine, tmp_path):
    start = datetime(2024, 1, 31, 23, 59, 58)
    seconds = [timedelta(seconds=5), timedelta(seconds=5, microseconds=1)]
    keys = {"user": [1, 2], "item": [1, 1]}
    times = pa.array([start, start], pa.timestamp("us"))
    clicked = pa.array([start + later for later in seconds], pa.timestamp("us"))
    assert label(engine, tmp_path, {**keys, "time": times}, {**keys, "at": clicked}) == [1, 0]
    month = [timedelta(days=40, seconds=1), timedelta(days=40, seconds=1, microseconds=1)]
    clicked = pa.array([start + later for later in month], pa.timestamp("us"))
    spec = Clicks("clicks", ["user"], "time", "at", 40 * 86_400 + 1)
    assert label(engine, tmp_path, {**keys, "time": times}, {**keys, "at": clicked}, spec) == [1, 0]
    days, later = [date(2024, 2, 27)] * 2, [date(2024, 3, 3), date(2024, 3, 4)]
    assert label(engine, tmp_path, {**keys, "time": days}, {**keys, "at": later}) == [1, 0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Clicks("clicks", ["usr"], "time", "at", 5), "'usr' is not known; did you mean 'user'"),
        (Clicks("clicks", ["user"], "time", None, 5), "table 'clicks': 'time' is not known"),
        (Clicks("clicks", ["user"], "time", "at", -1), "within is -1"),
        (Clicks("clicks", ["user"], "name", "name", 1), "give numbers, a date or a timestamp"),
        (Clicks("clicks", ["user"], "time", "name", 1), "'time' is int64 here and 'name' is string in 'clicks'"),
    ],
)
def test_what_does_not_fit_is_named(engine, tmp_path, spec, message):
    impressions = {"user": [1], "item": [1], "time": [1], "name": ["a"]}
    with pytest.raises(ValueError, match=message):
        label(engine, tmp_path, impressions, {"user": [1], "item": [1], "at": [1], "name": ["a"]}, spec)
