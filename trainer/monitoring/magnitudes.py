"""Warnings of numbers that a model cannot learn from: dense features that are huge, constant or in other units than before,
sample weights far from 1, and the loss that follows. Each names the feature and what to set.

The loader sums up what it decodes (``data_loaders.magnitudes``); here ranks add these sums up and check them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_loaders.magnitudes import SUMS
from data_loaders.schema import Feature, Schema

LARGE = 1000.0  # root mean square of a dense feature
CONSTANT = 1e-6  # standard deviation over root mean square: float32 resolves little more
JUMP = 100.0  # from one part of the data to another
JUDGED = 200  # rows looked at, at least, to compare parts of the data
HEAVY = 100.0  # mean of the sample weights; and one over it
LOSS = 10.0  # log loss; the mean click rate alone has 0.7 at most
NAMED = 5

Finding = tuple[str, str]  # a warning's name, shown once, and its message


@dataclass(frozen=True)
class Magnitude:
    """Of a feature's values as the model gets them, in ``rows`` rows, of which ``looked_at``: their mean, the mean of their
    absolute values (``size``) and the root of the mean of their squares (``rms``)."""

    rows: int
    looked_at: int
    mean: float
    size: float
    rms: float

    @property
    def deviation(self) -> float:
        return math.sqrt(max(self.rms**2 - self.mean**2, 0.0))


def magnitudes(
    schema: Schema, sums: NDArray[np.float64], all_reduce: Callable[[Tensor], object] | None = None
) -> dict[str, Magnitude]:
    """By dense feature, and of the sample weights by the name of their column; of all ranks where ``all_reduce`` sums a
    tensor over them in place."""
    totals = torch.from_numpy(sums)
    if all_reduce is not None:
        all_reduce(totals)
    rows, looked_at, *rest = totals.tolist()
    lines = [rest[begin : begin + SUMS] for begin in range(0, len(rest), SUMS)]
    watched = [name if name in schema.numbers else None for name in schema.dense_columns]
    names = [*watched, None, *([schema.weight] if schema.weight else [])]  # the label is checked elsewhere
    return {
        name: Magnitude(int(rows), int(looked_at), total / looked_at, size / looked_at, math.sqrt(squares / looked_at))
        for name, (total, size, squares) in zip(names, lines)
        if name is not None and looked_at
    }


def of_distribution(
    schema: Schema, split: str, found: Mapping[str, Magnitude], before: Mapping[str, Magnitude]
) -> list[Finding]:
    """What there is to say of numbers of ``split``; ``before``: of the training data until then."""
    findings: list[Finding | None] = []
    for name, it in found.items():
        if name not in schema.numbers:
            findings.append(heavy(name, it))
            continue
        feature, column = schema.features[name], schema.column(name)
        findings.append(large(name, column, feature, it))
        if name in before:
            findings.append(jumped(name, column, feature, split, it, before[name]))
    return [it for it in findings if it is not None]


def constants(schema: Schema, found: Mapping[str, Magnitude], after_rows: int) -> list[Finding]:
    """What there is to say of features that have not varied in all of the training data so far."""
    findings = (
        constant(name, schema.column(name), schema.features[name], it, after_rows)
        for name, it in found.items()
        if name in schema.numbers
    )
    return [it for it in findings if it is not None]


def large(name: str, column: str, feature: Feature, it: Magnitude) -> Finding | None:
    if it.rms < LARGE:
        return None
    return f"large:{name}", (
        f"dense feature '{name}' (column '{column}') has values of about {it.rms:.3g} (mean {it.mean:.4g}, standard deviation "
        f"{it.deviation:.3g}): so large, it drowns every other feature, and the loss grows with it. {remedy(name, feature, it)}"
    )


def remedy(name: str, feature: Feature, it: Magnitude) -> str:
    """What to set, in terms of the column's own values."""
    key = f"data.schema.features.{name}"
    positive = math.isclose(it.mean, it.size)
    if positive and it.deviation > it.mean / 2 and not feature.log1p:
        return f"Set {key}.log1p=true, or {key}.scale={feature.scale / it.rms:.3g}"
    if it.deviation <= CONSTANT * it.rms:
        offset = it.mean / feature.scale + feature.offset
        return (
            f"It is nearly constant: remove it, or set {key}.offset={offset:.15g} (computed before it becomes float32)"
        )
    offset, scale = it.mean / feature.scale + feature.offset, feature.scale / it.deviation
    return f"Set {key}.offset={offset:.12g} and {key}.scale={scale:.3g}, which makes it (x - mean) / standard deviation"


def constant(name: str, column: str, feature: Feature, it: Magnitude, after_rows: int) -> Finding | None:
    """Where all values are missing, there is a warning elsewhere (``alerts.absent``)."""
    missing = feature.fill is not None and math.isclose(it.mean, filled(feature), rel_tol=1e-5, abs_tol=1e-7)
    if it.rows < after_rows or it.deviation > CONSTANT * it.rms or missing:
        return None
    return f"constant:{name}", (
        f"dense feature '{name}' (column '{column}') is {it.mean:.6g} in all of {it.rows:,} rows: it says nothing. Mend the "
        "preparation (a join, a default in place of a value), or remove it"
    )


def jumped(name: str, column: str, feature: Feature, split: str, it: Magnitude, before: Magnitude) -> Finding | None:
    """By a factor of ``JUMP`` or more, either way; of logarithms, by its logarithm."""
    if min(it.looked_at, before.looked_at) < JUDGED or not it.size or not before.size:
        return None
    factor = math.exp(min(it.mean - before.mean, 700.0)) if feature.log1p else it.size / before.size
    if 1 / JUMP < factor < JUMP:
        return None
    return f"jumped:{name}:{split}", (
        f"dense feature '{name}' (column '{column}') is about {factor:.3g} times as large in {split} as in the training data "
        f"before ({it.size:.4g} on average, {before.size:.4g} there): probably in other units. Mend that part of the data"
    )


def heavy(column: str, it: Magnitude) -> Finding | None:
    if not it.size or 1 / HEAVY < it.mean < HEAVY:
        return None
    return "weights_far_from_1", (
        f"the sample weights (data.schema.weight, column '{column}') are {it.mean:.3g} on average: the loss and every gradient "
        "are so many times as large, and learning rates mean something else. Divide the column by its mean"
    )


def loss_large(
    split: str, values: Mapping[str, Any], step: int, found: Mapping[str, Magnitude], schema: Schema
) -> Finding | None:
    loss = values.get("logloss")
    if loss is None or loss < LOSS:
        return None
    culprits = names_of_large(schema, found)
    why = (
        f"because of the size of {culprits}: see the warning of each"
        if culprits
        else "the learning rates may be too high (optim.dense.lr, optim.tables.lr: try a tenth), initial values too large "
        "(init_std), or the sample weights"
    )
    return "loss_large", (
        f"the log loss of {split} is {loss:.3g} at step {step:,}, where the mean click rate alone has less than 0.7: logits are "
        f"huge, {why}"
    )


def names_of_large(schema: Schema, found: Mapping[str, Magnitude]) -> str:
    """The dense features that are large, the largest first; empty where none is."""
    names = [name for name in schema.numbers if name in found and found[name].rms >= LARGE]
    names = sorted(names, key=lambda name: -found[name].rms)
    shown = ", ".join(f"dense feature '{name}' (about {found[name].rms:.3g})" for name in names[:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def since(now: NDArray[np.float64], then: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Sums of what came between two snapshots, to be changed by whoever gets them."""
    return now.copy() if then is None else now - then


def filled(feature: Feature) -> float:
    """What a batch holds where a number is missing."""
    assert feature.fill is not None
    return math.log1p(max(feature.fill, 0.0)) if feature.log1p else feature.fill
