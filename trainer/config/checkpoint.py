"""Section ``checkpoint``."""

from dataclasses import dataclass

from data_loaders.errors import UserError
from data_loaders.schema import one_of
from trainer.config.checks import BEST, positive

ON_CORRUPT = ("fallback", "error")


@dataclass
class CheckpointConfig:
    """When checkpoints are saved, where they lie, and which are kept. One is always saved at the end."""

    root: str | None = None
    """Save to ``<root>/<name of the run folder>`` instead of ``checkpoints/`` of the run folder: a folder, or a URI
    such as ``s3://bucket/prefix``. Where ``run.dir`` is not given it is ``<root>/<run.name>/<date-time>``. Two runs
    under a root must differ in name."""
    every_steps: int | None = None
    """Steps between two checkpoints."""
    every_minutes: float | None = 10.0
    """Minutes between two checkpoints; whichever of ``every_steps`` and ``every_minutes`` comes first."""
    keep: int = 2
    """Number of newest checkpoints that are kept."""
    best: str | None = None
    """Also keep the checkpoint of the best evaluation by this metric."""
    restore_best: bool = False
    """The final evaluation, ``clicktrainer evaluate`` and ``clicktrainer predict`` take the best checkpoint instead of
    the last one. ``early_stopping`` sets it."""
    asynchronous: bool = True
    """Continue training while a snapshot is written. The snapshot takes as much memory as the tables and optimizer
    state of a rank."""
    max_failures: int = 3
    """Failed saves in a row that are reported and retried before the run ends."""
    on_corrupt: str = "fallback"
    """A corrupt newest checkpoint is skipped for the one before (``fallback``) or ends the run (``error``)."""

    def __post_init__(self) -> None:
        if self.root == "":
            raise UserError("checkpoint.root is empty: give a folder or a URI, or null for the run folder")
        for name in ("every_steps", "every_minutes"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), f"checkpoint.{name}")
        if self.keep < 2:
            raise UserError(f"checkpoint.keep is {self.keep}: keep at least 2, so that one survives a damaged other")
        if self.max_failures < 0:
            raise UserError(f"checkpoint.max_failures is {self.max_failures}: it must not be negative")
        if self.best is not None:
            one_of(self.best, BEST, "checkpoint.best")
        elif self.restore_best:
            raise UserError("checkpoint.restore_best=true, but checkpoint.best is null: say by what, such as valid.auc")
        one_of(self.on_corrupt, ON_CORRUPT, "checkpoint.on_corrupt")
