"""Click metrics as fixed-size sums: AUC, log loss, normalized entropy, calibration.

Nothing grows with the number of rows and nothing is sampled. Each rank adds its rows to its own sums; a report adds the
sums of all ranks, so the values do not depend on how rows were dealt out.

AUC comes from two histograms over the logit, positives p_k and negatives n_k. Rows in different bins are ordered
exactly; a pair in one bin counts half, as a tie does:

    AUC = Σ_k p_k · (Σ_{j<k} n_j + n_k / 2) / (P · N)

A pair in one bin may really be ordered either way, so the exact AUC lies within ½ · Σ_k p_k n_k / (P · N) of it:
``auc_error_bound``.

Shapes: B rows of a batch, K bins.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

NUM_BINS = 1 << 20
LOGIT_RANGE = 16.0  # logits beyond ±16 (probabilities beyond 1e-7) share the outermost bins
LARGEST_LOGIT = 1e30  # keeps an infinite logit's log loss a (huge) number instead of NaN

NUM_SUMS = 6  # weighted log loss, weights, weighted predictions, weighted labels, rows, NaN logits


class ClickMetrics:
    """Sums of any number of batches. ``num_bins`` sets memory and what one report communicates (16 bytes a bin) against
    the resolution of the AUC; the other metrics do not depend on it."""

    def __init__(self, num_bins: int = NUM_BINS, device: torch.device | str | None = None) -> None:
        if num_bins < 2:
            raise ValueError(f"num_bins is {num_bins}: it must be at least 2")
        self.num_bins = num_bins
        # One buffer, so that one collective reduces all: negatives [K], positives [K], sums [6].
        self._state = torch.zeros(2 * num_bins + NUM_SUMS, dtype=torch.float64, device=device)
        self._sums = self._state[2 * num_bins :]

    @property
    def sums(self) -> Tensor:
        """All there is, float64 [2 K + 6]: those of several ranks, or of several parts of the rows, add up."""
        return self._state

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Adds a batch. ``logits``, ``labels`` (0 … 1) and ``weights`` [B], of any floating type, on the device of the
        sums. Rows of weight 0 (padding) do not count, whatever their logit. Never waits for a GPU: a NaN logit is
        counted here and raised by ``compute``."""
        assert logits.dim() == 1 and logits.shape == labels.shape == weights.shape, (logits.shape, weights.shape)
        counted = weights > 0  # [B]
        nan = logits.isnan() & counted  # [B]
        w = weights.double()  # [B]
        y = labels.double()  # [B]
        x = logits.double().masked_fill(nan | ~counted, 0.0).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)  # [B]
        positive, negative = w * y, w * (1 - y)  # [B]

        scaled = (x.clamp(-LOGIT_RANGE, LOGIT_RANGE) + LOGIT_RANGE) * (self.num_bins / (2 * LOGIT_RANGE))  # [B]
        bins = scaled.long().clamp_(max=self.num_bins - 1)  # [B]
        self._state.index_add_(0, torch.cat((bins, bins + self.num_bins)), torch.cat((negative, positive)))

        loss = x.clamp(min=0) - x * y + torch.log1p(torch.exp(-x.abs()))  # [B], -y·log(p) - (1-y)·log(1-p)
        rows = counted.double()
        self._sums.add_(torch.stack((loss * w, w, torch.sigmoid(x) * w, positive, rows, nan.double())).sum(1))

    def compute(self, all_reduce: Callable[[Tensor], object] | None = None) -> dict[str, float | int | None]:
        """The metrics of all batches so far, over all ranks where ``all_reduce`` sums a tensor over them in place.

        ``auc`` and ``auc_error_bound``; ``logloss`` (natural logarithm); ``ne``, log loss over the entropy of the base
        rate (He et al. 2014, "Practical Lessons from Predicting Clicks on Ads at Facebook", eq. 1); ``calibration``,
        predicted over observed clicks; ``label_mean`` and ``prediction_mean``; ``rows``. What the rows do not define
        (AUC of a single class, a mean of nothing) is None. The sums stay as they are.
        Raises ``ValueError``, on every rank alike, when a logit was NaN.
        """
        state = self._state.clone()
        if all_reduce is not None:
            all_reduce(state)
        loss, weight, prediction, label, rows, nans = state[2 * self.num_bins :].tolist()
        if nans:
            raise ValueError(
                f"{nans:.0f} of {rows:.0f} logits are NaN: the model has diverged (lower the learning rates, set "
                "optim.dense.clip_norm) or a dense feature holds values that are not finite"
            )
        auc, bound = _auc(state[: self.num_bins], state[self.num_bins : 2 * self.num_bins])
        logloss, label_mean = _ratio(loss, weight), _ratio(label, weight)
        return {
            "auc": auc,
            "auc_error_bound": bound,
            "logloss": logloss,
            "ne": None if logloss is None else _ratio(logloss, _entropy(label_mean)),
            "calibration": _ratio(prediction, label),
            "label_mean": label_mean,
            "prediction_mean": _ratio(prediction, weight),
            "rows": int(rows),
        }

    def reset(self) -> None:
        self._state.zero_()


def _auc(negatives: Tensor, positives: Tensor) -> tuple[float | None, float | None]:
    """AUC and its error bound from histograms [K] over ascending logits."""
    pairs = (positives.sum() * negatives.sum()).item()
    if pairs == 0:
        return None, None
    below = negatives.cumsum(0) - negatives  # [K], negatives in lower bins
    return (positives @ (below + negatives / 2)).item() / pairs, (positives @ negatives).item() / 2 / pairs


def _entropy(rate: float) -> float:
    """Of a coin that falls on its head with probability ``rate``, in nats."""
    return -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
