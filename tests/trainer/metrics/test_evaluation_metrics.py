"""AUC-PR, calibration error, accuracy and RelaImpr against scikit-learn and plain loops."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score

from trainer.metrics.click_metrics import ClickMetrics, relative_improvement


def computed(logits, labels, weights=None, num_bins=1 << 20, calibration_bins=20):
    metrics = ClickMetrics(num_bins=num_bins, calibration_bins=calibration_bins)
    weights = np.ones(len(labels)) if weights is None else weights
    columns = (torch.as_tensor(np.asarray(c), dtype=torch.float32) for c in (logits, labels, weights))
    for batch in zip(*(column.split(1000) for column in columns)):
        metrics.update(*batch)
    return metrics.compute()


def clicks(rows, seed, digits=9):
    generator = np.random.default_rng(seed)
    logits = np.round(-1.5 + 1.5 * generator.standard_normal(rows), digits).astype(np.float32)
    return logits, (generator.random(rows) < sigmoid(logits)).astype(np.float32)


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


@pytest.mark.parametrize("num_bins", [2, 16, 1 << 8, 1 << 12, 1 << 20])
@pytest.mark.parametrize("digits", [0, 1, 9])
def test_auc_pr_lies_within_its_bound(num_bins, digits):
    for seed in range(3):
        logits, labels = clicks(4000, seed, digits)
        values = computed(logits, labels, num_bins=num_bins)
        exact = average_precision_score(labels, logits)
        assert abs(values["auc_pr"] - exact) <= values["auc_pr_error_bound"] + 1e-12
        if digits == 0 and num_bins >= 1 << 8:
            assert values["auc_pr"] == pytest.approx(exact, abs=1e-12), "ties of one bin are ties"
    if (num_bins, digits) == (1 << 20, 9):  # where many rows are tied, the bound does not know it
        assert values["auc_pr_error_bound"] < 1e-2 and values["auc_pr"] == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("reverse", [False, True])
def test_auc_pr_bound_holds_for_the_best_and_the_worst_order_inside_bins(reverse):
    rng = np.random.default_rng(1)
    logits = np.sort(rng.uniform(-16, 16, 600)).astype(np.float32)
    bins = np.floor((logits + 16) / 4).astype(int)
    labels = np.concatenate([np.sort(rng.random(count) < 0.3) for count in np.bincount(bins)]).astype(np.float32)
    if reverse:
        labels = np.concatenate([labels[bins == b][::-1] for b in range(8)])
    values = computed(logits, labels, num_bins=8)
    error = abs(values["auc_pr"] - average_precision_score(labels, logits))
    assert 1e-3 < error <= values["auc_pr_error_bound"]


def test_auc_pr_bound_holds_where_a_bin_of_clicks_has_many_thresholds():
    """A thousand clicks below a thousand others: precision grows from 0 to 1/2, on average 1 - log 2."""
    logits = np.concatenate([np.full(1000, 5.0), np.linspace(-9, -1, 1000)])
    values = computed(logits, np.arange(2000) >= 1000, num_bins=2)
    assert values["auc_pr"] == pytest.approx(0.5)
    assert 0.19 < 0.5 - average_precision_score(np.arange(2000) >= 1000, logits) <= values["auc_pr_error_bound"] < 0.2


def test_auc_pr_with_weights_and_of_many_rows():
    logits, labels = clicks(300_000, 5)
    weights = np.random.default_rng(6).choice([0.25, 1.0, 3.0], len(logits))
    values = computed(logits, labels, weights)
    exact = average_precision_score(labels, logits, sample_weight=weights)
    assert abs(values["auc_pr"] - exact) <= values["auc_pr_error_bound"] < 2e-4


def naive_ece(probabilities, labels, weights, edges):
    total = 0.0
    for low, high in zip(edges[:-1], edges[1:]):
        inside = (probabilities > low) & (probabilities <= high)
        total += abs((weights * (labels - probabilities))[inside].sum())
    return total / weights.sum()


def test_a_probability_between_two_bins_is_of_the_lower_one():
    values = computed([0.0, -np.log(3)], [1, 0], calibration_bins=2)  # 1/2 and 1/4, one bin
    assert values["ece"] == pytest.approx(abs((1 - 0.5) + (0 - 0.25)) / 2, rel=1e-6)


@pytest.mark.parametrize("bins", [1, 7, 20])
def test_expected_calibration_error(bins):
    logits, labels = clicks(5000, 7)
    weights = np.random.default_rng(8).choice([0.5, 1.0, 2.0], len(logits))
    values = computed(logits + 0.4, labels, weights, calibration_bins=bins)
    probabilities = sigmoid((logits + np.float32(0.4)).astype(np.float32))
    expected = naive_ece(probabilities, labels, weights, np.linspace(0, 1, bins + 1))
    assert values["ece"] == pytest.approx(expected, rel=1e-9) and expected > 0.01


def test_expected_calibration_error_with_bins_of_equal_mass():
    logits, labels = clicks(20_000, 9)
    values = computed(logits, labels, calibration_bins=10)
    order = np.argsort(logits, kind="stable")
    parts = np.array_split(order, 10)
    expected = sum(abs((labels - sigmoid(logits))[part].sum()) for part in parts) / len(logits)
    assert values["ece_equal_mass"] == pytest.approx(expected, abs=2e-4)
    constant = computed(np.full(1000, -1.0), np.arange(1000) % 4 == 0, calibration_bins=10)
    assert constant["ece_equal_mass"] == pytest.approx(abs(sigmoid(-1.0) - 0.25), abs=4e-6)
    assert constant["ece"] == pytest.approx(abs(sigmoid(-1.0) - 0.25), abs=1e-7)


def test_accuracy():
    logits, labels = clicks(5000, 10, digits=1)
    weights = np.random.default_rng(11).choice([0.0, 1.0, 3.0], len(logits))
    found = computed(logits, labels, weights)["accuracy"]
    assert found == pytest.approx(accuracy_score(labels, logits > 0, sample_weight=weights), rel=1e-12)


def test_what_is_not_defined_is_none():
    nothing = ClickMetrics(num_bins=8, calibration_bins=4).compute()
    assert {nothing[name] for name in ("auc_pr", "auc_pr_error_bound", "ece", "ece_equal_mass", "accuracy")} == {None}
    assert computed([0.1, 0.2], [0, 0])["auc_pr"] is None
    assert computed([0.1, 0.2], [1, 1])["auc_pr"] == 1.0


def test_windows_of_training_do_without():
    metrics = ClickMetrics(num_bins=8)
    metrics.update(torch.zeros(3), torch.ones(3), torch.ones(3))
    assert len(metrics.sums) == 2 * 8 + 6
    assert not {"auc_pr", "ece", "accuracy"} & set(metrics.compute())


def test_relative_improvement_of_the_din_paper():
    """Zhou et al. 2018, MovieLens: BaseModel 0.7300, DIN 0.7337, RelaImpr 1.61 %."""
    assert relative_improvement(0.7337, 0.7300) == pytest.approx(0.0161, abs=5e-5)
