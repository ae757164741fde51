"""Early warnings: what is probably wrong with a run, why, and what to do, while it can still be mended.

Rules look at what is computed anyway: the metrics of each line of training and of ``valid``, the same on all ranks; and at
``trainer.monitoring.feature_coverage`` and ``trainer.monitoring.magnitudes``, sums over batches and rows that one more
all-reduce each a line adds up. Nothing is done at every step but the first, after which numbers and loss are checked at
once. Each warning comes once in a run, resumed or not: on stderr, in its line of ``metrics.jsonl`` (``alerts``) and in
``metrics.json``.

Elsewhere: a slow rank (``trainer.monitoring.stragglers``), a loss that is not finite (``trainer.runtime.step_guard``,
which ends the run), modules that the pipeline does not overlap (``trainer.sharding.pipeline``, which ends it too).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data_loaders.messages import warn
from data_loaders.schema import Schema
from trainer.config.monitoring import AlertsConfig
from trainer.monitoring.feature_coverage import FeatureCoverage, Hashed, Seen
from trainer.monitoring.magnitudes import (
    Finding,
    Magnitude,
    constants,
    loss_large,
    magnitudes,
    names_of_large,
    of_distribution,
    since,
)
from trainer.runtime.checked_json import Listed, Mapped, Number, Whole, get_form

CHANCE = 0.52  # an AUC below it is that of chance …
CHANCE_ERROR = 0.01  # … where its standard error is less than this …
CHANCE_LINES = 2  # … in so many lines in a row
LEAK = 0.99  # no click model is as good as that
LEAK_ROWS = 100  # of each class, at least, for an AUC to be believed
CONSTANT = 0.499  # of 0.5: a window's AUC error bound where all logits lie in one bin
CROWDED = 1 - math.exp(-1)  # of a table's rows are asked for where there are as many values as rows

FACTS = {
    "told": Listed({"name": str, "step": Whole(), "message": str}),
    "one_label_rows": Whole(),
    "chance_lines": Whole(),
}

NUMBERS = {"rows": Whole(), "looked_at": Whole(1), "mean": Number(), "size": Number(0.0), "rms": Number(0.0)}
SPLITS = ("train", "valid", "test", "before")
Values = Mapping[str, Any]


class Alerts:
    """Judges the lines of metrics. ``after_steps`` and ``after_rows`` of the configuration; ``warmup_steps`` come on top.
    ``watched``: metrics of ``valid`` that something depends on, and the configuration keys that say so."""

    def __init__(
        self,
        config: AlertsConfig,
        schema: Schema,
        warmup_steps: int,
        coverage: FeatureCoverage,
        watched: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.config, self.schema = config, schema
        self.coverage = coverage
        self.watched = watched or {}
        self.raised: list[dict[str, Any]] = []  # name, step and message
        self._numbers: NDArray[np.float64] | None = None  # of the training rows of all ranks, in this process
        self._then: NDArray[np.float64] | None = None  # of this rank, when they were last checked
        self._earlier: dict[str, Magnitude] = {}  # of the training data before this process
        self._first_step = config.after_steps + warmup_steps
        self._one_label_rows = 0
        self._chance_lines = 0

    def consider(
        self,
        split: str,
        values: Values,
        step: int,
        epoch: int,
        counters: Mapping[str, int],
        all_reduce: Callable[[Tensor], object],
        numbers: NDArray[np.float64] | None = None,
    ) -> list[dict[str, Any]]:
        """New warnings about a line of metrics. ``counters``: the training loader's own. ``numbers``: the magnitudes
        that the loader of ``split`` has seen on this rank. All ranks call it together."""
        found: list[Finding | None] = [*self._of_watched(split, values)]
        if self.config.enabled and split in SPLITS:
            if split == "valid" or (split == "train" and epoch == 0):
                found.append(leaking(split, values))
            if split == "train":
                found += self._of_window(values, step, counters)
                found += self._of_batches(self.coverage.compute(all_reduce), counters)
            if numbers is not None:
                found += self._of_numbers(split, values, step, numbers, all_reduce)
        return self._new(found, step)

    def first_look(
        self, values: Values, step: int, numbers: NDArray[np.float64], all_reduce: Callable[[Tensor], object]
    ) -> list[dict[str, Any]]:
        """Warnings of the numbers and the loss of the first step, whatever the cadence of lines. All ranks together."""
        if not self.config.enabled:
            return []
        return self._new(self._of_numbers("train", values, step, numbers, all_reduce), step)

    def culprits(self, numbers: NDArray[np.float64]) -> str:
        """Dense features of this rank's rows that may be behind a loss that is not finite; empty where none is."""
        return names_of_large(self.schema, magnitudes(self.schema, numbers))

    def compare_with(self, numbers: Mapping[str, Any]) -> None:
        """``numbers`` of the ``facts`` of the run that this one begins from; a comparison is no reason to refuse a run, so
        what is not of their form is left out."""
        numbers = get_form({"numbers": numbers}, "numbers", Mapped(NUMBERS)) or {}
        self._earlier = {name: Magnitude(**it) for name, it in numbers.items() if set(it) == set(NUMBERS)}

    def _new(self, found: Iterable[Finding | None], step: int) -> list[dict[str, Any]]:
        known = {alert["name"] for alert in self.raised}
        new = [{"name": n, "step": step, "message": m} for n, m in filter(None, found) if n not in known]
        self.raised += new
        return new

    def facts(self) -> dict[str, Any]:
        return {
            "told": list(self.raised),
            "one_label_rows": self._one_label_rows,
            "chance_lines": self._chance_lines,
            "numbers": {name: asdict(it) for name, it in self._before().items()},
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        self.raised = list(facts["told"])
        self._one_label_rows, self._chance_lines = facts["one_label_rows"], facts["chance_lines"]
        self.compare_with(facts.get("numbers", {}))  # earlier versions have none

    def _of_window(self, values: Values, step: int, counters: Mapping[str, int]) -> list[Finding | None]:
        if not values["rows"]:
            return [no_rows(counters)]
        one_label = values["label_mean"] in (0.0, 1.0)
        self._one_label_rows = self._one_label_rows + values["rows"] if one_label else 0
        if self._one_label_rows >= self.config.after_rows:
            return [one_valued(self._one_label_rows, values["label_mean"])]
        late = step >= self._first_step
        if late and (finding := constant(values, self.config.after_rows)):
            return [finding]
        by_chance = late and is_chance(values)
        self._chance_lines = self._chance_lines + 1 if by_chance else 0
        return [chance(values, step)] if self._chance_lines >= CHANCE_LINES else []

    def _of_watched(self, split: str, values: Values) -> Iterator[Finding | None]:
        """Whatever else is switched off: what a run was asked to do does not happen."""
        for metric, keys in self.watched.items():
            where, _, name = metric.partition(".")
            if where == split and values.get(name) is None:
                yield undefined(metric, keys, values)

    def _of_numbers(
        self,
        split: str,
        values: Values,
        step: int,
        numbers: NDArray[np.float64],
        all_reduce: Callable[[Tensor], object],
    ) -> list[Finding | None]:
        before = self._before()
        if split == "train":
            sums = since(numbers, self._then)
            self._then = numbers
            found = magnitudes(self.schema, sums, all_reduce)  # in place: sums are those of all ranks now
            self._numbers = sums if self._numbers is None else self._numbers + sums
        else:
            found = magnitudes(self.schema, numbers.copy(), all_reduce)
        findings: list[Finding | None] = [*of_distribution(self.schema, split, found, before)]
        findings += constants(self.schema, self._before(), self.config.after_rows) if split == "train" else []
        return [*findings, loss_large(split, values, step, found or before, self.schema)]

    def _before(self) -> dict[str, Magnitude]:
        """Of the training data so far; of earlier runs where there are none yet."""
        mine = {} if self._numbers is None else magnitudes(self.schema, self._numbers)
        return {**self._earlier, **mine}

    def _of_batches(self, seen: Seen, counters: Mapping[str, int]) -> Iterator[Finding | None]:
        if seen.rows >= self.config.after_rows:
            for name, present in seen.present.items():
                yield None if present else absent(name, seen.rows, self.schema, counters)
        yield from (crowded(table) for table in seen.hashed)


def undefined(metric: str, keys: Sequence[str], values: Values) -> Finding:
    """Why a metric of ``valid`` has no value, which depends on the rows alone and so stays as it is."""
    rows, clicks = values.get("rows", 0), values.get("label_mean")
    if not rows or clicks is None:
        why = "no row of valid counts"
    elif clicks in (0.0, 1.0):
        why = f"all {rows:,} rows of valid have the label {clicks:.0f}"
    else:
        why = "no group of valid (evaluation.group_by) has both clicks and others"
    other = "" if metric == "valid.logloss" or not rows else ", or watch valid.logloss"
    return f"undefined:{metric}", (
        f"{metric} is not defined: {why}. So {' and '.join(keys)} cannot work: training continues without, and the last "
        f"checkpoint is taken, not a best one. Give valid rows of both kinds (data.valid){other}"
    )


def leaking(split: str, values: Values) -> Finding | None:
    auc = values.get("auc")
    if auc is None or auc < LEAK or min(_classes(values)) < LEAK_ROWS:
        return None
    return "label_leaking", (
        f"the AUC of {split} is {auc:.4f}, better than any click model: a feature probably reveals the label (a column written "
        "after the click, an id that only clicked rows have, a history that holds the row's own click). Leave one feature "
        "after the other out until it falls, and mend that one"
    )


def one_valued(rows: int, label: float) -> Finding:
    return "labels_one_valued", (
        f"the labels of the last {rows:,} rows are all {label:.0f}: the label column is probably not the click "
        "(data.schema.label), the preparation has lost the other class, or the rows lie sorted by label "
        "(data.stream.shuffle=true, or prepare them in order of time)"
    )


def constant(values: Values, after_rows: int) -> Finding | None:
    """All logits of the line within one bin of the histogram, 0.002 wide."""
    bound = values["auc_error_bound"]
    if bound is None or bound < CONSTANT or values["rows"] < after_rows:
        return None
    return "predictions_constant", (
        f"all predictions are the same, about {values['prediction_mean']:.4f}: the model has learnt nothing but the mean. The "
        "learning rates may be near 0 (optim.dense.lr, optim.tables.lr) or so large that all units died (try a tenth), or no "
        "feature that the model uses varies"
    )


def is_chance(values: Values) -> bool:
    """An AUC near or below 1/2, known well enough: its standard error where there is nothing to learn is
    √((P + N + 1) / (12 P N)) of P clicks and N others (Mann and Whitney 1947)."""
    positives, negatives = _classes(values)
    if values["auc"] is None or not positives or not negatives:
        return False
    error = math.sqrt((positives + negatives + 1) / (12 * positives * negatives))
    return values["auc"] < CHANCE and error < CHANCE_ERROR


def chance(values: Values, step: int) -> Finding:
    return "auc_of_chance", (
        f"after {step:,} steps the AUC of training is {values['auc']:.4f}, no better than chance: labels and features may not "
        "belong to the same rows (a join or a shuffle of one column), the features may say nothing, or the learning rates "
        "are far off (try ten times and a tenth of optim.dense.lr and optim.tables.lr)"
    )


def absent(name: str, rows: int, schema: Schema, counters: Mapping[str, int]) -> Finding:
    """The cause as this rank's loader has counted it."""
    feature = schema.features.get(name)
    found = {what: counters.get(f"{name}.{what}", 0) for what in ("out_of_range", "null", "non_finite")}
    what = max(found, key=lambda kind: found[kind])
    if feature is None:
        cause = f"one of the columns of this cross, {', '.join(schema.crosses[name].columns)}, is null in all of them"
    elif found[what] and what == "out_of_range":
        limit = schema.num_embeddings(name) - 1
        cause = f"its ids lie outside table '{feature.table}' (0 … {limit}): raise num_embeddings, or use ids: hash"
    elif found[what]:
        cause = f"column '{schema.column(name)}' is {what.replace('_', '-')} there: mend the preparation, or remove it"
    elif feature.kind == "dense":
        cause = f"column '{schema.column(name)}' is always {feature.fill:g}, its value for missing ones: remove it"
    else:
        cause = f"column '{schema.column(name)}' holds nothing but empty lists or the missing id: mend the preparation"
    return f"always_missing:{name}", f"feature '{name}' was missing in all of {rows:,} rows looked at: {cause}"


def no_rows(counters: Mapping[str, int]) -> Finding:
    reasons = {name: count for name, count in counters.items() if name != "rows.dropped"}
    most = max(reasons, key=lambda name: reasons[name], default="a sample weight of 0")
    return "no_rows", (
        f"no row since the last line counts, most were left out for {most}: nothing is trained. Mend that column, or its "
        "policy in data.schema (on_null, on_out_of_range, on_non_finite, on_bad_label)"
    )


def crowded(table: Hashed) -> Finding | None:
    if not table.occupied or table.colliding < CROWDED:
        return None
    known = math.isfinite(table.values)
    count = f"about {_rounded(table.values)}" if known else "many times more"
    wanted = f"{_rounded(4 * table.values)} or more" if known else "ten times as many and look again"
    return f"collisions:{table.name}", (
        f"{count} different values share the {table.rows:,} rows that '{table.name}' has for hashed ones; "
        f"{table.colliding:.0%} of them have no row of their own. Give it rows (num_embeddings, or num_buckets of a cross): "
        f"{wanted}; or leave rare values out with a vocabulary (clicktrainer prepare)"
    )


def say(alerts: list[dict[str, Any]]) -> None:
    for alert in alerts:
        warn(f"{alert['message']} [{alert['name']}, step {alert['step']}]")


def _classes(values: Values) -> tuple[float, float]:
    """Clicks and others (without sample weights)."""
    clicks = (values.get("label_mean") or 0.0) * values.get("rows", 0)
    return clicks, values.get("rows", 0) - clicks


def _rounded(number: float) -> str:
    """To two digits."""
    digits = max(0, int(math.log10(max(number, 1))) - 1)
    return f"{round(number, -digits):,.0f}"
