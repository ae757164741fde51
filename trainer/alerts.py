"""Early warnings: what is probably wrong with a run, why, and what to do, while it can still be mended.

Rules look at what is computed anyway: the metrics of each line of training and of ``valid``, the same on all ranks; and at
``trainer.sightings``, sums over batches that one more all-reduce a line adds up. Nothing is done at every step. Each warning
comes once in a run, resumed or not: on stderr, in its line of ``metrics.jsonl`` (``alerts``) and in ``metrics.json``.

Elsewhere: a slow rank (``trainer.pace``), a loss that is not finite (``trainer.guard``, which ends the run), modules that the
pipeline does not overlap (``trainer.sharding.check_pipelined``, which ends it too).
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data_loaders.batch import Batch
from data_loaders.schema import Layout, Schema
from trainer.config import AlertsConfig
from trainer.sightings import Hashed, Seen, Sightings

CHANCE = 0.52  # an AUC below it is that of chance …
CHANCE_ERROR = 0.01  # … where its standard error is less than this …
CHANCE_LINES = 2  # … in so many lines in a row
LEAK = 0.99  # no click model is as good as that
LEAK_ROWS = 100  # of each class, at least, for an AUC to be believed
CONSTANT = 0.499  # of 0.5: a window's AUC error bound where all logits lie in one bin
CROWDED = 1 - math.exp(-1)  # of a table's rows are asked for where there are as many values as rows

Told = tuple[str, str]  # a warning's name, told once, and its message
Values = Mapping[str, Any]


class Alerts:
    """Judges the lines of metrics. ``after_steps`` and ``after_rows`` of the configuration; ``warmup_steps`` come on top."""

    def __init__(
        self, config: AlertsConfig, schema: Schema, layout: Layout, warmup_steps: int, device: torch.device
    ) -> None:
        self.config, self.schema = config, schema
        self.seen = Sightings(schema, layout, device)
        self.told: list[dict[str, Any]] = []  # name, step and message
        self._first_step = config.after_steps + warmup_steps
        self._one_label_rows = 0
        self._chance_lines = 0

    def look(self, module: torch.nn.Module, arguments: tuple[Batch, ...]) -> None:
        """A forward pre-hook of the task."""
        if self.config.enabled and module.training:
            self.seen.look(arguments[0])

    def consider(
        self,
        split: str,
        values: Values,
        step: int,
        epoch: int,
        counters: Mapping[str, int],
        all_reduce: Callable[[Tensor], object],
    ) -> list[dict[str, Any]]:
        """What is new to tell about a line of metrics. ``counters``: the training loader's own. All ranks call it together."""
        if not self.config.enabled or split not in ("train", "valid"):
            return []
        found = [leaking(split, values)] if split == "valid" or epoch == 0 else []
        if split == "train":
            found += self._of_window(values, step, counters)
            found += self._of_batches(self.seen.compute(all_reduce), counters)
        known = {alert["name"] for alert in self.told}
        new = [{"name": n, "step": step, "message": m} for n, m in filter(None, found) if n not in known]
        self.told += new
        return new

    def facts(self) -> dict[str, Any]:
        return {"told": list(self.told), "one_label_rows": self._one_label_rows, "chance_lines": self._chance_lines}

    def restore(self, facts: Mapping[str, Any]) -> None:
        self.told = list(facts["told"])
        self._one_label_rows, self._chance_lines = facts["one_label_rows"], facts["chance_lines"]

    def _of_window(self, values: Values, step: int, counters: Mapping[str, int]) -> list[Told | None]:
        if not values["rows"]:
            return [no_rows(counters)]
        one_label = values["label_mean"] in (0.0, 1.0)
        self._one_label_rows = self._one_label_rows + values["rows"] if one_label else 0
        if self._one_label_rows >= self.config.after_rows:
            return [one_valued(self._one_label_rows, values["label_mean"])]
        late = step >= self._first_step
        if late and (told := constant(values, self.config.after_rows)):
            return [told]
        by_chance = late and is_chance(values)
        self._chance_lines = self._chance_lines + 1 if by_chance else 0
        return [chance(values, step)] if self._chance_lines >= CHANCE_LINES else []

    def _of_batches(self, seen: Seen, counters: Mapping[str, int]) -> Iterator[Told | None]:
        if seen.rows >= self.config.after_rows:
            for name, present in seen.present.items():
                yield None if present else absent(name, seen.rows, self.schema, counters)
        yield from (crowded(table) for table in seen.hashed)


def leaking(split: str, values: Values) -> Told | None:
    auc = values.get("auc")
    if auc is None or auc < LEAK or min(_classes(values)) < LEAK_ROWS:
        return None
    return "label_leaking", (
        f"the AUC of {split} is {auc:.4f}, better than any click model: a feature probably tells the label (a column written "
        "after the click, an id that only clicked rows have, a history that holds the row's own click). Leave one feature "
        "after the other out until it falls, and mend that one"
    )


def one_valued(rows: int, label: float) -> Told:
    return "labels_one_valued", (
        f"the labels of the last {rows:,} rows are all {label:.0f}: the label column is probably not the click "
        "(data.schema.label), the preparation has lost the other class, or the rows lie sorted by label "
        "(data.stream.shuffle=true, or prepare them in order of time)"
    )


def constant(values: Values, after_rows: int) -> Told | None:
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


def chance(values: Values, step: int) -> Told:
    return "auc_of_chance", (
        f"after {step:,} steps the AUC of training is {values['auc']:.4f}, no better than chance: labels and features may not "
        "belong to the same rows (a join or a shuffle of one column), the features may say nothing, or the learning rates "
        "are far off (try ten times and a tenth of optim.dense.lr and optim.tables.lr)"
    )


def absent(name: str, rows: int, schema: Schema, counters: Mapping[str, int]) -> Told:
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


def no_rows(counters: Mapping[str, int]) -> Told:
    reasons = {name: count for name, count in counters.items() if name != "rows.dropped"}
    most = max(reasons, key=lambda name: reasons[name], default="a sample weight of 0")
    return "no_rows", (
        f"no row since the last line counts, most were left out for {most}: nothing is trained. Mend that column, or its "
        "policy in data.schema (on_null, on_out_of_range, on_non_finite, on_bad_label)"
    )


def crowded(table: Hashed) -> Told | None:
    if not table.occupied or table.colliding < CROWDED:
        return None
    known = math.isfinite(table.values)
    count = f"about {_rounded(table.values)}" if known else "many times more"
    wanted = f"{_rounded(4 * table.values)} or more" if known else "ten times as many and look again"
    return f"collisions:{table.name}", (
        f"{count} different values share the {table.rows:,} rows that '{table.name}' has for hashed ones; "
        f"{table.colliding:.0%} of them have no row of their own. Give it rows (num_embeddings, or num_buckets of a cross): "
        f"{wanted}; or leave rare values out with a vocabulary (data_loaders.prepare)"
    )


def say(alerts: list[dict[str, Any]]) -> None:
    """On stderr, above the progress bar where there is one."""
    for alert in alerts:
        tqdm.write(f"warning: {alert['message']} [{alert['name']}, step {alert['step']}]", file=sys.stderr)
    sys.stderr.flush()


def _classes(values: Values) -> tuple[float, float]:
    """Clicks and others (without sample weights)."""
    clicks = (values.get("label_mean") or 0.0) * values.get("rows", 0)
    return clicks, values.get("rows", 0) - clicks


def _rounded(number: float) -> str:
    """To two digits."""
    digits = max(0, int(math.log10(max(number, 1))) - 1)
    return f"{round(number, -digits):,.0f}"
