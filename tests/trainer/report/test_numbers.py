"""The numbers of a report against plain numpy and published examples."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from trainer.metrics.click_metrics import ClickMetrics
from trainer.report.curves import kept_points
from trainer.report.memory import segments
from trainer.report.scores import wilson
from trainer.report.slices import in_order, standard_error, with_words
from trainer.report.table_statistics import sampled_rows


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def clicks(rows, seed):
    generator = np.random.default_rng(seed)
    logits = (-1 + 1.5 * generator.standard_normal(rows)).astype(np.float32)
    labels = (generator.random(rows) < sigmoid(0.7 * logits)).astype(np.float32)
    return logits, labels, generator.choice([0.0, 0.5, 1.0, 2.0], rows).astype(np.float32)


def found(logits, labels, weights, bins=20):
    metrics = ClickMetrics(calibration_bins=bins)
    metrics.update(*(torch.from_numpy(column) for column in (logits, labels, weights)))
    return metrics.distribution()


@pytest.mark.parametrize("scale", [1.0, 0.001, 10.0])
def test_scores_are_counted_by_class_in_fifty_to_a_hundred_bins(scale):
    logits, labels, weights = clicks(20_000, 1)
    logits = logits * np.float32(scale)
    scores = found(logits, labels, weights)["scores"]
    edges = np.array(scores["edges"])
    assert 50 < len(edges) - 1 <= 100 and np.allclose(np.diff(edges), edges[1] - edges[0])
    for kind, of_class in (("clicks", labels), ("others", 1 - labels)):
        inside = np.clip(logits.astype(np.float64), -16, 16 - 1e-9)
        expected, _ = np.histogram(inside, edges, weights=weights.astype(np.float64) * of_class)
        np.testing.assert_allclose(scores[kind], expected, rtol=1e-9)
        assert sum(scores[kind]) == pytest.approx((weights * of_class).sum())


def test_calibration_bins_are_those_of_sorted_rows():
    logits, labels, _ = clicks(20_000, 2)
    bins = found(logits, labels, np.ones_like(labels), bins=10)["calibration"]
    parts = np.array_split(np.argsort(logits, kind="stable"), 10)
    assert sum(part["weight"] for part in bins) == 20_000
    for part, rows in zip(bins, parts, strict=True):
        assert part["weight"] == pytest.approx(len(rows), abs=3), "a bin of the histogram is not divided"
        assert part["predicted"] == pytest.approx(sigmoid(logits[rows]).mean(), abs=2e-4)
        assert part["observed"] == pytest.approx(labels[rows].mean(), abs=2e-3)


def test_calibration_bins_weigh_rows():
    logits, labels, weights = clicks(5_000, 3)
    bins = found(logits, labels, weights, bins=7)["calibration"]
    totals = {name: sum(part["weight"] * part[name] for part in bins) for name in ("predicted", "observed")}
    assert totals["predicted"] == pytest.approx((weights * sigmoid(logits)).sum(), rel=1e-5)
    assert totals["observed"] == pytest.approx((weights * labels).sum(), rel=1e-9)


def test_one_score_is_one_bin_and_no_rows_are_none():
    ones = np.ones(10, np.float32)
    constant = found(-ones, ones * 0, ones)
    assert constant["scores"]["others"] == [10.0] and len(constant["calibration"]) == 1
    nothing = found(ones, ones, ones * 0)
    assert nothing == {"scores": {"edges": [], "clicks": [], "others": []}, "calibration": []}


def test_thinning_keeps_first_last_and_every_extreme():
    values = np.random.default_rng(4).standard_normal(200_000).cumsum()
    values[123_457], values[77_001] = 1e6, -1e6
    values[:3_000:2] = np.nan
    kept = kept_points(values)
    assert len(kept) <= 1000 and (np.diff(kept) > 0).all() and kept[0] == 0 and kept[-1] == 199_999
    assert {123_457, 77_001} <= set(kept)
    for begin in range(0, 200_000, 800):  # 250 stretches
        part, inside = values[begin : begin + 800], values[kept[(kept >= begin) & (kept < begin + 800)]]
        assert np.nanmin(part) == np.nanmin(inside) and np.nanmax(part) == np.nanmax(inside)
    assert kept_points(np.arange(1000.0)).tolist() == list(range(1000))
    assert len(kept_points(np.full(5000, np.nan))) <= 1000


def test_sampled_rows_are_one_of_each_block_and_the_same_each_time():
    assert sampled_rows(1000, 1000).tolist() == list(range(1000))
    rows = sampled_rows(1_000_003, 1000)
    assert torch.equal(rows, sampled_rows(1_000_003, 1000))
    block = -(-1_000_003 // 1000)
    assert (rows // block).tolist() == list(range(len(rows))) and len(rows) <= 1000
    assert rows[0] == 0 and int(rows[-1]) < 1_000_003
    assert len({int(place) for place in rows % block}) > 300, "not every so-manieth row"


def test_intervals_of_rates_and_aucs():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 20)[0] == 0 and wilson(0.0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    # Of chance it is that of Mann and Whitney's U: (P + N + 1) / (12 P N).
    assert standard_error(0.5, 100, 0.3) == pytest.approx((101 / (12 * 30 * 70)) ** 0.5)
    generator = np.random.default_rng(5)
    aucs = []
    for _ in range(200):
        labels = np.arange(300) < 90
        aucs.append(roc_auc_score(labels, generator.standard_normal(300) + labels))
    assert 0.95 < standard_error(float(np.mean(aucs)), 300, 0.3) / np.std(aucs) < 1.25, (
        "rather too wide than too narrow"
    )


def test_slices_of_numbers_are_ordered_by_size_and_others_by_rows():
    assert [value["value"] for value in in_order([{"value": "10"}, {"value": "9"}, {"value": "-1"}])] == [
        "-1",
        "9",
        "10",
    ]
    assert [value["value"] for value in in_order([{"value": "b"}, {"value": None}, {"value": "1"}])] == ["b", None, "1"]


def test_slices_show_the_words_of_a_vocabulary(tmp_path):
    (tmp_path / "vocabulary").mkdir()
    words = {"value": ["Paris", "Rome", "Oslo"], "id": pa.array([2, 3, 4], pa.int32()), "count": [5, 4, 3]}
    pq.write_table(pa.table(words), tmp_path / "vocabulary" / "city.parquet")
    features = {
        "town": {"kind": "sparse", "column": "city", "table": "city"},
        "hour": {"kind": "sparse", "table": "hour"},
    }
    config = {"data": {"prepared": str(tmp_path), "schema": {"features": features}}}
    values = [{"value": value, "rows": 9} for value in ("3", "0", "1", "2", None, "17")]
    found = with_words(config, "city", values)
    assert [value["value"] for value in found] == ["Rome", "missing", "unknown", "Paris", None, "17"]
    assert with_words(config, "hour", values) == values and with_words(config, "raw_column", values) == values
    config["data"]["prepared"] = None
    assert with_words(config, "city", values) == values


def test_bars_of_the_plan_add_up_to_what_each_rank_holds():
    generator = np.random.default_rng(6)
    plan = [
        {"table": f"t{n}", "sharding": ("table_wise", "row_wise")[n % 2]}
        | {"bytes": {str(rank): int(generator.integers(1, 10**9)) for rank in ((n % 3,), range(3))[n % 2]}}
        for n in range(20)
    ]
    for most in (20, 4):
        parts = segments(plan, most)
        assert len({part["table"] for part in parts}) == (20 if most == 20 else 5)
        for rank in range(3):
            own = [part for part in parts if part["rank"] == rank]
            expected = sum(row["bytes"].get(str(rank), 0) for row in plan) / 1e6
            assert sum(part["size"] for part in own) == pytest.approx(expected)
            assert [part["left"] for part in own] == pytest.approx([0, *(part["right"] for part in own[:-1])])
            assert own[-1]["right"] == pytest.approx(expected)
            kinds = [part["sharding"] for part in own]
            assert kinds == sorted(kinds, key=kinds.index), "each kind of sharding is one stretch"
