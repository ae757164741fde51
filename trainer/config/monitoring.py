"""Sections ``logging``, ``alerts`` and ``profiling``."""

from dataclasses import dataclass, field

from data_loaders.errors import UserError
from trainer.config.checks import positive


@dataclass
class LoggingConfig:
    """Where metrics go besides ``metrics.jsonl`` (docs/seeing.md)."""

    tensorboard: bool = True
    """Write TensorBoard files to ``tensorboard/`` of the run folder."""
    mlflow: bool = False
    """Log to MLflow."""
    wandb: bool = False
    """Log to Weights & Biases."""


@dataclass
class AlertsConfig:
    """Early warnings (``trainer/monitoring/alerts.py``)."""

    enabled: bool = True
    """Whether there are any."""
    after_rows: int = 20_000
    """Rows after which the data is judged."""
    after_steps: int = 200
    """Steps, after the warm-up of learning rates, after which it is judged whether the model learns."""

    def __post_init__(self) -> None:
        for name in ("after_rows", "after_steps"):
            positive(getattr(self, name), f"alerts.{name}")


@dataclass
class ProfilingConfig:
    """The window of ``profile=true`` (docs/seeing.md)."""

    after_steps: int = 20
    """Steps of this process before the window; a resumed run counts from its own start."""
    steps: int = 5
    """Steps of the window."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write a trace."""

    def __post_init__(self) -> None:
        for name in ("after_steps", "steps"):
            positive(getattr(self, name), f"profiling.{name}")
        if not self.ranks or min(self.ranks) < 0 or len(set(self.ranks)) < len(self.ranks):
            raise UserError(f"profiling.ranks is {self.ranks}: give different ranks, such as [0] or [0, 1]")

    def check_world_size(self, world_size: int) -> None:
        """Raises ``UserError`` for a rank that there is not."""
        if max(self.ranks) >= world_size:
            raise UserError(
                f"profiling.ranks is {self.ranks}, but {world_size} rank(s) were started: give ranks from 0 to {world_size - 1}"
            )
