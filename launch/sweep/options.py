"""The sweep's own part of the command line: `sweep=NAME` (a file of conf/sweep) and `sweep.KEY=VALUE`; the rest is trials'."""

from dataclasses import dataclass, field

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_loaders import safe_yaml
from data_loaders.configuration import explain
from data_loaders.typed import check, near
from launch import group
from trainer.config.checks import BEST

METHODS = ("grid", "optuna")
SEARCH_ONLY = ("trials", "seed", "storage", "study", "prune", "prune_after", "startup_trials")


@dataclass
class SweepConfig:
    """``method``: every combination (``grid``) or a search (``optuna``). ``dir``: the sweep's folder, which the same
    command goes on in (default: ``<run.root>/sweep-<digest of the command>``). ``metric``: the objective, in
    ``metrics.json``. ``parallel``: trials side by side, each on its share of GPUs and cores. ``through``: a command that
    each trial is started by, such as ``srun --nodes=1 --gpus=8``, which then finds it a place: this machine is not
    divided. ``params``: a search space, key by key, beside that of the command line.

    Of a search alone: ``trials`` in the study, whatever became of them; ``seed``: that they are drawn with; ``storage``:
    a database URL (default: SQLite in ``dir``), in which the study is called ``study`` (default: ``dir``'s name);
    ``startup_trials`` are drawn at random before TPE begins, and as many have to end before it prunes; ``prune``: a trial
    is stopped once its best metric so far is worse than the median of the others' after as many evaluations, from the
    evaluation ``prune_after`` on.
    """

    method: str = "grid"
    dir: str | None = None
    parallel: int = 1
    through: str | None = None
    metric: str = "valid.auc"
    params: dict[str, str] = field(default_factory=dict)
    trials: int = 50
    seed: int = 1
    storage: str | None = None
    study: str | None = None
    startup_trials: int = 10
    prune: bool = True
    prune_after: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"sweep.method is {self.method!r}: choose {' or '.join(METHODS)}")
        if self.metric not in BEST:
            raise ValueError(f"sweep.metric is {self.metric!r}: choose from {', '.join(BEST)}")
        for name in ("parallel", "trials", "startup_trials", "prune_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"sweep.{name} is {getattr(self, name)}: give a number from 1")


def read(own: dict[str, str], config_dir: str | None) -> SweepConfig:
    """The defaults, the file ``sweep=`` names, then each ``sweep.KEY``. Raises ``ValueError``."""
    given = {key.removeprefix("sweep."): value for key, value in own.items() if key != "sweep"}
    valid = list(SweepConfig.__dataclass_fields__)
    for key in given:
        if key not in valid or key == "params":
            raise ValueError(f"sweep.{key} is not a known key{near(key, {*valid} - {'params'}, 'sweep')}")
    try:
        loaded = group.load("sweep", own.get("sweep", "grid"), config_dir, safe_yaml.parse, "optuna")
        values = {key: safe_yaml.parse(value, f"sweep.{key}=") for key, value in given.items()}
        check({**loaded, **values}, SweepConfig, "sweep")
        tree = OmegaConf.merge(OmegaConf.structured(SweepConfig), loaded, values)
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ValueError(f"sweep.{explain(error)}") from None
    assert isinstance(config, SweepConfig)
    useless = [key for key in given if key in SEARCH_ONLY]
    if config.method == "grid" and useless:
        raise ValueError(f"sweep.{useless[0]} is of a search, and this is a grid: add sweep=optuna, or leave it out")
    return config
