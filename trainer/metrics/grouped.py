"""Metrics by group: GAUC over groups of any number, and figures of each of the largest slices.

Both take the parts of ``trainer.metrics.shuffle_by_key`` one after the other (each has all rows of its groups), and
need memory for one part and a few sums a part.

Letters: R rows of a part, N groups, T blocks of tied rows (of one group and logit).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from trainer.metrics.scored_rows import LARGEST_LOGIT
from trainer.metrics.shuffle_by_key import Rows, sum_by_part, unpack
from trainer.runtime.distributed import on_ranks

MOST_SLICES = 50

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Groups:
    """A part's rows by ascending key and logit. ``keys`` int64 [N]; ``starts`` int64 [N], where each group's rows begin;
    ``logits``, ``labels``, ``weights`` float64 [R]; ``others`` int64 [R, E], what further columns the rows have."""

    keys: Integers
    starts: Integers
    logits: Floats
    labels: Floats
    weights: Floats
    others: Integers

    @classmethod
    def of(cls, rows: Rows) -> "Groups":
        """``rows`` as ``KeyedRows.parts`` yields them, not empty."""
        starts = firsts(rows[:, 1])
        return cls(rows[starts, 1], starts, *unpack(rows[:, 0]), rows[:, 2:])

    @property
    def sizes(self) -> Integers:
        return np.diff(self.starts, append=len(self.logits))

    def sums(self, values: Floats) -> Floats:
        """[N] of [R]."""
        return np.add.reduceat(values, self.starts)

    @cached_property
    def block_starts(self) -> Integers:
        """[T]."""
        first = np.zeros(len(self.logits), bool)
        first[1:] = self.logits[1:] != self.logits[:-1]
        first[self.starts] = True
        return first.nonzero()[0]

    @cached_property
    def first_blocks(self) -> Integers:
        """[N], the index of each group's first block."""
        return np.searchsorted(self.block_starts, self.starts)

    def auc(self) -> Floats:
        """[N], exact, ties counted half; NaN where a group has one class only."""
        positive = np.add.reduceat(self.weights * self.labels, self.block_starts)  # [T]
        negative = np.add.reduceat(self.weights * (1 - self.labels), self.block_starts)
        before = np.cumsum(negative) - negative
        below = before - np.repeat(before[self.first_blocks], np.diff(self.first_blocks, append=len(before)))
        ordered = np.add.reduceat(positive * (below + negative / 2), self.first_blocks)  # [N]
        pairs = self.sums(self.weights * self.labels) * self.sums(self.weights * (1 - self.labels))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(pairs > 0, ordered / pairs, np.nan)


class PartSums:
    """Sums by part: each is written by the rank that has the part."""

    def __init__(self) -> None:
        self._lines: dict[int, Sequence[float]] = {}

    def add(self, part: int, sums: Sequence[float]) -> None:
        self._lines[part] = sums

    def total(self, width: int, parts: int) -> list[float]:
        """[width]. All ranks call it together, with the same numbers."""
        sums = np.zeros((parts, width))
        for part, line in self._lines.items():
            sums[part] = line
        return sum_by_part(sums).tolist()


class GroupAUC:
    """Zhou et al. 2018, "Deep Interest Network", eq. 8: the mean of the groups' AUC, weighted by their impressions (the sum
    of their rows' weights), over the groups that have rows of both classes."""

    def __init__(self) -> None:
        self._sums = PartSums()

    def add(self, part: int, groups: Groups) -> None:
        auc = groups.auc()
        both = ~np.isnan(auc)
        weights = groups.sums(groups.weights)[both]
        rows = int(groups.sizes[both].sum())
        self._sums.add(part, [(weights * auc[both]).sum(), weights.sum(), both.sum(), rows, len(both)])

    def values(self, parts: int) -> dict[str, Any]:
        """``gauc``; ``gauc_groups`` and ``gauc_rows`` that it is the mean of; ``gauc_groups_of_one_class``, left out."""
        total, weight, groups, rows, all_groups = self._sums.total(5, parts)
        return {
            "gauc": total / weight if weight else None,
            "gauc_groups": int(groups),
            "gauc_rows": int(rows),
            "gauc_groups_of_one_class": int(all_groups - groups),
        }


class Slices:
    """Rows, exact AUC, log loss, calibration and mean label of each of the values that most rows have; ``texts``: what keys
    stand for."""

    def __init__(self, texts: Callable[[list[int]], Mapping[int, str | None]], most: int = MOST_SLICES) -> None:
        self._texts, self._most = texts, most
        self._largest: list[tuple[int, int, float | None, list[float]]] = []  # -rows, key, AUC, sums
        self._sums = PartSums()

    def add(self, part: int, groups: Groups) -> None:
        sums = np.stack([groups.sums(values) for values in _columns(groups)], axis=1)  # [N, 4]
        sizes = groups.sizes
        self._sums.add(part, [len(sizes), sizes.sum(), *sums.sum(0)])
        largest = np.lexsort((groups.keys, -sizes))[: self._most]
        auc = groups.auc()
        found = [
            (-int(sizes[i]), int(groups.keys[i]), None if np.isnan(auc[i]) else float(auc[i]), sums[i].tolist())
            for i in largest
        ]
        self._largest = sorted([*self._largest, *found], key=lambda each: each[:2])[: self._most]

    def values(self, parts: int) -> dict[str, Any]:
        """``slices``: a line a value, that of most rows first, and one for all others."""
        values, rows, *total = self._sums.total(6, parts)
        largest = self._largest_of_all()
        names = self._texts([key for _, key, _, _ in largest])
        lines = [{"value": names[key], **_figures(-size, auc, sums)} for size, key, auc, sums in largest]
        if values > len(largest):
            rest = [all_of_it - sum(sums) for all_of_it, sums in zip(total, zip(*(found[3] for found in largest)))]
            size = int(rows) + sum(found[0] for found in largest)
            lines.append({"other_values": int(values) - len(largest), **_figures(size, None, rest)})
        return {"slices": lines}

    def _largest_of_all(self) -> list[tuple[int, int, float | None, list[float]]]:
        if not dist.is_initialized():
            return self._largest
        everywhere = on_ranks(self._largest)
        return sorted((each for found in everywhere for each in found), key=lambda each: each[:2])[: self._most]


def _columns(groups: Groups) -> tuple[Floats, ...]:
    """Weights, weighted labels, predictions and log losses [R]."""
    x = np.clip(groups.logits, -LARGEST_LOGIT, LARGEST_LOGIT)
    small = np.exp(-np.abs(x))
    prediction = np.where(x >= 0, 1, small) / (1 + small)
    loss = np.maximum(x, 0) - x * groups.labels + np.log1p(small)
    return groups.weights, *(groups.weights * values for values in (groups.labels, prediction, loss))


def _figures(rows: int, auc: float | None, sums: Sequence[float]) -> dict[str, Any]:
    weight, labels, predictions, losses = sums
    return {
        "rows": rows,
        "auc": auc,
        "logloss": losses / weight,
        "calibration": predictions / labels if labels else None,
        "label_mean": labels / weight,
    }


def firsts(keys: Integers) -> Integers:
    """Where a run of equal keys, of which there are some, begins."""
    return np.concatenate([[True], keys[1:] != keys[:-1]]).nonzero()[0]
