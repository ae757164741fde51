"""Numbers to numbers: the steps of ``make.numbers`` as expressions, with what each has learnt from train.

A missing value (null, NaN, ±infinity) stays null through every step but ``fill``; as a bucket it is id 0.

Both engines must agree to the last bit. Sums, products, quotients and comparisons do by IEEE 754; logarithms come from
two libraries, so those that stay numbers are rounded to float32, in which features are written anyway.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import ibis

from data_loaders.prepare.declaration import MISSING_ID, Number

Fitted = dict[str, Any] | None  # what one step learnt, as in statistics.json

LARGEST = sys.float_info.max
LARGEST_FLOAT32 = 3.4028234663852886e38
_LARGEST_EXACT = 2.0**53
LEARNING = ("minmax", "standardize", "quantiles", "buckets")


def learns(step: Number) -> bool:
    """Whether a step needs statistics of train."""
    return step.name in LEARNING and not isinstance(step.argument, list)


def exact(number: float) -> ibis.Value:
    """float64, the number itself: DuckDB reads 0.1 as a decimal, whose way to a float may lose the last bit."""
    return ibis.literal(repr(float(number))).cast("float64")


def finite(value: ibis.Value, largest: float = LARGEST) -> ibis.Value:
    """float64; null for null, NaN, and beyond ±``largest``."""
    whole = value.type().is_integer() or value.type().is_boolean()
    value = value.cast("float64")
    if whole and largest > 2**64:
        return value
    return (value.abs() <= exact(largest)).ifelse(value, ibis.null("float64"))


def apply(value: ibis.Value, numbers: Sequence[Number], fitted: Sequence[Fitted]) -> ibis.Value:
    """Of raw numbers: float64 (null: missing, NaN or infinite), or int64 where the last step makes ids. ``fitted``: of each
    step, None where it learns nothing."""
    value = finite(value)
    for step, learnt in zip(numbers, fitted, strict=True):
        value = _STEPS[step.name](value, step.argument, learnt or {})
    return value


def boundaries_of(step: Number, fitted: Fitted) -> list[float]:
    """The inner boundaries of buckets, ascending, each once."""
    return [float(b) for b in step.argument] if isinstance(step.argument, list) else fitted["boundaries"]


def count_at_most(value: ibis.Value, boundaries: Sequence[float]) -> ibis.Value:
    """int64: how many of the ascending ``boundaries`` (repeats count) are <= value; any number where value is null."""
    # A search tree of CASEs: a chain would compare with every boundary, and a table with repeats is one comparison more.
    repeats = [(boundary, len(list(same))) for boundary, same in groupby(boundaries)]
    counts = [0]
    for _, count in repeats:
        counts.append(counts[-1] + count)

    def search(low: int, high: int) -> ibis.Value:
        if low == high:
            return ibis.literal(counts[low], "int64")
        middle = (low + high) // 2
        return (value < exact(repeats[middle][0])).ifelse(search(low, middle), search(middle + 1, high))

    return search(0, len(repeats))


def _missing_or(value: ibis.Value, result: ibis.Value) -> ibis.Value:
    return value.isnull().ifelse(ibis.null(result.type()), result)


def _fill(value: ibis.Value, argument: float, _: dict) -> ibis.Value:
    return ibis.coalesce(value, exact(argument))


def _clip(value: ibis.Value, argument: list, _: dict) -> ibis.Value:
    low, high = argument
    if low is not None:
        value = (value < exact(low)).ifelse(exact(low), value)
    if high is not None:
        value = (value > exact(high)).ifelse(exact(high), value)
    return value


def _logarithm(value: ibis.Value) -> ibis.Value:
    """Of positive values, alike on all engines."""
    return value.log().cast("float32").cast("float64")


def _log(value: ibis.Value, *_: Any) -> ibis.Value:
    return _logarithm((value > 0).ifelse(value, ibis.null("float64")))


def _log1p(value: ibis.Value, *_: Any) -> ibis.Value:
    return _logarithm(_clip(value, [0, None], {}) + 1)


def _minmax(value: ibis.Value, _: Any, learnt: dict) -> ibis.Value:
    low, high = learnt["min"], learnt["max"]
    if low is None or low == high:
        return _missing_or(value, exact(0))
    return _clip((value - exact(low)) / exact(high - low), [0, 1], {})


def _standardize(value: ibis.Value, _: Any, learnt: dict) -> ibis.Value:
    mean, deviation = learnt["mean"], learnt["std"]
    return (value - exact(mean)) / exact(deviation) if deviation else _missing_or(value, exact(0))


def _quantiles(value: ibis.Value, argument: int, learnt: dict) -> ibis.Value:
    count = count_at_most(value, learnt["boundaries"])
    return _missing_or(value, count.cast("float64") / exact(argument - 1))


def _buckets(value: ibis.Value, argument: Any, learnt: dict) -> ibis.Value:
    count = count_at_most(value, boundaries_of(Number("buckets", argument), learnt))
    return value.isnull().ifelse(ibis.literal(MISSING_ID, "int64"), count + 1)


def _log2(value: ibis.Value, *_: Any) -> ibis.Value:
    # A branch that is not taken may still be computed, so both stay within what their functions take.
    small = _clip(value, [-_LARGEST_EXACT, 2], {}).floor().cast("int64")
    logarithm = _clip(value, [1, None], {}).log()
    large = (logarithm * logarithm).floor().cast("int64") + 2
    return (value > 2).ifelse(large, small)


_STEPS: dict[str, Callable[[ibis.Value, Any, dict], ibis.Value]] = {
    "fill": _fill,
    "clip": _clip,
    "log1p": _log1p,
    "log": _log,
    "minmax": _minmax,
    "standardize": _standardize,
    "quantiles": _quantiles,
    "buckets": _buckets,
    "log2": _log2,
}
