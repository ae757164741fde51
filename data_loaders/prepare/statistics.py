"""What number transforms learn from train, exactly and out of core.

Each step of a feature learns from the values that the steps before it make, so learning goes in rounds: one query for
the minima, maxima and counts of all features that have come so far, one for their sums, one for each feature's quantiles.

Two engines, or one that adds in another order, must learn the same numbers. So sums are of whole numbers: a value's
place between minimum and maximum in 2^52 parts, in two limbs whose sums hold 2^37 rows.
"""

import bisect
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import ibis

from data_loaders.prepare import numbers, raw_values
from data_loaders.prepare.declaration import Number, PreparedSchema
from data_loaders.prepare.engine import Engine, file_name

_LIMB = 2**26
Probe = tuple[str, int]  # a feature, and how many of its steps the values have gone through


@dataclass
class Statistics:
    """``steps``: by feature, what each step of ``make.numbers`` learnt (None: nothing to learn). ``features``: rows,
    missing, min, max and mean of the raw values of each dense feature."""

    steps: dict[str, list[numbers.Fitted]] = field(default_factory=dict)
    features: dict[str, dict[str, Any]] = field(default_factory=dict)

    def num_embeddings(self, schema: PreparedSchema) -> dict[str, int]:
        """The rows of tables whose ids are buckets: the missing value's, and one for each bucket."""
        sizes = {}
        for name, feature in schema.features.items():
            if schema.is_bucketed(name) and not schema.tables[feature.table].num_embeddings:
                step = schema.numbers(name)[-1]
                sizes[feature.table] = len(numbers.boundaries_of(step, self.steps[name][-1])) + 2
        return sizes

    def to_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "features": self.features}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Statistics":
        return cls(dict(values["steps"]), dict(values["features"]))


def fit(engine: Engine, train: ibis.Table, schema: PreparedSchema) -> Statistics:
    """Learns from the rows of ``train``, which are those to learn from alone. Raises ``UserError`` for a raw column that
    is missing or no number."""
    return _Fit(engine, train, schema).run()


class _Fit:
    """``learnt`` grows step by step; a probe is a feature whose next step waits for statistics of its values."""

    def __init__(self, engine: Engine, train: ibis.Table, schema: PreparedSchema) -> None:
        self.engine, self.train, self.schema = engine, train, schema
        self.learnt: raw_values.Learnt = {name: [] for name in schema.features if schema.numbers(name)}

    def run(self) -> Statistics:
        described = [(name, 0) for name, feature in self.schema.features.items() if feature.kind == "dense"]
        waiting = self._waiting()
        facts = self._facts([*described, *waiting])
        features = {name: _description(facts[name, 0]) for name, _ in described}
        while waiting:
            for probe, step in waiting.items():
                self.learnt[probe[0]].append(self._learn(probe, step, facts[probe]))
            waiting = self._waiting()
            facts = self._facts(list(waiting))
        return Statistics(self.learnt, features)

    def _waiting(self) -> dict[Probe, Number]:
        """The next step of each feature that has something to learn."""
        found = {}
        for name, learnt in self.learnt.items():
            steps = self.schema.numbers(name)
            while len(learnt) < len(steps) and not numbers.learns(steps[len(learnt)]):
                learnt.append(None)
            if len(learnt) < len(steps):
                found[name, len(learnt)] = steps[len(learnt)]
        return found

    def _values(self, probe: Probe) -> ibis.Value:
        name, count = probe
        raw = raw_values.number(self.train, self.schema, name)
        return numbers.apply(raw, self.schema.numbers(name)[:count], self.learnt.get(name, [])[:count])

    def _facts(self, probes: list[Probe]) -> dict[Probe, dict[str, Any]]:
        """rows, missing, min, max, mean and std of each, in two queries."""
        probes = list(dict.fromkeys(probes))
        if not probes:
            return {}
        values = self.train.select(**{f"value_{i}": self._values(probe) for i, probe in enumerate(probes)})
        bounds = {"rows": values.count()}
        for i in range(len(probes)):
            value = values[f"value_{i}"]
            bounds |= {f"present_{i}": value.count(), f"min_{i}": value.min(), f"max_{i}": value.max()}
        (found,) = self.engine.fetch(values.aggregate(**bounds)).to_pylist()
        facts = [_bounds(found, i) for i in range(len(probes))]
        sums: dict[str, ibis.Value] = {}
        for i, fact in enumerate(facts):
            if fact["present"] and fact["min"] < fact["max"]:
                sums |= _sums(values[f"value_{i}"], fact["min"], fact["max"], i)
        found = self.engine.fetch(values.aggregate(**sums)).to_pylist()[0] if sums else {}
        return {probe: fact | _moments(found, fact, i) for i, (probe, fact) in enumerate(zip(probes, facts))}

    def _learn(self, probe: Probe, step: Number, facts: dict[str, Any]) -> dict[str, Any]:
        if step.name == "minmax":
            return {"min": facts["min"], "max": facts["max"]}
        if step.name == "standardize":
            return {"mean": facts["mean"], "std": facts["std"]}
        boundaries = self._quantiles(probe, step.argument, facts["present"])
        return {"boundaries": boundaries if step.name == "quantiles" else sorted(set(boundaries))}

    def _quantiles(self, probe: Probe, count: int, rows: int) -> list[float]:
        """The values of rank ceil(k · rows / count), k = 1 … count - 1; none for no rows."""
        if not rows:
            return []
        values = self.train.select(value=self._values(probe))
        values = values.filter(values.value.notnull())
        groups = values.group_by("value").aggregate(rows=values.count())
        groups = self.engine.store(groups, f"quantiles/{file_name(probe[0])}.{probe[1]}")
        running = ibis.cumulative_window(order_by=groups.value)
        groups = groups.mutate(last=groups.rows.sum().over(running).cast("int64"))

        def passed(rank: ibis.Value) -> ibis.Value:
            """Which is the last boundary up to a rank, as a multiple of ``rows``: division would not be exact."""
            return rank * count - (rank * count) % rows

        chosen = groups.filter(passed(groups["last"]) != passed(groups["last"] - groups.rows)).select("value", "last")
        found = sorted((row["last"], row["value"] + 0.0) for row in self.engine.fetch(chosen).to_pylist())
        ranks = [-(-k * rows // count) for k in range(1, count)]
        return [found[bisect.bisect_left(found, (rank,))][1] for rank in ranks]


def _bounds(found: dict[str, Any], i: int) -> dict[str, Any]:
    present, low, high = found[f"present_{i}"], found[f"min_{i}"], found[f"max_{i}"]
    if not present:
        return {"rows": found["rows"], "present": 0, "min": None, "max": None}
    return {"rows": found["rows"], "present": present, "min": low + 0.0, "max": high + 0.0}  # -0.0 becomes 0.0


def _sums(value: ibis.Value, low: float, high: float, i: int) -> dict[str, ibis.Value]:
    """Sums of the values' places between ``low`` and ``high``, and of their squares. Halved before they are subtracted,
    bounds far apart do not overflow."""
    half = numbers.exact(0.5)
    place = (value * half - numbers.exact(low / 2)) / numbers.exact(high / 2 - low / 2)
    sums = {}
    for power, part in (("place", place), ("square", place * place)):
        upper = (part * numbers.exact(_LIMB)).floor().cast("int64")
        lower = (part * numbers.exact(_LIMB * _LIMB)).floor().cast("int64") % _LIMB
        sums |= {f"{power}_upper_{i}": upper.sum(), f"{power}_lower_{i}": lower.sum()}
    return sums


def _moments(found: dict[str, Any], fact: dict[str, Any], i: int) -> dict[str, Any]:
    low, high, present = fact["min"], fact["max"], fact["present"]
    if not present:
        return {"mean": None, "std": None}
    if low == high:
        return {"mean": low, "std": 0.0}
    place, square = (
        Fraction(int(found[f"{power}_upper_{i}"]) * _LIMB + int(found[f"{power}_lower_{i}"]), _LIMB * _LIMB * present)
        for power in ("place", "square")
    )
    half = high / 2 - low / 2
    variance = max(square - place * place, Fraction(0))
    return {"mean": float(Fraction(low) + 2 * Fraction(half) * place), "std": half * (2 * math.sqrt(variance))}


def _description(facts: dict[str, Any]) -> dict[str, Any]:
    missing = facts["rows"] - facts["present"]
    return {"rows": facts["rows"], "missing": missing, **{key: facts[key] for key in ("min", "max", "mean")}}
