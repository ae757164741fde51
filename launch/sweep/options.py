"""The sweep's own part of the command line: `sweep=NAME` (a file of conf/sweep) and `sweep.KEY=VALUE`; the rest is trials'."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_loaders.errors import UserError
from launch.options import load, merge
from trainer.config.checks import BEST

METHODS = ("grid", "optuna")
SEARCH_ONLY = ("trials", "seed", "storage", "study", "prune", "prune_after", "startup_trials")


@dataclass
class SweepConfig:
    """A sweep. ``trials`` and what follows are for ``method: optuna`` only."""

    method: str = "grid"
    """Every combination (``grid``) or a search (``optuna``)."""
    dir: str | None = None
    """Folder of the sweep, in which the same command continues; by default ``<run.root>/sweep-<digest of the
    command>``."""
    parallel: int = 1
    """Trials at a time, each with its share of GPUs and cores."""
    through: str | None = None
    """Command that starts each trial and finds it a place, such as ``srun --nodes=1 --gpus=8``; this machine is then
    not divided."""
    metric: str = "valid.auc"
    """Objective, from ``metrics.json``."""
    params: dict[str, str] = field(default_factory=dict)
    """Search space, key by key, besides that of the command line."""
    trials: int = 50
    """Trials in the study, failed ones included."""
    seed: int = 1
    """Seed of the draws."""
    storage: str | None = None
    """Database URL of the study; by default SQLite in ``dir``."""
    study: str | None = None
    """Name of the study; by default that of ``dir``."""
    startup_trials: int = 10
    """Trials drawn at random before TPE begins, and trials that must end before any is pruned."""
    prune: bool = True
    """Stop a trial whose best metric is worse than the median of the others' after as many evaluations."""
    prune_after: int = 1
    """Evaluation from which trials may be pruned."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"sweep.method is {self.method!r}: choose {' or '.join(METHODS)}")
        if self.metric not in BEST:
            raise UserError(f"sweep.metric is {self.metric!r}: choose from {', '.join(BEST)}")
        for name in ("parallel", "trials", "startup_trials", "prune_after"):
            if getattr(self, name) < 1:
                raise UserError(f"sweep.{name} is {getattr(self, name)}: give a number from 1")


def read(own: dict[str, str], config_dirs: Sequence[str]) -> SweepConfig:
    """The file that ``sweep=`` names, and each ``sweep.KEY``. Raises ``UserError``."""
    if any(key.startswith("sweep.params") for key in own):
        raise UserError("sweep.params is for a file of conf/sweep: write key=a,b on the command line")
    config = merge("sweep", load("sweep", own.get("sweep", "grid"), config_dirs), own, SweepConfig)
    useless = [key for key in own if key.removeprefix("sweep.") in SEARCH_ONLY]
    if config.method == "grid" and useless:
        raise UserError(f"{useless[0]} is of a search, and this is a grid: add sweep=optuna, or leave it out")
    return config
