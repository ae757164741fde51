"""Warnings: each is told of figures that give reason to, once, and none of healthy ones."""

import math

import pytest
import torch

from data_loaders.schema import Cross, Feature, Layout, Schema, Table
from trainer.config.monitoring import AlertsConfig
from trainer.metrics.click_metrics import ClickMetrics
from trainer.monitoring.alerts import CHANCE_LINES, Alerts, absent, constant, crowded, is_chance, leaking, say
from trainer.monitoring.feature_coverage import FeatureCoverage, Hashed

HEALTHY = {
    "auc": 0.72,
    "auc_error_bound": 0.001,
    "logloss": 0.4,
    "label_mean": 0.2,
    "prediction_mean": 0.2,
    "rows": 50_000,
}
SCHEMA = Schema(
    embedding_dim=4,
    tables={"user": Table(101), "item": Table(50)},
    features={
        "user": Feature("sparse", table="user", ids="hash"),
        "item": Feature("sparse", table="item", on_out_of_range="missing"),
        "price": Feature("dense", fill=0.0),
    },
    crosses={"both": Cross(["user", "item"], 101)},
)


def alerts(after_rows=1000, after_steps=100, warmup_steps=0, enabled=True):
    config = AlertsConfig(enabled, after_rows, after_steps)
    return Alerts(
        config, SCHEMA, warmup_steps, FeatureCoverage(SCHEMA, Layout(("user", "item", "both")), torch.device("cpu"))
    )


def names(judge, step=200, split="train", epoch=0, counters=None, **values):
    found = judge.consider(split, {**HEALTHY, **values}, step, epoch, counters or {}, lambda sums: sums)
    assert all(alert["step"] == step and alert["message"] for alert in found)
    return [alert["name"] for alert in found]


def lines(*series, **options):
    """Names told at each of several lines."""
    judge = alerts(**options)
    return [names(judge, **values) for values in series]


def test_healthy_figures_are_not_warned_of():
    assert lines(*[{"step": 50 * n} for n in range(20)]) == [[]] * 20
    assert lines({"split": "valid"}, {"epoch": 3}) == [[], []]


def test_an_auc_of_chance_is_told_once_after_some_steps_and_lines():
    low = {"auc": 0.505}
    assert lines(*[{**low, "step": step} for step in (50, 100, 150, 200)]) == [[], [], ["auc_of_chance"], []]
    assert lines(*[{**low, "step": step} for step in (100, 150)], warmup_steps=100) == [[], []]
    healthy_between = [low if n % CHANCE_LINES else {} for n in range(10)]
    assert lines(*healthy_between) == [[]] * 10


def test_the_error_of_an_auc_of_chance_is_that_of_the_rank_sum():
    """By simulation: the standard deviation of the AUC of random scores."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(400):
        scores = torch.rand(300, generator=generator)
        found.append((scores[:100, None] > scores[None, 100:]).double().mean().item())
    simulated = torch.tensor(found).std().item()
    assert math.sqrt(301 / (12 * 100 * 200)) == pytest.approx(simulated, rel=0.1)
    for rows, known in ((4_000, False), (12_000, True)):  # of 20 % clicks: errors of 0.0114 and 0.0066
        assert is_chance({"auc": 0.51, "label_mean": 0.2, "rows": rows}) == known
    assert not is_chance({"auc": 0.53, "label_mean": 0.2, "rows": 10**6})
    assert not is_chance({"auc": None, "label_mean": 0.0, "rows": 10**6})


def test_labels_of_one_value_are_told_after_enough_rows_in_a_row():
    one = {"auc": None, "auc_error_bound": None, "rows": 400}
    assert lines(*[{**one, "label_mean": 0.0}] * 4) == [[], [], ["labels_one_valued"], []]
    assert lines({**one, "label_mean": 1.0, "rows": 1000}) == [["labels_one_valued"]]
    assert lines(*[{**one, "label_mean": 0.0}, {**one, "label_mean": 0.01}] * 4) == [[]] * 8


def test_predictions_that_are_constant_are_told_and_not_as_chance():
    metrics = ClickMetrics(num_bins=1 << 14)
    labels = (torch.arange(5000) % 5 == 0).float()
    metrics.update(torch.full((5000,), -1.5), labels, torch.ones(5000))
    values = metrics.compute()
    assert lines(values, values, values) == [["predictions_constant"], [], []]
    metrics.update(torch.linspace(-1.5, -1.4, 5000), labels, torch.ones(5000))
    assert constant(metrics.compute(), 1000) is None
    assert constant({**values, "auc_error_bound": None}, 1000) is None and constant(values, 10_000) is None


def test_an_auc_too_good_to_be_true_is_told_of_rows_not_seen_before():
    leak = {"auc": 0.995}
    assert lines(leak, leak) == [["label_leaking"], []]
    assert lines({**leak, "epoch": 1}) == [[]], "rows seen before may be known by heart"
    assert lines({**leak, "epoch": 1, "split": "valid"}) == [["label_leaking"]]
    assert leaking("train", {"auc": 0.995, "label_mean": 0.001, "rows": 50_000}) is None, "50 clicks"


def test_rows_that_are_all_left_out_are_told_with_what_was_wrong():
    judge = alerts()
    nothing = {"rows": 0, "label_mean": None, "auc": None, "auc_error_bound": None}
    assert names(judge, **nothing, counters={"rows.dropped": 90, "item.null": 2, "user.null": 88}) == ["no_rows"]
    assert "most were left out for user.null" in judge.raised[0]["message"]


@pytest.mark.parametrize(
    ("name", "counters", "expected"),
    [
        ("item", {"item.out_of_range": 9, "item.null": 1}, "outside table 'item' (0 … 49): raise num_embeddings"),
        ("user", {"user.null": 9}, "column 'user' is null"),
        ("item", {}, "empty lists or the missing id"),
        ("price", {"price.non_finite": 3}, "column 'price' is non-finite"),
        ("price", {}, "is always 0, its value for missing ones"),
        ("both", {}, "user, item, is null"),
    ],
)
def test_a_feature_that_is_always_missing_is_told_with_its_cause(name, counters, expected):
    told, message = absent(name, 5000, SCHEMA, counters)
    assert told == f"always_missing:{name}" and expected in message and "5,000 rows" in message


def test_what_batches_never_held_is_told_after_enough_rows():
    judge = alerts()
    judge.coverage.sums[0] = 999
    assert names(judge) == []
    judge.coverage.sums[0] = 1000
    judge.coverage.sums[2] = 1  # an item
    assert names(judge) == ["always_missing:user", "always_missing:both", "always_missing:price"]


def test_a_table_with_more_values_than_rows_is_told():
    assert crowded(Hashed("user", 10_000, 1000, 620)) is None
    name, message = crowded(Hashed("user", 10_000, 1000, 650))
    assert name == "collisions:user" and "about 10,000 different values share the 10,000 rows" in message
    assert "65% of them" in message and "42,000 or more" in message
    assert "many times more" in crowded(Hashed("user", 100, 100, 100))[1]


def test_switched_off_nothing_is_told():
    judge = alerts(enabled=False)
    assert names(judge, auc=1.0) == []


def test_what_was_told_is_not_told_again_by_a_run_that_goes_on(capsys):
    judge, after = alerts(), alerts()
    assert names(judge, auc=0.5) == []
    after.restore(judge.facts())
    assert names(after, auc=0.5) == ["auc_of_chance"]
    again = alerts()
    again.restore(after.facts())
    assert names(again, auc=0.5) == [] and [alert["name"] for alert in again.raised] == ["auc_of_chance"]
    say(again.raised)
    assert capsys.readouterr().err.count("warning: after 200 steps the AUC of training is 0.5000") == 1


def test_rows_and_steps_are_positive():
    with pytest.raises(ValueError, match=r"alerts\.after_rows is 0"):
        AlertsConfig(after_rows=0)
