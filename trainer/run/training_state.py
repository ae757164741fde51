"""What a checkpoint holds of a job: all of it, to resume from (``TrainingState``), or the model, to score with."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from data_loaders.errors import UserError
from trainer import checkpoint
from trainer.checkpoint import Reader
from trainer.checkpoint.piece import Piece
from trainer.monitoring.metrics_logger import FACTS as LOGGER_FACTS
from trainer.monitoring.metrics_logger import MetricsLogger
from trainer.run.build import Built
from trainer.run.early_stopping import FACTS as EARLY_STOPPING_FACTS
from trainer.run.early_stopping import EarlyStopping
from trainer.runtime.checked_json import Number, Whole, check_form
from trainer.sharding.model_state import model_pieces

# What a resume reads; the same on all ranks.
FACTS = {
    "optimizer_steps": Whole(),
    "table_steps": Whole(-(1 << 53)),  # below 0 by the steps before the tables were drawn anew
    "clock_steps": Whole(),
    "rate_reduction": Number(0.0, 1.0),
    "judge": dict,
    "metrics": LOGGER_FACTS,
}
PLAN = ("table", "sharding", "kernel", "optimizer", "ranks")
PACKAGES = ("torch", "torchrec")


class ModelState:
    """Tables and dense layers, and the averages that stand for these in scoring, where there are any."""

    def __init__(self, built: Built) -> None:
        self.pieces: Sequence[Piece] = [*model_pieces(built.task, built.tables), *built.optimizer.average_pieces()]

    def restore(self, facts: Mapping[str, Any], reader: Reader) -> None:
        """Nothing lies outside the pieces."""


class TrainingState(ModelState):
    """Model, optimizers, the metrics of the rows trained so far, and what else a resumed job needs to be the same.

    Random numbers need no state: what a step draws depends on (seed, rank, step) alone (``trainer.run.loop``).
    """

    def __init__(self, built: Built, logger: MetricsLogger, early_stopping: EarlyStopping | None = None) -> None:
        self.optimizer, self.tables, self.logger, self.early_stopping = (
            built.optimizer,
            built.tables,
            logger,
            early_stopping,
        )
        self.pieces = [*model_pieces(built.task, built.tables), *built.optimizer.pieces()]

    def snapshot(self) -> Sequence[Piece]:
        self.optimizer.row_clock.agree()
        return self.logger.snapshot()

    def facts(self) -> dict[str, Any]:
        return {
            "optimizer_steps": self.optimizer.steps,
            "table_steps": self.optimizer.table_steps,
            "clock_steps": self.optimizer.clock_steps,
            "rate_reduction": self.optimizer.reduction,
            "judge": self.early_stopping.facts() if self.early_stopping is not None else {},
            "metrics": self.logger.facts(),
            "plan": [{key: table.summary()[key] for key in PLAN} for table in self.tables],
            "versions": {name: version(name) for name in PACKAGES},
        }

    def restore(self, facts: Mapping[str, Any], reader: Reader) -> None:
        facts = {"clock_steps": facts.get("table_steps"), **facts}  # earlier versions kept no clock
        try:
            check_form(facts, FACTS, checkpoint.FACTS)
        except ValueError as error:
            raise UserError(f"checkpoint {reader.path}: {error}: another program wrote it") from None
        steps, table_steps, clock_steps = (facts[key] for key in ("optimizer_steps", "table_steps", "clock_steps"))
        self.optimizer.restore(steps, table_steps, facts["rate_reduction"], clock_steps=clock_steps)
        if self.early_stopping is not None:
            check_form(facts["judge"], EARLY_STOPPING_FACTS, f"checkpoint {reader.path}: {checkpoint.FACTS}: judge")
            self.early_stopping.restore(facts["judge"])
        self.logger.restore(facts["metrics"], reader)
