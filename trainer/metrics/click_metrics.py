"""Click metrics as fixed-size sums: AUC, AUC-PR, log loss, normalized entropy, calibration, accuracy.

Nothing grows with the number of rows and nothing is sampled. Each rank adds its rows to its own sums; a report adds the
sums of all ranks, so the values do not depend on how rows were dealt out.

AUC comes from two histograms over the logit, positives p_k and negatives n_k. Rows in different bins are ordered
exactly; a pair in one bin counts half, as a tie does:

    AUC = Σ_k p_k · (Σ_{j<k} n_j + n_k / 2) / (P · N)

A pair in one bin may really be ordered either way, so the exact AUC lies within ½ · Σ_k p_k n_k / (P · N) of it:
``auc_error_bound``. AUC-PR comes from the same histograms (``_auc_pr``).

Shapes: B rows of a batch, K bins of the logit, M bins of the probability.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data_loaders.errors import UserError
from trainer.metrics.histograms import distribution, equal_mass_sums
from trainer.metrics.scored_rows import ScoredRows, scored
from trainer.runtime.read_back import to_host

NUM_BINS = 1 << 20
LOGIT_RANGE = 16.0  # logits beyond ±16 (probabilities beyond 1e-7) share the outermost bins

NUM_SUMS = 6  # those of ``ScoredRows``


class ClickMetrics:
    """Sums of any number of batches. ``num_bins`` sets memory and what one report communicates (16 bytes a bin) against
    the resolution of AUC and AUC-PR; the other metrics do not depend on it.

    ``calibration_bins``: so many bins of expected calibration error; with 0 neither that nor accuracy and AUC-PR are
    computed (the windows of training do without)."""

    def __init__(
        self, num_bins: int = NUM_BINS, device: torch.device | str | None = None, *, calibration_bins: int = 0
    ) -> None:
        if num_bins < 2:
            raise UserError(f"num_bins is {num_bins}: it must be at least 2")
        self.num_bins, self.calibration_bins = num_bins, calibration_bins
        # One buffer, so that one collective reduces all: negatives [K], positives [K], sums [6]; then, where there are
        # calibration bins, predictions, labels and weights [3 M] and the weight of rows that 1/2 puts on the right side.
        further = 3 * calibration_bins + 1 if calibration_bins else 0
        self._state = torch.zeros(2 * num_bins + NUM_SUMS + further, dtype=torch.float64, device=device)
        self._sums = self._state[2 * num_bins : 2 * num_bins + NUM_SUMS]
        self._calibration = self._state[2 * num_bins + NUM_SUMS :]

    @property
    def sums(self) -> Tensor:
        """All there is, float64 [2 K + 6] or [2 K + 6 + 3 M + 1]: those of several ranks, or of several
        parts of the rows, add up."""
        return self._state

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Adds a batch. ``logits``, ``labels`` (0 … 1) and ``weights`` [B], of any floating type, on the device of the
        sums. Rows of weight 0 (padding) do not count, whatever their logit. Never waits for a GPU: a NaN logit is
        counted here and raised by ``compute``."""
        self.add(scored([logits], [labels], [weights]))

    @torch.no_grad()
    def add(self, rows: ScoredRows) -> None:
        """Adds n batches."""
        x, y, w = rows.logits, rows.labels, rows.weights  # [n B]
        scaled = (x.clamp(-LOGIT_RANGE, LOGIT_RANGE) + LOGIT_RANGE) * (self.num_bins / (2 * LOGIT_RANGE))  # [n B]
        bins = scaled.long().clamp_(max=self.num_bins - 1)  # [n B]
        self._state.index_add_(0, torch.cat((bins, bins + self.num_bins)), torch.cat((w * (1 - y), w * y)))
        for sums in rows.sums:  # one after the other: the result does not depend on how many are added at once
            self._sums.add_(sums)
        if self.calibration_bins:
            self._update_calibration(torch.sigmoid(x), y, w)

    def _update_calibration(self, prediction: Tensor, y: Tensor, w: Tensor) -> None:
        size = self.calibration_bins
        bins = (prediction * size).ceil().long().sub_(1).clamp_(0, size - 1)  # [B], bin m is (m / M, (m + 1) / M]
        parts = torch.cat((prediction * w, y * w, w))
        self._calibration.index_add_(0, torch.cat((bins, bins + size, bins + 2 * size)), parts)
        self._calibration[-1] += (w * ((prediction > 0.5) == (y > 0.5))).sum()

    def compute(self, all_reduce: Callable[[Tensor], object] | None = None) -> dict[str, float | int | None]:
        """The metrics of all batches so far, over all ranks where ``all_reduce`` sums a tensor over them in place.

        ``auc`` and ``auc_error_bound``; ``logloss`` (natural logarithm); ``ne``, log loss over the entropy of the base
        rate (He et al. 2014, "Practical Lessons from Predicting Clicks on Ads at Facebook", eq. 1); ``calibration``,
        predicted over observed clicks; ``label_mean`` and ``prediction_mean``; ``rows``. With calibration bins also
        ``auc_pr``, ``auc_pr_error_bound``, ``accuracy`` (a click is predicted where its probability is above 1/2), ``ece``
        and ``ece_equal_mass`` (``_ece``, ``_ece_equal_mass``). What the rows do not define (AUC of a single class, a mean
        of nothing) is None. The sums stay as they are.
        Raises ``UserError``, on every rank alike, when a logit was NaN.
        """
        state = self._state.clone()
        if all_reduce is not None:
            all_reduce(state)
        state = to_host(state)  # once: what follows asks for a dozen numbers
        loss, weight, prediction, label, rows, nans = state[2 * self.num_bins :][:NUM_SUMS].tolist()
        if nans:
            raise UserError(
                f"{nans:.0f} of {rows:.0f} logits are NaN: the model has diverged (lower the learning rates, set "
                "optim.dense.clip_norm) or a dense feature holds values that are not finite"
            )
        negatives, positives = state[: 2 * self.num_bins].view(2, -1)
        auc, bound = _auc(negatives, positives)
        logloss, label_mean = _ratio(loss, weight), _ratio(label, weight)
        values = {
            "auc": auc,
            "auc_error_bound": bound,
            "logloss": logloss,
            "ne": None if logloss is None else _ratio(logloss, _entropy(label_mean)),
            "calibration": _ratio(prediction, label),
            "label_mean": label_mean,
            "prediction_mean": _ratio(prediction, weight),
            "rows": int(rows),
        }
        if self.calibration_bins:
            values |= _held_out(negatives, positives, state[2 * self.num_bins + NUM_SUMS :])
        return values

    def over_ranks(self, all_reduce: Callable[[Tensor], object]) -> "ClickMetrics":
        """Those of all ranks together, whose sums ``all_reduce`` adds up in place."""
        whole = ClickMetrics(self.num_bins, self._state.device, calibration_bins=self.calibration_bins)
        whole._state.copy_(self._state)
        all_reduce(whole._state)
        return whole

    def distribution(self) -> dict[str, Any]:
        """How scores are spread, and how true they are (``trainer.metrics.histograms``)."""
        negatives, positives = self._state[: 2 * self.num_bins].view(2, -1)
        return distribution(negatives, positives, LOGIT_RANGE, self.calibration_bins)

    def reset(self) -> None:
        self._state.zero_()


def _auc(negatives: Tensor, positives: Tensor) -> tuple[float | None, float | None]:
    """AUC and its error bound from histograms [K] over ascending logits."""
    pairs = (positives.sum() * negatives.sum()).item()
    if pairs == 0:
        return None, None
    below = negatives.cumsum(0) - negatives  # [K], negatives in lower bins
    return (positives @ (below + negatives / 2)).item() / pairs, (positives @ negatives).item() / 2 / pairs


def _held_out(negatives: Tensor, positives: Tensor, calibration: Tensor) -> dict[str, float | None]:
    """What only an evaluation reports; ``calibration`` [3 M + 1]."""
    auc_pr, bound = _auc_pr(negatives, positives)
    sums = calibration[:-1].view(3, -1)
    return {
        "auc_pr": auc_pr,
        "auc_pr_error_bound": bound,
        "ece": _ece(*sums),
        "ece_equal_mass": _ece_equal_mass(negatives, positives, sums.shape[1]),
        "accuracy": _ratio(calibration[-1].item(), sums[2].sum().item()),
    }


def _auc_pr(negatives: Tensor, positives: Tensor) -> tuple[float | None, float | None]:
    """Average precision, Σ (recall_i - recall_{i-1}) · precision_i over descending thresholds i as scikit-learn has it, from
    histograms [K] over ascending logits, and its error bound. A bin counts as one threshold.

    With p and n in a bin and A and B above it, whatever the order and the ties inside, a bin's part of Σ Δ(true
    positives) · precision is at least that of all negatives first, ∫_0^p (A + x) / (A + x + B + n) dx, and at most that of
    all positives first at one threshold, p · (A + p) / (A + p + B).
    """
    n, p = negatives.flip(0), positives.flip(0)
    total = p.sum().item()
    if total == 0:
        return None, None
    above, false = p.cumsum(0) - p, n.cumsum(0)  # A, B + n [K]
    tied = _product(p, (above + p) / (above + p + false))
    most = _product(p, (above + p) / (above + p + false - n))
    least = p - _product(false, torch.log1p(p / (above + false)))
    value, low, high = (part.sum().item() for part in (tied, least, most))
    return value / total, max(high - value, value - low, 0.0) / total


def _product(factor: Tensor, other: Tensor) -> Tensor:
    """0 where ``factor`` is, even if the other one is undefined there."""
    return torch.where(factor > 0, factor * other, 0.0)


def _ece(predictions: Tensor, labels: Tensor, weights: Tensor) -> float | None:
    """Expected calibration error Σ_m (w_m / W) · |mean label - mean prediction in bin m| (Guo et al. 2017, "On Calibration
    of Modern Neural Networks", eq. 5, here of the click's probability), from sums by bin [M]."""
    return _ratio((predictions - labels).abs().sum().item(), weights.sum().item())


def _ece_equal_mass(negatives: Tensor, positives: Tensor, bins: int) -> float | None:
    """The same with bins of about equal weight, put together of bins of the logit [K]: a prediction counts as that of its
    bin's middle, which is right to LOGIT_RANGE / (4 K), 4e-6 by default."""
    predictions, labels, weights = equal_mass_sums(negatives, positives, LOGIT_RANGE, bins)
    return _ratio((predictions - labels).abs().sum().item(), weights.sum().item())


def relative_improvement(auc: float, base: float) -> float:
    """RelaImpr of an AUC over a base model's, (AUC - 0.5) / (base - 0.5) - 1 (Yan et al. 2014, "Coupled Group Lasso for
    Web-Scale CTR Prediction in Display Advertising"; Zhou et al. 2018, DIN, eq. 10), as a fraction."""
    return (auc - 0.5) / (base - 0.5) - 1


def _entropy(rate: float) -> float:
    """Of a coin that falls on its head with probability ``rate``, in nats."""
    return -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
