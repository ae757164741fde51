"""How far a run has come: advanced by the cursor of the batch just trained, saved as facts."""

from dataclasses import asdict, dataclass
from typing import Any

from data_loaders.batch import Cursor
from data_loaders.errors import UserError


@dataclass
class Progress:
    """``step``: optimizer steps; ``rows``: rows trained; (``epoch``, ``epoch_step``): the position in the data, the
    next batch being number ``epoch_step`` of ``epoch``."""

    step: int = 0
    rows: int = 0
    epoch: int = 0
    epoch_step: int = 0

    def advance(self, cursor: Cursor) -> None:
        self.step += 1
        self.rows += cursor.rows
        self.epoch, self.epoch_step = cursor.epoch, cursor.step

    def begin_epoch(self) -> None:
        """From the end of an epoch to the start of the next one: the same place, as long as the data stay the same."""
        self.epoch, self.epoch_step = self.epoch + 1, 0

    def total_steps(self, epochs: int, steps_per_epoch: int, steps: int | None) -> int:
        """Optimizer steps of the whole run: ``epochs`` of them, the current one and later ones of ``steps_per_epoch``
        each, or ``steps`` where that is less."""
        total = self.step - self.epoch_step + max(epochs - self.epoch, 0) * steps_per_epoch
        return total if steps is None else min(steps, total)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        expected = set(asdict(self))
        if set(state) != expected:
            raise UserError(f"checkpoint: progress has keys {sorted(state)}, expected {sorted(expected)}")
        for key, value in state.items():
            setattr(self, key, int(value))
