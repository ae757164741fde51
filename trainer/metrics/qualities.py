"""Qualities of the ranked lists beyond their clicks: coverage, exposure, diversity and novelty, by request.

The list of a request is its rows by descending logit; list@k is the first k of them, or all where there are fewer. Equal
logits are ordered by a hash of request and item: without meaning, and the same however rows came or were dealt out.

* coverage@k: distinct items in any list@k / distinct items offered, in whatever row.
* gini@k: the Gini coefficient Σ_i (2 i - n - 1) x_i / (n Σ x) of how often each of the n items offered stands in a list@k, x
  ascending (Shani and Gunawardana 2011, "Evaluating Recommendation Systems", 3.3.1): 0 where all are shown alike, towards 1
  where a few have it all.
* diversity@k: the mean over lists@k of two rows or more of the mean distance of two rows (intra-list diversity: Ziegler et al.
  2005, "Improving Recommendation Lists Through Topic Diversification"; Vargas and Castells 2011), 1 where categories differ;
  diversity_cosine@k: 1 - cosine of the items' vectors, in closed form (|Σ u|² - Σ |u|²) / (k (k - 1)) for the mean cosine.
* novelty@k: the mean over lists@k of the mean of -log2 p(i), p(i) = (c_i + 1) / (n + |I|) with c_i of n training rows (add-one,
  so that a new item is a novel one) and I all items trained or offered (Castells, Vargas and Wang 2011, "Novelty and Diversity
  Metrics for Recommender Systems"). unseen@k: the mean share of items without a training row.

Counts are integers, a list's share 1 / length one in units of 2^-32; so sums do not depend on the number of ranks by a bit.

Letters: R rows of a part, N requests, K cut-offs, U distinct items, D values of a vector.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from data_loaders.hashing import mix
from trainer.metrics.grouped import Floats, Groups, Integers, PartSums, firsts
from trainer.metrics.shuffle_by_key import Rows, to_owners
from trainer.runtime.distributed import on_ranks

UNIT = 1 << 32  # of a list's share


@dataclass(frozen=True)
class ItemFacts:
    """What the rows of an evaluation do not say of items, known by their group ids. ``trained()``: rows [U, 2], how many
    training rows an item has in this rank's share of them, and the item; ``vectors(items [U])``: float64 [U, D], zeros where
    there is none."""

    trained: Callable[[], Rows] | None = None
    vectors: Callable[[Integers], Floats] | None = None


@dataclass(frozen=True)
class Lists:
    """Rows of N requests, each one's best first. ``items``, ``categories`` (0 where there are none), ``places`` [R], from 0, and
    ``lengths`` [R], of the row's list."""

    items: Integers
    categories: Integers
    places: Integers
    lengths: Integers

    @classmethod
    def of(cls, groups: Groups) -> "Lists":
        """``groups.others`` has items, then categories, if any."""
        items = groups.others[:, 0]
        categories = groups.others[:, 1] if groups.others.shape[1] > 1 else np.zeros_like(items)
        keys = np.repeat(groups.keys, groups.sizes)
        ties = mix(mix(items.view(np.uint64)) ^ keys.view(np.uint64))
        order = np.lexsort((categories, ties, -groups.logits, np.repeat(np.arange(len(groups.keys)), groups.sizes)))
        places = np.arange(len(items)) - np.repeat(groups.starts, groups.sizes)
        return cls(items[order], categories[order], places, np.repeat(groups.sizes, groups.sizes))

    def first(self, k: int) -> "Lists":
        """Lists@k."""
        kept = self.places < k
        lengths = np.minimum(self.lengths[kept], k)
        return Lists(self.items[kept], self.categories[kept], self.places[kept], lengths)

    @property
    def starts(self) -> Integers:
        """[N]."""
        return (self.places == 0).nonzero()[0]


class Qualities:
    """Takes parts as ``Ranking`` does. ``top_k``: the K cut-offs; ``category``: whether rows have one."""

    def __init__(self, top_k: Sequence[int], facts: ItemFacts, *, category: bool) -> None:
        self._top_k, self._facts, self._category = list(top_k), facts, category
        self._of_pairs = [k for k in self._top_k if k > 1]
        self._counts = np.empty((0, 2 + 2 * len(self._top_k)), np.int64)  # offered, item, shown [K], shares [K]
        self._lists: dict[int, Lists] = {}  # by part, of the largest k, where vectors are looked up
        self._categories, self._cosines = PartSums(), PartSums()

    def add(self, part: int, groups: Groups) -> None:
        lists = Lists.of(groups)
        self._counts = added_up(np.concatenate([self._counts, counted(lists, self._top_k)]))
        if self._category:
            self._categories.add(part, [x for k in self._of_pairs for x in _summed(category_distances(lists.first(k)))])
        if self._facts.vectors is not None:
            self._lists[part] = lists.first(max(self._top_k))

    def values(self, parts: int) -> dict[str, Any]:
        """By the names above, ``items_offered`` besides. All ranks call it together."""
        counts = added_up(to_owners(self._counts))
        values = self._exposure(counts)
        if self._category:
            values |= self._means("diversity", self._categories, parts)
        if self._facts.vectors is not None:
            self._compare(self._facts.vectors)
            values |= self._means("diversity_cosine", self._cosines, parts)
        if self._facts.trained is not None:
            values |= self._novelty(counts, added_up(to_owners(self._facts.trained())))
        return values

    def _exposure(self, counts: Rows) -> dict[str, Any]:
        values: dict[str, Any] = {"items_offered": sum(on_all_ranks(len(counts)))}
        for index, k in enumerate(self._top_k):
            shown = histogram(counts[:, 2 + index], np.ones(len(counts), np.int64))
            offered = sum(shown.values())
            values[f"coverage@{k}"] = (offered - shown.get(0, 0)) / offered if offered else None
            values[f"gini@{k}"] = gini(shown)
        return values

    def _novelty(self, counts: Rows, trained: Rows) -> dict[str, Any]:
        """``trained`` [U, 2], of all ranks' training rows those items that are this rank's."""
        seen = np.zeros(len(counts), np.int64)
        both, here, there = np.intersect1d(counts[:, 1], trained[:, 1], assume_unique=True, return_indices=True)
        seen[here] = trained[there, 0]
        rows = sum(on_all_ranks(int(trained[:, 0].sum())))
        items = sum(on_all_ranks(len(counts) + len(trained) - len(both)))
        values = {}
        for index, k in enumerate(self._top_k):
            shares = histogram(seen, counts[:, 2 + len(self._top_k) + index])
            total = sum(shares.values())
            bits = sum(share * math.log2((rows + items) / (count + 1)) for count, share in sorted(shares.items()))
            values[f"novelty@{k}"] = bits / total if total else None
            values[f"unseen@{k}"] = shares.get(0, 0) / total if total else None
        return values

    def _compare(self, vectors: Callable[[Integers], Floats]) -> None:
        """Of the lists kept, the cosine distances."""
        wanted = np.unique(np.concatenate([np.empty(0, np.int64), *(lists.items for lists in self._lists.values())]))
        found = vectors(wanted)
        units = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        for part, lists in self._lists.items():
            sums: list[float] = []
            for k in self._of_pairs:
                first = lists.first(k)
                sums += _summed(cosine_distances(first, units[np.searchsorted(wanted, first.items)]))
            self._cosines.add(part, sums)

    def _means(self, name: str, sums: PartSums, parts: int) -> dict[str, float | None]:
        total = sums.total(2 * len(self._of_pairs), parts)
        return {f"{name}@{k}": x / n if n else None for k, x, n in zip(self._of_pairs, total[::2], total[1::2])}


def counted(lists: Lists, top_k: Sequence[int]) -> Rows:
    """[U, 2 + 2 K], by ascending item: in how many rows it is offered, the item, in how many lists@k it stands, and the sum of
    1 / length of these lists in ``UNIT``."""
    items, inverse = np.unique(lists.items, return_inverse=True)
    shown = [lists.places < k for k in top_k]
    shares = [UNIT // np.minimum(lists.lengths, k) for k in top_k]
    columns = [np.bincount(inverse), items, *(np.bincount(inverse[kept], minlength=len(items)) for kept in shown)]
    for kept, share in zip(shown, shares):
        summed = np.zeros(len(items), np.int64)
        np.add.at(summed, inverse[kept], share[kept])
        columns.append(summed)
    return np.stack(columns, axis=1)


def added_up(rows: Rows) -> Rows:
    """Rows of one item, in column 1, as one."""
    if not len(rows):
        return rows
    rows = rows[np.argsort(rows[:, 1], kind="stable")]
    starts = firsts(rows[:, 1])
    summed = np.add.reduceat(rows, starts, axis=0)
    summed[:, 1] = rows[starts, 1]
    return summed


def histogram(values: Integers, weights: Integers) -> Mapping[int, int]:
    """The sum of the weights by value, over all ranks, which call it together."""
    distinct, inverse = np.unique(values, return_inverse=True)
    sums = np.zeros(len(distinct), np.int64)
    np.add.at(sums, inverse, weights)
    total: Counter[int] = Counter()
    for found in on_all_ranks(list(zip(distinct.tolist(), sums.tolist()))):
        for value, weight in found:
            total[value] += weight
    return total


def gini(shown: Mapping[int, int]) -> float | None:
    """Of how many items are shown so many times, exactly in integers until the last division."""
    below = numerator = 0
    items, total = sum(shown.values()), sum(times * count for times, count in shown.items())
    for times, count in sorted(shown.items()):
        numerator += times * count * (2 * below + count - items)
        below += count
    return numerator / (items * total) if total else None


def category_distances(lists: Lists) -> Floats:
    """The mean over pairs of 1 where categories differ, for each list of two rows or more."""
    number = np.cumsum(lists.places == 0) - 1  # [R], of the list
    order = np.lexsort((lists.categories, number))
    new = np.union1d(lists.starts, firsts(lists.categories[order]))  # ``order`` keeps lists where they are
    sizes = np.diff(new, append=len(order))  # rows of one list and category
    alike = np.bincount(number[new], (sizes * (sizes - 1)).astype(np.float64), len(lists.starts)).astype(np.float64)
    return _of_pairs(lists, alike)


def cosine_distances(lists: Lists, units: Floats) -> Floats:
    """The mean over pairs of 1 - cosine, for each list of two rows or more; ``units`` [R, D], vectors of length 1 or 0."""
    if not len(units):
        return np.empty(0)
    whole = np.add.reduceat(units, lists.starts, axis=0)  # [N, D]
    own = np.add.reduceat((units * units).sum(1), lists.starts)
    return _of_pairs(lists, (whole * whole).sum(1) - own)


def _of_pairs(lists: Lists, alike: Floats) -> Floats:
    """``alike`` [N]: the sum of similarities over ordered pairs."""
    lengths = lists.lengths[lists.starts]
    pairs = lengths > 1
    return 1 - alike[pairs] / (lengths * (lengths - 1))[pairs]


def _summed(values: Floats) -> list[float]:
    return [float(values.sum()), float(len(values))]


def on_all_ranks(value: Any) -> Iterable[Any]:
    return on_ranks(value) if dist.is_initialized() else [value]
