"""Every combination once. What became of a trial is in its own folder, so nothing else has to be kept."""

from collections.abc import Sequence
from pathlib import Path

from launch.sweep.space import Dimension, grid
from launch.sweep.trials import Trial, folder_of, record, recorded


class Grid:
    def __init__(self, dimensions: Sequence[Dimension], root: Path) -> None:
        self._trials = {}
        for number, values in enumerate(grid(dimensions)):
            folder = folder_of(root, number)
            self._trials[number] = recorded(folder, values) or Trial(number, values, folder)
        self._waiting = [trial for trial in self._trials.values() if trial.state == "open"]

    def next(self) -> Trial | None:
        """The next one to run; None when there is none left."""
        return self._waiting.pop(0) if self._waiting else None

    def hopeless(self, trial: Trial, course: Sequence[float]) -> bool:
        return False

    def tell(self, trial: Trial) -> None:
        self._trials[trial.number] = trial
        record(trial)

    def trials(self) -> list[Trial]:
        return list(self._trials.values())
