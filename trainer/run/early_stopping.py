"""What follows from an evaluation: learning rates fall on a plateau, training ends early.

Both count evaluations in a row without an improvement. The counts are facts of a checkpoint, so a resumed run decides as
an uninterrupted one; the value they count by is rank 0's, so all ranks decide alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from trainer.config.checks import improvement
from trainer.config.evaluation import EarlyStoppingConfig
from trainer.config.optim import PlateauConfig
from trainer.runtime.checked_json import Number, Optional, Whole
from trainer.runtime.distributed import from_first
from trainer.runtime.progress import Progress

PATIENCE_FACTS = {
    "metric": str,
    "step": Optional(Whole()),
    "value": Optional(Number()),
    "without": Whole(),
    "seen": Optional(Whole()),
}
FACTS = {"early_stopping": PATIENCE_FACTS, "plateau": PATIENCE_FACTS}


class Rates(Protocol):
    """Whose learning rates a plateau reduces: ``reduction`` is the factor of all of them now."""

    reduction: float

    def reduce_rates(self, reduction: float) -> None: ...


@dataclass
class Patience:
    """The best value of ``metric`` so far, and how many evaluations since did not improve it by more than
    ``min_delta``."""

    metric: str
    min_delta: float
    step: int | None = None
    value: float | None = None
    without: int = 0
    seen: int | None = None

    def observe(self, step: int, value: float) -> None:
        """The evaluation of ``step``, of which a second one says nothing new."""
        if step == self.seen:
            return
        self.seen = step
        if self.value is None or improvement(self.metric, value, self.value) > self.min_delta:
            self.step, self.value, self.without = step, value, 0
        else:
            self.without += 1

    def wait_anew(self) -> None:
        self.without = 0

    def facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("metric", "step", "value", "without", "seen")}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Counts of another metric leave it as it is: a run may resume with other settings."""
        if facts["metric"] == self.metric:
            for name in ("step", "value", "without", "seen"):
                setattr(self, name, facts[name])


class EarlyStopping:
    """Hears of every evaluation. ``rates``: what a plateau reduces."""

    def __init__(self, early: EarlyStoppingConfig, plateau: PlateauConfig, rates: Rates) -> None:
        self.early, self.plateau, self.rates = early, plateau, rates
        self._early = Patience(early.metric, early.min_delta)
        self._plateau = Patience(plateau.metric, plateau.min_delta)

    def consider(self, progress: Progress, split: str, values: Mapping[str, Any]) -> None:
        """Takes an evaluation of ``split`` into account. A value that is None says nothing."""
        for watched in (self._early, self._plateau):
            where, _, name = watched.metric.rpartition(".")
            value = from_first(partial(values.get, name)) if where == split else None
            if value is not None:
                watched.observe(progress.step, value)
        if self.plateau.patience is not None and self._plateau.without >= self.plateau.patience:
            self._plateau.wait_anew()
            self._reduce()

    @property
    def stopped(self) -> str | None:
        """Why training is to end, the same on all ranks; None while training continues."""
        if self.early.patience is None or self._early.without < self.early.patience:
            return None
        return (
            f"{self.early.metric} did not improve on {self._early.value:.6g} of step {self._early.step} in "
            f"{self._early.without} evaluations"
        )

    def facts(self) -> dict[str, Any]:
        return {"early_stopping": self._early.facts(), "plateau": self._plateau.facts()}

    def restore(self, facts: Mapping[str, Any]) -> None:
        self._early.restore(facts["early_stopping"])
        self._plateau.restore(facts["plateau"])

    def _reduce(self) -> None:
        reduction = max(self.rates.reduction * self.plateau.factor, self.plateau.min_factor)
        if reduction < self.rates.reduction:
            self.rates.reduce_rates(reduction)
