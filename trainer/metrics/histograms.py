"""The scores of an evaluation in some fifty numbers: how clicks and others are spread over the logit, and what was predicted and
seen in bins of about equal weight. Both come from the histograms of ``trainer.metrics.click_metrics``.

Letters: K bins of the logit, S bins that are shown, M bins of equal weight.
"""

from typing import Any

import torch
from torch import Tensor

MOST_BINS = 100  # S at most, and above half of it where logits spread over that many bins of the histogram


def score_histogram(negatives: Tensor, positives: Tensor, logit_range: float) -> dict[str, list[float]]:
    """Weights of clicks and others by the logit, from histograms [K] over ±``logit_range``, K a power of two: ``edges`` [S + 1]
    of bins, each as wide as a power of two of the histogram's, ``clicks`` and ``others`` [S]. Empty lists of no rows."""
    occupied = (negatives + positives).nonzero()
    if not len(occupied):
        return {"edges": [], "clicks": [], "others": []}
    first, last = int(occupied[0]), int(occupied[-1])
    width = 1
    while last // width - first // width >= MOST_BINS:
        width *= 2
    begin, end = first // width, last // width + 1
    fine = 2 * logit_range / len(negatives)
    clicks, others = (part.view(-1, width).sum(1)[begin:end].tolist() for part in (positives, negatives))
    return {
        "edges": [n * width * fine - logit_range for n in range(begin, end + 1)],
        "clicks": clicks,
        "others": others,
    }


def equal_mass_sums(negatives: Tensor, positives: Tensor, logit_range: float, bins: int) -> Tensor:
    """Predictions, clicks and weights [3, M] of ``bins`` bins of about equal weight, put together of bins of the logit [K],
    none of which is divided. A prediction counts as that of its bin's middle, which is right to logit_range / (4 K)."""
    mass = negatives + positives
    width = 2 * logit_range / len(mass)
    middles = (torch.arange(len(mass), dtype=mass.dtype, device=mass.device) + 0.5) * width - logit_range
    places = ((mass.cumsum(0) - mass / 2) / mass.sum() * bins).nan_to_num().long().clamp_(0, bins - 1)
    sums = torch.zeros(3, bins, dtype=mass.dtype, device=mass.device)
    return sums.index_add_(1, places, torch.stack((torch.sigmoid(middles) * mass, positives, mass)))


def calibration_bins(sums: Tensor) -> list[dict[str, float]]:
    """``weight``, mean ``predicted`` probability and ``observed`` click rate of each bin of [3, M] that has any weight."""
    return [
        {"weight": weight, "predicted": prediction / weight, "observed": clicks / weight}
        for prediction, clicks, weight in sums.T.tolist()
        if weight
    ]


def distribution(negatives: Tensor, positives: Tensor, logit_range: float, bins: int) -> dict[str, Any]:
    """What ``distributions.json`` holds of a split."""
    sums = equal_mass_sums(negatives, positives, logit_range, bins)
    return {"scores": score_histogram(negatives, positives, logit_range), "calibration": calibration_bins(sums)}
