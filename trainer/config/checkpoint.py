"""Section ``checkpoint``."""

from dataclasses import dataclass

from data_loaders.schema import one_of
from trainer.config.checks import BEST, positive

ON_CORRUPT = ("fallback", "error")


@dataclass
class CheckpointConfig:
    """A checkpoint every ``every_steps`` steps or ``every_minutes`` minutes, whichever comes first, and at the end; the
    last ``keep`` stay, and with ``best`` (such as ``valid.auc`` or ``valid.logloss``) that of the best evaluation.
    ``restore_best``: it is the best one that the final evaluation, ``trainer.evaluate`` and ``trainer.predict`` take,
    instead of the last one; so it is with ``early_stopping``.

    ``asynchronous``: training goes on while a snapshot is written, which takes as much memory as a rank's tables and
    optimizer state. ``max_failures``: so many failed saves in a row are reported and tried again. ``on_corrupt``: a
    damaged newest checkpoint is passed over (``fallback``) or ends the run (``error``).

    ``root``: checkpoints go to ``<root>/<name of the run folder>`` instead of the run folder's ``checkpoints``: a folder, or
    a URI of ``data_loaders.storage`` such as ``s3://bucket/prefix``. Where ``run.dir`` is empty, and the run folder's
    name a date, it is ``<root>/<run.name>/<date-time>``. No two runs under a root may have the same name."""

    root: str | None = None
    every_steps: int | None = None
    every_minutes: float | None = 10.0
    keep: int = 2
    best: str | None = None
    restore_best: bool = False
    asynchronous: bool = True
    max_failures: int = 3
    on_corrupt: str = "fallback"

    def __post_init__(self) -> None:
        if self.root is not None:
            if not self.root:
                raise ValueError("checkpoint.root is empty: give a folder or a URI, or null for the run folder")
            from data_loaders.storage import root_name  # here, as pyarrow takes a while

            root_name(self.root)
        for name in ("every_steps", "every_minutes"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), f"checkpoint.{name}")
        if self.keep < 2:
            raise ValueError(f"checkpoint.keep is {self.keep}: keep at least 2, so that one survives a damaged other")
        if self.max_failures < 0:
            raise ValueError(f"checkpoint.max_failures is {self.max_failures}: it must not be negative")
        if self.best is not None:
            one_of(self.best, BEST, "checkpoint.best")
        elif self.restore_best:
            raise ValueError(
                "checkpoint.restore_best=true, but checkpoint.best is null: say by what, such as valid.auc"
            )
        one_of(self.on_corrupt, ON_CORRUPT, "checkpoint.on_corrupt")
