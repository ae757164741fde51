import json
import math
import random
import statistics as reference

import ibis
import pyarrow as pa
import pytest

from data_loaders.prepare.statistics import Statistics, fit
from tests.data_loaders.prepare.conftest import open_engine
from tests.helpers.declared import schema_of
from tests.helpers.raw_tables import make


def fitted(engine, folder, values, steps, kind="dense", arrow=None):
    feature = {"kind": kind, "make": {"numbers": steps}} | ({"table": "t"} if kind == "sparse" else {})
    schema = schema_of({"x": feature})
    return fit(engine, make(engine, folder, x=pa.array(values, arrow or pa.float64())), schema)


def ranks(values, count):
    """The inner boundaries by their definition."""
    ordered = sorted(values)
    return [ordered[math.ceil(k * len(ordered) / count) - 1] for k in range(1, count)]


def test_a_dense_feature_is_described(engine, tmp_path):
    found = fitted(engine, tmp_path, [1.0, None, 4.0, float("nan"), -2.0, float("inf")], [])
    assert found.features == {"x": {"rows": 6, "missing": 3, "min": -2.0, "max": 4.0, "mean": pytest.approx(1.0)}}
    assert found.steps == {}


def test_minmax_and_standardize_learn_what_a_naive_computation_does(engine, tmp_path):
    draw = random.Random(3)
    values = [draw.lognormvariate(3, 2) for _ in range(500)]
    found = fitted(engine, tmp_path, [*values, None], ["minmax"])
    assert found.steps == {"x": [{"min": min(values), "max": max(values)}]}
    found = fitted(engine, tmp_path, [*values, None], ["standardize"])
    assert found.steps["x"][0]["mean"] == pytest.approx(reference.fmean(values), rel=1e-12)
    assert found.steps["x"][0]["std"] == pytest.approx(reference.pstdev(values), rel=1e-9)


def test_the_order_of_rows_changes_no_bit(engine, tmp_path):
    draw = random.Random(4)
    values = [draw.gauss(1e6, 1) * 10 ** draw.randint(-3, 9) for _ in range(3000)]
    first = fitted(engine, tmp_path, values, ["standardize"])
    draw.shuffle(values)
    assert fitted(engine, tmp_path, values, ["standardize"]) == first


def test_a_large_offset_does_not_drown_the_deviation(engine, tmp_path):
    values = [1.7e9 + step for step in (0.0, 1.0, 2.0, 5.0)] * 50
    found = fitted(engine, tmp_path, values, ["standardize"])
    assert found.steps["x"][0]["std"] == pytest.approx(reference.pstdev([0.0, 1.0, 2.0, 5.0]), rel=1e-9)


def test_bounds_at_the_ends_of_float64_do_not_overflow(engine, tmp_path):
    found = fitted(engine, tmp_path, [-1.7e308, 1.7e308, 0.0], ["standardize"])
    assert found.steps["x"][0]["mean"] == pytest.approx(0, abs=1e295)
    assert found.steps["x"][0]["std"] == pytest.approx(1.7e308 * math.sqrt(2 / 3))


@pytest.mark.parametrize("values", [[], [None, None], [float("nan")]])
def test_nothing_to_learn_from(engine, tmp_path, values):
    found = fitted(engine, tmp_path, values, ["minmax", "standardize", {"quantiles": 4}])
    assert found.steps["x"] == [{"min": None, "max": None}, {"mean": None, "std": None}, {"boundaries": []}]
    nothing = {"min": None, "max": None, "mean": None}
    assert found.features == {"x": {"rows": len(values), "missing": len(values), **nothing}}


def test_a_constant_column(engine, tmp_path):
    found = fitted(engine, tmp_path, [3.5, None, 3.5], ["standardize"])
    assert found.steps["x"] == [{"mean": 3.5, "std": 0.0}]
    found = fitted(engine, tmp_path, [3.5, None, 3.5], [{"quantiles": 3}])
    assert found.steps["x"] == [{"boundaries": [3.5, 3.5]}]


@pytest.mark.parametrize("count", [2, 3, 7, 10, 100])
def test_quantile_boundaries_are_the_nearest_ranks(engine, tmp_path, count):
    draw = random.Random(count)
    values = [draw.choice([0.0, -0.0, 1.0, draw.gauss(0, 5)]) for _ in range(83)]
    found = fitted(engine, tmp_path, [*values, None, None], [{"quantiles": count}])
    assert found.steps["x"] == [{"boundaries": ranks(values, count)}]


def test_fewer_rows_than_quantiles(engine, tmp_path):
    found = fitted(engine, tmp_path, [5.0, 1.0], [{"quantiles": 6}])
    assert found.steps["x"] == [{"boundaries": [1.0, 1.0, 1.0, 5.0, 5.0]}]


def test_buckets_merge_repeated_boundaries_and_tell_the_tables_size(engine, tmp_path):
    values = [0.0] * 60 + [1.0, 2.0, 3.0, 4.0] * 10
    found = fitted(engine, tmp_path, values, [{"buckets": 10}], kind="sparse")
    schema = schema_of({"x": {"kind": "sparse", "table": "t", "make": {"numbers": [{"buckets": 10}]}}})
    boundaries = sorted(set(ranks(values, 10)))
    assert found.steps["x"] == [{"boundaries": boundaries}]
    assert found.num_embeddings(schema) == {"t": len(boundaries) + 2}
    assert found.features == {}


def test_given_buckets_learn_nothing_but_have_a_size(engine, tmp_path):
    steps = [{"buckets": [0, 10]}]
    found = fitted(engine, tmp_path, [1.0], steps, kind="sparse")
    assert found.steps == {"x": [None]}
    schema = schema_of({"x": {"kind": "sparse", "table": "t", "make": {"numbers": steps}}})
    assert found.num_embeddings(schema) == {"t": 4}


def test_a_step_learns_from_what_the_steps_before_it_make(engine, tmp_path):
    values = [1.0, None, 100.0, -5.0, 7.0]
    found = fitted(
        engine, tmp_path, values, [{"fill": 3}, {"clip": [0, 50]}, "minmax", "standardize", {"quantiles": 2}]
    )
    scaled = [x / 50 for x in (1.0, 3.0, 50.0, 0.0, 7.0)]
    steps = found.steps["x"]
    assert steps[:3] == [None, None, {"min": 0.0, "max": 50.0}]
    mean, deviation = reference.fmean(scaled), reference.pstdev(scaled)
    assert steps[3] == {"mean": pytest.approx(mean), "std": pytest.approx(deviation)}
    assert steps[4] == {"boundaries": [pytest.approx((sorted(scaled)[2] - mean) / deviation)]}
    assert found.features["x"]["mean"] == pytest.approx(25.75)


def test_integers_and_booleans_are_numbers(engine, tmp_path):
    assert fitted(engine, tmp_path, [1, None, 3], ["minmax"], arrow=pa.int16()).steps["x"] == [{"min": 1.0, "max": 3.0}]
    assert fitted(engine, tmp_path, [True, False], ["minmax"], arrow=pa.bool_()).features["x"]["mean"] == 0.5


def test_statistics_survive_json(engine, tmp_path):
    draw = random.Random(9)
    values = [draw.gauss(0, 1) for _ in range(20)]
    found = fitted(engine, tmp_path, values, ["standardize", {"quantiles": 4}])
    assert Statistics.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_both_engines_learn_the_same_bits(tmp_path, spark_session):
    draw = random.Random(11)
    values = [draw.lognormvariate(2, 3) for _ in range(400)]
    steps = ["log1p", "standardize", {"quantiles": 17}]
    found = [
        fitted(open_engine(name, tmp_path / name), tmp_path, values, steps).to_dict() for name in ("duckdb", "spark")
    ]
    assert found[0] == found[1]


def test_a_column_of_text_is_no_number(engine, tmp_path):
    table = make(engine, tmp_path, price=["1", "2"])
    schema = schema_of({"cost": {"kind": "dense", "make": {"column": "price"}}})
    with pytest.raises(ValueError, match=r"features\.cost: column 'price' is string, not a number.*float64.*CAST"):
        fit(engine, table, schema)


def test_a_missing_column_is_named_with_its_neighbours():
    schema = schema_of({"cost": {"kind": "dense", "make": {"column": "prise"}}})
    table = ibis.table({"price": "float64", "__row": "int64"}, name="t")
    with pytest.raises(ValueError, match=r"features\.cost\.make\.column: 'prise'.*did you mean 'price'"):
        fit(None, table, schema)
