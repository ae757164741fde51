import math
import random
import struct

import pyarrow as pa
import pytest

from data_loaders.prepare import numbers
from data_loaders.prepare.declaration import Number
from tests.helpers.raw_tables import make, rows

NAN, INF = float("nan"), float("inf")


def applied(engine, folder, values, steps, fitted=None, kind=None):
    table = make(engine, folder, x=pa.array(values, kind or pa.float64()))
    steps = [Number(*step) if isinstance(step, tuple) else Number(step) for step in steps]
    value = numbers.apply(table.x, steps, fitted or [None] * len(steps))
    return [row["y"] for row in rows(engine, table.select("__row", "__part", y=value))]


def float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def test_null_nan_and_infinity_are_missing(engine, tmp_path):
    assert applied(engine, tmp_path, [1.5, None, NAN, INF, -INF, -2.0], []) == [1.5, None, None, None, None, -2.0]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint16(), pa.uint64(), pa.float32()])
def test_every_kind_of_number_becomes_float64(engine, tmp_path, kind):
    assert applied(engine, tmp_path, [3, None, 0], [], kind=kind) == [3.0, None, 0.0]


def test_booleans_are_zero_and_one(engine, tmp_path):
    assert applied(engine, tmp_path, [True, None, False], [], kind=pa.bool_()) == [1.0, None, 0.0]


def test_fill_stands_for_missing_values_alone(engine, tmp_path):
    assert applied(engine, tmp_path, [None, NAN, 0.0, 7.0], [("fill", -1.5)]) == [-1.5, -1.5, 0.0, 7.0]


def test_clip_has_two_bounds_or_one(engine, tmp_path):
    values = [-5.0, 0.3, 12.0, None]
    assert applied(engine, tmp_path, values, [("clip", [0, 10.5])]) == [0.0, 0.3, 10.5, None]
    assert applied(engine, tmp_path, values, [("clip", [None, 1])]) == [-5.0, 0.3, 1.0, None]
    assert applied(engine, tmp_path, values, [("clip", [0.1, None])]) == [0.1, 0.3, 12.0, None]


def test_logarithms(engine, tmp_path):
    values = [-1.0, 0.0, 1.0, 100.25, None]
    expected = [None, None, 0.0, float32(math.log(100.25)), None]
    assert applied(engine, tmp_path, values, ["log"]) == expected
    expected = [0.0, 0.0, float32(math.log1p(1)), float32(math.log1p(100.25)), None]
    assert applied(engine, tmp_path, values, ["log1p"]) == expected


def test_minmax_keeps_to_zero_and_one(engine, tmp_path):
    fitted = [{"min": -2.0, "max": 6.0}]
    assert applied(engine, tmp_path, [-9.0, -2.0, 0.0, 6.0, 99.0, None], ["minmax"], fitted) == [0, 0, 0.25, 1, 1, None]


@pytest.mark.parametrize("bounds", [(3.0, 3.0), (None, None)])
def test_a_column_without_a_spread_becomes_zero(engine, tmp_path, bounds):
    low, high = bounds
    values = [3.0, -8.0, None]
    assert applied(engine, tmp_path, values, ["minmax"], [{"min": low, "max": high}]) == [0.0, 0.0, None]
    fitted = [{"mean": low, "std": 0.0 if low else None}]
    assert applied(engine, tmp_path, values, ["standardize"], fitted) == [0.0, 0.0, None]


def test_standardize(engine, tmp_path):
    assert applied(engine, tmp_path, [1.0, 4.0, None], ["standardize"], [{"mean": 2.0, "std": 0.5}]) == [
        -2.0,
        4.0,
        None,
    ]


def test_constants_reach_the_engine_to_the_last_bit(engine, tmp_path):
    draw = random.Random(0)
    means = [draw.lognormvariate(0, 3) for _ in range(40)] + [1e300, 5e-324, 730278576353224.8, 0.1]
    for mean in means:
        fitted = [{"mean": mean, "std": 1.0}]
        assert applied(engine, tmp_path, [0.0], ["standardize"], fitted) == [-mean]


def test_quantiles_share_the_line_from_zero_to_one(engine, tmp_path):
    fitted = [{"boundaries": [1.0, 2.0, 2.0, 5.0]}]
    values = [0.5, 1.0, 1.9, 2.0, 4.9, 5.0, 8.0, None, NAN]
    expected = [0, 0.25, 0.25, 0.75, 0.75, 1, 1, None, None]
    assert applied(engine, tmp_path, values, [("quantiles", 5)], fitted) == expected


def test_buckets_begin_at_one_and_a_boundary_opens_a_bucket(engine, tmp_path):
    values = [-1.0, 0.0, 9.9, 10.0, 11.0, None]
    assert applied(engine, tmp_path, values, [("buckets", [0, 10])]) == [1, 2, 2, 3, 3, 0]
    assert applied(engine, tmp_path, values, [("buckets", 3)], [{"boundaries": [10.0]}]) == [1, 1, 1, 2, 2, 0]
    assert applied(engine, tmp_path, values, [("buckets", 3)], [{"boundaries": []}]) == [1, 1, 1, 1, 1, 0]


def test_the_search_tree_counts_as_a_linear_count_does(engine, tmp_path):
    draw = random.Random(1)
    for size in (1, 2, 7, 64):
        boundaries = sorted(draw.choice([draw.random(), draw.randint(0, 3) / 4]) for _ in range(size))
        values = [*boundaries, *(draw.random() for _ in range(50)), -1.0, 2.0]
        table = make(engine, tmp_path, x=values)
        counted = rows(engine, table.select("__row", "__part", n=numbers.count_at_most(table.x, boundaries)))
        assert [row["n"] for row in counted] == [sum(b <= x for b in boundaries) for x in values]


def test_the_search_tree_is_no_chain():
    import ibis

    table = ibis.table({"x": "float64"}, name="t")
    sql = ibis.to_sql(table.select(n=numbers.count_at_most(table.x, range(1000))), dialect="duckdb")
    depth = deepest = 0
    for word in sql.split():
        depth += word.lstrip("(").startswith("CASE")
        depth -= word.rstrip("),").endswith("END")
        deepest = max(deepest, depth)
    assert deepest <= 10


def test_criteos_log2(engine, tmp_path):
    values = [-3.0, 0.0, 1.7, 2.0, 3.0, 100.0, 65535.0, 2147483647.0, None]
    expected = [None if x is None else math.floor(x) if x <= 2 else 2 + math.floor(math.log(x) ** 2) for x in values]
    assert applied(engine, tmp_path, values, ["log2"]) == expected
    assert applied(engine, tmp_path, [-1e300, 1e308], ["log2"]) == [-(2**53), 2 + math.floor(math.log(1e308) ** 2)]


def test_log2_of_every_small_integer(engine, tmp_path):
    values = list(range(-2, 3000))
    expected = [x if x <= 2 else 2 + int(math.log(x) ** 2) for x in values]
    assert applied(engine, tmp_path, values, ["log2"], kind=pa.int32()) == expected


def test_steps_act_in_order(engine, tmp_path):
    steps = [("fill", 3), ("clip", [0, 7]), "log1p", ("buckets", [math.log(4) + 1e-3])]
    assert applied(engine, tmp_path, [None, -4.0, 100.0], steps) == [1, 1, 2]
    assert applied(engine, tmp_path, [None, -4.0], [("clip", [0, 7]), ("fill", 3)]) == [3.0, 0.0]
