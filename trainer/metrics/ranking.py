"""Ranking metrics by request: NDCG@k, hit rate@k and mean reciprocal rank, of rows scored for one request each.

A row is relevant if its label is 1; weights do not count beyond 0 (not a row). Requests without a relevant row are left
out and counted. Rows of equal logits have no order: every figure is its expected value over all orders of tied rows, which
does not depend on how rows came or were dealt out (McSherry and Najork 2008, "Computing Information Retrieval Performance
Measures Efficiently in the Presence of Tied Scores"; scikit-learn's ``ndcg_score`` does the same).

* DCG@k = Σ_{i ≤ k} rel_i / log2(i + 1); NDCG@k is that over the DCG@k of the best order (Järvelin and Kekäläinen 2002).
* hit rate@k: the share of requests with a relevant row among the first k.
* MRR: the mean of 1 / the rank of the first relevant row (Voorhees 1999).

Letters: R rows of a part, N requests, T blocks of tied rows, C requests with a click.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.metrics.grouped import Floats, Groups, Integers, PartSums


class Ranking:
    """Takes parts as ``GroupAUC`` does. ``top_k``: the k of NDCG@k and hit rate@k."""

    def __init__(self, top_k: list[int]) -> None:
        self._top_k = top_k
        self._sums = PartSums()

    def add(self, part: int, groups: Groups) -> None:
        relevant = groups.sums(groups.labels)  # [N]
        clicked = relevant > 0
        if not clicked.any():
            self._sums.add(part, [0.0] * (2 + 2 * len(self._top_k)) + [len(relevant)])
            return
        ndcg = [ndcg_at(k, groups)[clicked].sum() for k in self._top_k]
        places, chances, firsts = first_click(groups)
        hits = [chances[places <= k].sum() for k in self._top_k]
        reciprocal = np.add.reduceat(chances / places, firsts).sum()
        self._sums.add(part, [clicked.sum(), reciprocal, *ndcg, *hits, len(relevant)])

    def values(self, parts: int) -> dict[str, Any]:
        """``ndcg@k``, ``hit_rate@k``, ``mrr``; ``requests`` they are means of, ``requests_without_click`` left out."""
        requests, reciprocal, *sums, seen = self._sums.total(3 + 2 * len(self._top_k), parts)
        names = [f"{name}@{k}" for name in ("ndcg", "hit_rate") for k in self._top_k]
        means = {
            name: value / requests if requests else None for name, value in zip((*names, "mrr"), (*sums, reciprocal))
        }
        return {**means, "requests": int(requests), "requests_without_click": int(seen - requests)}


def ndcg_at(k: int, groups: Groups) -> Floats:
    """[N]; 0 where a request has no relevant row."""
    ranks = np.repeat(groups.starts + groups.sizes, groups.sizes) - np.arange(len(groups.logits))  # [R], from 1
    discounts = np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0)
    sizes = np.diff(groups.block_starts, append=len(ranks))  # [T]
    shares = np.add.reduceat(groups.labels, groups.block_starts) / sizes
    best = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])
    ideal = best[np.minimum(groups.sums(groups.labels), k).astype(np.int64)]
    return groups.sums(np.repeat(shares, sizes) * discounts) / np.where(ideal > 0, ideal, 1.0)


def first_click(groups: Groups) -> tuple[Integers, Floats, Integers]:
    """Where the first relevant row of each request with one may be: ranks and their probabilities, request by request, and
    where each request's begin [C].

    It is in the highest block with a relevant row. Of its t rows in random order, p of them relevant, the first relevant
    one comes at place x with probability C(t - x, p - 1) / C(t, p), x = 1 … t - p + 1.
    """
    sizes = np.diff(groups.block_starts, append=len(groups.logits))  # [T]
    relevant = np.add.reduceat(groups.labels, groups.block_starts)
    blocks = np.maximum.reduceat(np.where(relevant > 0, np.arange(len(sizes)), -1), groups.first_blocks)  # [N]
    clicked = blocks >= 0
    blocks = blocks[clicked]  # [C]
    above = (groups.starts + groups.sizes)[clicked] - groups.block_starts[blocks] - sizes[blocks]
    t, p = sizes[blocks], relevant[blocks].astype(np.int64)
    counts = t - p + 1
    firsts = np.cumsum(counts) - counts
    x = np.arange(counts.sum()) - np.repeat(firsts, counts) + 1
    t, p, above = (np.repeat(values, counts) for values in (t, p, above))
    chances = np.exp(_log_choose(t - x, p - 1) - _log_choose(t, p))
    return above + x, chances, firsts


def _log_choose(n: NDArray[np.int64], k: NDArray[np.int64]) -> Floats:
    def log_factorial(values: NDArray[np.int64]) -> Floats:
        return torch.lgamma(torch.from_numpy(values + 1.0)).numpy()

    return log_factorial(n) - log_factorial(k) - log_factorial(n - k)
