"""Sections ``logging``, ``alerts`` and ``profiling``."""

from dataclasses import dataclass, field

from trainer.config.checks import positive


@dataclass
class LoggingConfig:
    """Where metrics go besides ``metrics.jsonl`` (docs/seeing.md). ``tensorboard``: to its files, in ``tensorboard/`` of the
    run folder. ``mlflow``: to MLflow. ``wandb``: to Weights & Biases."""

    tensorboard: bool = True
    mlflow: bool = False
    wandb: bool = False


@dataclass
class AlertsConfig:
    """Early warnings (``trainer/monitoring/alerts.py``); ``enabled: false`` turns them off. What rows look like is judged after
    ``after_rows`` rows, and whether anything is learnt after ``after_steps`` steps and the warm-up of learning rates."""

    enabled: bool = True
    after_rows: int = 20_000
    after_steps: int = 200

    def __post_init__(self) -> None:
        for name in ("after_rows", "after_steps"):
            positive(getattr(self, name), f"alerts.{name}")


@dataclass
class ProfilingConfig:
    """The window of ``profile=true`` (docs/seeing.md). ``after_steps``: it begins after so many steps of this process, which a
    run that goes on counts anew. ``steps``: it has so many. ``ranks``: they write a trace each."""

    after_steps: int = 20
    steps: int = 5
    ranks: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        for name in ("after_steps", "steps"):
            positive(getattr(self, name), f"profiling.{name}")
        if not self.ranks or min(self.ranks) < 0 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"profiling.ranks is {self.ranks}: give different ranks, such as [0] or [0, 1]")

    def check_world_size(self, world_size: int) -> None:
        """Raises ``ValueError`` for a rank that there is not."""
        if max(self.ranks) >= world_size:
            raise ValueError(
                f"profiling.ranks is {self.ranks}, but {world_size} rank(s) were started: give ranks from 0 to {world_size - 1}"
            )
