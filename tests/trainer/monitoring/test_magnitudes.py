"""Numbers that no model can learn from are told by the feature's name, with what to set; healthy ones are not."""

import numpy as np
import pytest

from data_loaders.magnitudes import LOOKED_AT, Magnitudes
from data_loaders.schema import Feature, Layout, Schema, Table
from trainer.config.monitoring import AlertsConfig
from trainer.monitoring.alerts import Alerts
from trainer.monitoring.feature_coverage import FeatureCoverage
from trainer.monitoring.magnitudes import constants, heavy, loss_large, magnitudes, names_of_large, of_distribution

SCHEMA = Schema(
    embedding_dim=4,
    tables={"user": Table(10)},
    weight="importance",
    features={
        "user": Feature("sparse", table="user"),
        "at": Feature("dense", fill=0.0),
        "price": Feature("dense", fill=0.0, log1p=True),
        "cents": Feature("dense", offset=100.0, scale=0.5),
    },
)
CHANCE = np.random.default_rng(1)


def sums(rows=1000, **columns):
    """As the loader has them, of columns as the model gets them."""
    healthy = {"at": CHANCE.random(rows), "price": CHANCE.random(rows), "cents": CHANCE.random(rows)}
    lines = {**healthy, "label": np.zeros(rows), "importance": np.ones(rows), **columns}
    found = Magnitudes(len(lines))
    found.look(np.stack([np.broadcast_to(values, rows) for values in lines.values()]).astype(np.float32))
    return found.snapshot()


def found(**columns):
    return magnitudes(SCHEMA, sums(**columns))


def names(told):
    return [name for name, _ in told]


def test_sums_are_those_of_a_sample_by_definition():
    values = CHANCE.normal(5.0, 2.0, (2, 4000)).astype(np.float32)
    values[0, 8] = np.inf
    looked = Magnitudes(2)
    looked.look(values)
    looked.look(values[:, :7])
    sample = np.concatenate((values[:, :: 4000 // LOOKED_AT], values[:, :7]), axis=1).astype(np.float64)
    sample[~np.isfinite(sample)] = 0  # what is not finite does not spoil the sums
    rows, looked_at, *rest = looked.snapshot()
    assert rows == 4007 and looked_at == sample.shape[1]
    expected = np.stack((sample.sum(1), np.abs(sample).sum(1), (sample**2).sum(1)), 1).ravel()
    np.testing.assert_allclose(rest, expected, rtol=1e-12)


def test_magnitudes_of_all_ranks_are_those_of_all_rows():
    parts = [sums(at=CHANCE.normal(3.0, 1.0, 1000)) for _ in range(2)]
    one = magnitudes(SCHEMA, parts[0] + parts[1])["at"]
    other = magnitudes(SCHEMA, parts[0].copy(), lambda total: total.add_(total.new_tensor(parts[1])))["at"]
    assert one == other and one.rows == 2000
    assert one.mean == pytest.approx(3.0, abs=0.1) and one.deviation == pytest.approx(1.0, abs=0.1)


def test_healthy_numbers_are_not_warned_of():
    it = found()
    assert of_distribution(SCHEMA, "train", it, it) == [] and constants(SCHEMA, it, 1000) == []
    assert loss_large("train", {"logloss": 0.9}, 1, it, SCHEMA) is None and names_of_large(SCHEMA, it) == ""


def test_raw_nanoseconds_are_told_with_the_offset_and_scale_to_set():
    at = 1_627_776_000e9 + CHANCE.random(1000) * 2.6e15
    ((name, message),) = of_distribution(SCHEMA, "train", found(at=at), {})
    assert name == "large:at" and "feature 'at' (column 'at')" in message and "about 1.63e+18" in message
    offset, scale = (
        float(message.partition(f"features.at.{key}=")[2].split()[0].rstrip(",")) for key in ("offset", "scale")
    )
    mended = (at - offset) * scale
    assert abs(mended.mean()) < 0.1 and mended.std() == pytest.approx(1.0, abs=0.1)


def test_the_remedy_is_in_terms_of_the_column_as_it_is():
    """A feature that has an offset and a scale already: x = raw · 0.5 - 50."""
    raw = 4e6 + 1e5 * CHANCE.random(1000)
    ((_, message),) = of_distribution(SCHEMA, "train", found(cents=(raw - 100.0) * 0.5), {})
    offset = float(message.partition("features.cents.offset=")[2].split()[0])
    assert offset == pytest.approx(raw.mean(), rel=1e-3)


def test_incomes_are_told_with_log1p():
    ((name, message),) = of_distribution(SCHEMA, "train", found(at=CHANCE.lognormal(12, 2, 1000)), {})
    assert name == "large:at" and "data.schema.features.at.log1p=true" in message


def test_what_never_varies_is_told_but_for_what_is_missing():
    assert names(constants(SCHEMA, found(at=7.5), 1000)) == ["constant:at"]
    assert constants(SCHEMA, found(at=7.5), 1001) == [] and constants(SCHEMA, found(at=0.0), 1000) == []


@pytest.mark.parametrize(
    ("factor", "expected"), [(1000.0, ["jumped:at:valid"]), (1e-3, ["jumped:at:valid"]), (20.0, [])]
)
def test_other_units_in_another_part_of_the_data(factor, expected):
    values = CHANCE.random(1000)
    assert names(of_distribution(SCHEMA, "valid", found(at=factor * values), found(at=values))) == expected


def test_other_units_of_a_logarithm():
    values = CHANCE.lognormal(1, 1, 1000)
    now, before = found(price=np.log1p(1000 * values)), found(price=np.log1p(values))
    assert names(of_distribution(SCHEMA, "valid", now, before)) == ["jumped:price:valid"]
    assert of_distribution(SCHEMA, "valid", found(price=np.log1p(5 * values)), before) == []


@pytest.mark.parametrize(("weight", "expected"), [(1e6, True), (1e-4, True), (3.0, False), (0.0, False)])
def test_weights_far_from_one(weight, expected):
    told = heavy("importance", found(importance=weight)["importance"])
    assert (told is not None) == expected and (not expected or "column 'importance'" in told[1])


def test_a_huge_loss_names_the_features():
    _, message = loss_large("valid", {"logloss": 4e14}, 24, found(at=1e18), SCHEMA)
    assert "dense feature 'at' (about 1e+18)" in message and "price" not in message
    _, message = loss_large("train", {"logloss": 50.0}, 1, found(), SCHEMA)
    assert "optim.dense.lr" in message


# Within the warnings of a run.


def alerts(enabled=True, **watched):
    config = AlertsConfig(enabled, 1000, 100)
    return Alerts(
        config,
        SCHEMA,
        0,
        FeatureCoverage(SCHEMA, Layout(("user",)), "cpu"),
        {f"valid.{k}": v for k, v in watched.items()},
    )


def consider(judge, split, values, numbers=None):
    whole = {"auc": 0.7, "auc_error_bound": 0.0, "label_mean": 0.2, "logloss": 0.5, "rows": 500, **values}
    return [it["name"] for it in judge.consider(split, whole, 1, 0, {}, lambda total: total, numbers)]


def test_the_first_step_tells_and_no_line_repeats_it():
    judge, huge = alerts(), sums(at=1e18 * CHANCE.random(1000))
    told = judge.first_look({"logloss": 1e14}, 1, huge, lambda total: total)
    assert [it["name"] for it in told] == ["large:at", "loss_large"]
    assert consider(judge, "train", {"logloss": 1e14}, huge) == []
    assert alerts(enabled=False).first_look({"logloss": 1e14}, 1, huge, lambda total: total) == []


def test_a_window_and_the_next_day_are_held_against_what_came_before():
    judge, values = alerts(), CHANCE.random(1000)
    first, second = sums(at=values), sums(at=values) + sums(at=1000 * values)
    assert consider(judge, "train", {}, first) == [] and consider(judge, "train", {}, second) == ["jumped:at:train"]
    begun = alerts()
    begun.restore({**alerts().facts(), "numbers": judge.facts()["numbers"]})
    assert consider(begun, "before", {}, sums(at=1e5 * values)) == ["large:at", "jumped:at:before"]
    begun.compare_with({"at": 7})
    assert begun.facts()["numbers"] == {}, "a comparison is no reason to refuse a run"


NO_CLICK = {"auc": None, "ne": None, "label_mean": 0.0}


def test_a_watched_metric_that_is_not_defined_is_told_at_the_first_evaluation():
    judge = alerts(auc=["early_stopping", "optim.plateau"], enabled=False)
    assert consider(judge, "valid", NO_CLICK) == ["undefined:valid.auc"] and consider(judge, "valid", NO_CLICK) == []
    message = judge.raised[0]["message"]
    for part in ("all 500 rows of valid have the label 0", "early_stopping and optim.plateau", "watch valid.logloss"):
        assert part in message
    assert consider(alerts(auc=["early_stopping"]), "train", {**NO_CLICK, "label_mean": 0.5}) == []
    assert consider(alerts(logloss=["checkpoint.best"]), "valid", NO_CLICK) == []
    group = alerts(gauc=["checkpoint.best"])
    assert consider(group, "valid", {"gauc": None}) == ["undefined:valid.gauc"]
    assert "no group of valid (evaluation.group_by) has both" in group.raised[0]["message"]
    empty = alerts(auc=["early_stopping"])
    consider(empty, "valid", {"auc": None, "rows": 0, "label_mean": None, "logloss": None})
    assert "no row of valid counts" in empty.raised[0]["message"]


def test_the_rows_of_all_ranks_add_up_line_by_line():
    """Ranks add up in place: what this rank has seen stays its own."""
    judge, first, second = alerts(), sums(), sums(2000)
    for numbers in (first, first + second):
        judge.consider(
            "train", {"auc": None, "label_mean": 0.2, "rows": 500}, 1, 1, {}, lambda total: total.mul_(2), numbers
        )
    assert judge.facts()["numbers"]["at"]["rows"] == 2 * (1000 + 2000)
