import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from trainer.metrics.click_metrics import LOGIT_RANGE, ClickMetrics


def computed(logits, labels, weights=None, num_bins=1 << 20, batch_size=None):
    logits = torch.as_tensor(logits)
    labels = torch.as_tensor(labels, dtype=torch.float32)
    weights = torch.ones_like(labels) if weights is None else torch.as_tensor(weights, dtype=torch.float32)
    metrics = ClickMetrics(num_bins=num_bins)
    size = batch_size or len(logits)
    for parts in zip(logits.split(size), labels.split(size), weights.split(size)):
        metrics.update(*parts)
    return metrics.compute()


def clicks(rows, seed, base=-2.0, spread=1.5):
    """Logits, and clicks that are drawn with their probability."""
    generator = np.random.default_rng(seed)
    logits = (base + spread * generator.standard_normal(rows)).astype(np.float32)
    return logits, (generator.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.float32)


def assert_auc(values, labels, logits, weights=None):
    """The histogram's AUC lies within its stated bound of scikit-learn's (plus float64's rounding)."""
    exact = roc_auc_score(labels, np.asarray(logits, dtype=np.float64), sample_weight=weights)
    assert abs(values["auc"] - exact) <= values["auc_error_bound"] + 1e-12
    return exact


def test_auc_of_a_million_rows_is_exact_to_six_digits():
    logits, labels = clicks(1_000_000, seed=1)
    values = computed(logits, labels, batch_size=65_536)
    exact = assert_auc(values, labels, logits)
    assert values["auc_error_bound"] < 2e-5
    assert values["auc"] == pytest.approx(exact, abs=1e-6)
    assert values["rows"] == 1_000_000


@pytest.mark.parametrize("num_bins", [2, 16, 1 << 10, 1 << 14])
def test_auc_error_bound_holds_for_few_bins(num_bins):
    logits, labels = clicks(20_000, seed=2)
    values = computed(logits, labels, num_bins=num_bins)
    assert_auc(values, labels, logits)
    assert values["auc_error_bound"] > 0


def test_auc_error_bound_is_reached_by_the_worst_order_inside_a_bin():
    labels = np.array([0, 0, 1, 1, 0, 1], dtype=np.float32)
    one_bin = np.array([1.0, 1.1, 1.2, 1.3, -9.0, 9.0], dtype=np.float32)  # 2 bins: the sign decides
    values = computed(one_bin, labels, num_bins=2)
    exact = assert_auc(values, labels, one_bin)
    assert exact == 1.0
    # Nine pairs, six of them (3 positives x 2 negatives) in the upper bin: counted half, so 3 + 3/1 of 9.
    assert values["auc"] == pytest.approx((3 + 6 / 2) / 9)
    assert values["auc_error_bound"] == pytest.approx(exact - values["auc"])


@pytest.mark.parametrize(
    "logits",
    [
        np.zeros(4_000, dtype=np.float32),
        np.full(4_000, -1e4, dtype=np.float32),
        np.where(np.arange(4_000) % 3 == 0, 1e4, -1e4).astype(np.float32),
        np.linspace(-60, 60, 4_000, dtype=np.float32),
        np.where(np.arange(4_000) % 2 == 0, np.inf, -np.inf).astype(np.float32),
        np.round(np.random.default_rng(3).standard_normal(4_000), 1).astype(np.float32),
    ],
    ids=["equal", "equal-low", "two-values", "beyond-the-bins", "infinite", "many-ties"],
)
def test_adversarial_logits(logits):
    labels = (np.random.default_rng(4).random(len(logits)) < 0.3).astype(np.float32)
    values = computed(logits, labels)
    finite = np.nan_to_num(logits, posinf=1e38, neginf=-1e38)
    assert_auc(values, labels, finite)
    assert all(value is None or math.isfinite(value) for value in values.values())


def test_ties_count_half():
    logits, labels = [0.0, 0.0, 1.0, -1.0], [1.0, 0.0, 1.0, 0.0]
    assert computed(logits, labels)["auc"] == roc_auc_score(labels, logits) == 0.875


def test_tiny_click_rate():
    logits, labels = clicks(200_000, seed=5, base=-9.5, spread=1.0)
    assert 10 < labels.sum() < 100
    values = computed(logits, labels)
    exact = assert_auc(values, labels, logits)
    assert values["auc"] == pytest.approx(exact, abs=1e-5)
    assert values["logloss"] == pytest.approx(log_loss(labels, 1 / (1 + np.exp(-logits.astype(np.float64)))), rel=1e-9)


def test_weights():
    logits, labels = clicks(10_000, seed=6)
    weights = np.random.default_rng(7).choice([0.5, 1.0, 3.0], len(logits)).astype(np.float32)
    values = computed(logits, labels, weights)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert_auc(values, labels, logits, weights)
    assert values["logloss"] == pytest.approx(log_loss(labels, probability, sample_weight=weights), rel=1e-12)
    assert values["prediction_mean"] == pytest.approx(np.average(probability, weights=weights), rel=1e-12)
    assert values["label_mean"] == pytest.approx(np.average(labels, weights=weights), rel=1e-12)
    assert values["calibration"] == pytest.approx((probability * weights).sum() / (labels * weights).sum(), rel=1e-12)


def test_normalized_entropy_closed_form():
    """A model that predicts the base rate for everyone has NE 1; here 1 click in 4, predicted 1/4."""
    values = computed([math.log(1 / 3)] * 4, [1.0, 0.0, 0.0, 0.0])
    assert values["ne"] == pytest.approx(1.0, rel=1e-7)
    assert values["calibration"] == pytest.approx(1.0, rel=1e-7)
    assert values["logloss"] == pytest.approx(-(math.log(0.25) + 3 * math.log(0.75)) / 4, rel=1e-7)
    half = computed([0.0] * 4, [1.0, 0.0, 0.0, 0.0])
    assert half["ne"] == pytest.approx(math.log(2) / -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), rel=1e-12)


def test_log_loss_is_stable_at_extreme_logits():
    values = computed([1e4, -1e4, 50.0], [0.0, 1.0, 1.0])
    assert values["logloss"] == pytest.approx((1e4 + 1e4 + math.exp(-50)) / 3, rel=1e-15)
    right = computed([700.0, -700.0], [1.0, 0.0])
    assert 0 <= right["logloss"] < 1e-300


def test_rows_without_weight_do_not_count():
    logits, labels = clicks(1_000, seed=8)
    padding = np.array([np.nan, np.inf, 3.0], dtype=np.float32)
    plain = computed(logits, labels)
    padded = computed(np.concatenate([logits, padding]), np.concatenate([labels, [1, 0, 1]]), [1.0] * 1_000 + [0.0] * 3)
    assert padded == pytest.approx(plain, rel=1e-12)
    assert padded["rows"] == 1_000


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_has_no_auc(label):
    values = computed([0.5, -0.5], [label, label])
    assert values["auc"] is None and values["auc_error_bound"] is None and values["ne"] is None
    assert values["label_mean"] == label
    assert (values["calibration"] is None) == (label == 0.0)


def test_no_rows():
    values = ClickMetrics(num_bins=8).compute()
    assert values.pop("rows") == 0
    assert set(values.values()) == {None}


def test_nan_logit_is_an_error():
    metrics = ClickMetrics(num_bins=8)
    metrics.update(torch.tensor([0.0, float("nan")]), torch.tensor([1.0, 0.0]), torch.ones(2))
    with pytest.raises(ValueError, match="1 of 2 logits are NaN"):
        metrics.compute()


def test_batches_add_up_and_reset_forgets():
    logits, labels = (torch.from_numpy(a) for a in clicks(5_000, seed=9))
    whole, pieces = ClickMetrics(), ClickMetrics()
    pieces.update(logits.flip(0), labels, torch.ones_like(labels))
    pieces.reset()
    whole.update(logits, labels, torch.ones_like(labels))
    for start in range(0, 5_000, 77):
        part = slice(start, start + 77)
        pieces.update(logits[part], labels[part], torch.ones_like(labels[part]))
    assert pieces.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert pieces.compute() == pieces.compute(), "compute leaves the sums as they are"


def test_half_precision_logits_and_outermost_bins():
    logits = torch.tensor([-LOGIT_RANGE, LOGIT_RANGE, 0.0, 20.0], dtype=torch.bfloat16)
    values = computed(logits, [0.0, 1.0, 0.0, 1.0], num_bins=4)
    assert values["auc"] == 1.0 and values["auc_error_bound"] == 0.0
