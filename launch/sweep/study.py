"""An Optuna study: its ask-and-tell interface, driven from outside, so that trials may run side by side and be pruned.

(hydra-optuna-sweeper 1.3 needs Optuna 2; a trial is to it a function call, which is over when it hears of it: no pruning.)
The study is the record: a trial is counted once, when it is asked for; one that was running when the sweep was killed is
given out again, with its values, before new ones, and resumes in its run folder.
"""

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from data_loaders.errors import UserError
from data_loaders.messages import one_line
from launch.sweep.options import SweepConfig
from launch.sweep.space import Dimension, as_text
from launch.sweep.trials import RECORD, Trial, folder_of, lower_is_better, record, recorded


class Search:
    """TPE over ``dimensions``; raises ``UserError`` where the database cannot be opened, or the study is another's."""

    def __init__(self, config: SweepConfig, dimensions: Sequence[Dimension], root: Path) -> None:
        self.config, self.root = config, root
        self._distributions = {dimension.key: distribution(dimension) for dimension in dimensions}
        self._study = open_study(config, root)
        self._left_open = [self._taken_up(frozen) for frozen in self._ours()]

    def next(self) -> Trial | None:
        """One that was left open, or a new one; None when the study has its trials. Where choices are few, TPE draws the
        same values again: such a trial has the outcome of the first one, and is not run."""
        if self._left_open:
            return self._left_open.pop(0)
        while (count := len(self._study.get_trials(deepcopy=False))) < self.config.trials:
            asked = self._ask(count)
            if not self._copied(asked):
                return self._begun(asked)
        return None

    def _ask(self, count: int) -> Any:
        # By number, so that a resumed search does not draw its first trials again.
        self._study.sampler = sampler(self.config, count)
        return self._study.ask(self._distributions)

    def _copied(self, asked: Any) -> bool:
        ended = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        twin = next((frozen for frozen in ended if frozen.params == asked.params), None)
        if twin is None:
            return False
        asked.set_user_attr("reason", f"as trial {twin.number}")
        asked.set_user_attr("folder", str(self._trial(twin).folder))
        complete = twin.state == TrialState.COMPLETE
        self._study.tell(asked.number, twin.value if complete else None, None if complete else twin.state)
        return True

    def _begun(self, asked: Any) -> Trial:
        values = {key: as_text(asked.params[key]) for key in self._distributions}
        trial = Trial(asked.number, values, folder_of(self.root, asked.number))
        record(trial)
        asked.set_user_attr("folder", str(trial.folder))
        return trial

    def hopeless(self, trial: Trial, course: Sequence[float]) -> bool:
        """Whether to stop a trial whose metric was ``course`` at its evaluations so far. New ones are reported."""
        live = self._live(trial.number)
        known = len(self._frozen(trial.number).intermediate_values)
        for number, value in list(enumerate(course, start=1))[known:]:
            live.report(value, number)
        return self.config.prune and live.should_prune()

    def tell(self, trial: Trial) -> None:
        """An open one stays open in the study."""
        record(trial)
        if trial.state == "open":
            return
        live = self._live(trial.number)
        for name in ("reason", "seconds"):
            live.set_user_attr(name, getattr(trial, name))
        if trial.state == "complete":
            self._study.tell(trial.number, trial.value)
        else:
            self._study.tell(trial.number, state=TrialState.PRUNED if trial.state == "pruned" else TrialState.FAIL)

    def trials(self) -> list[Trial]:
        """Of the whole study, other machines' included."""
        return [self._trial(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def _ours(self) -> list[Any]:
        """Trials that run, by the study, though their sweep is gone: all of a database in our folder, which is locked; of
        another database, those with a folder here."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        own = self.config.storage is None
        return [frozen for frozen in running if own or (folder_of(self.root, frozen.number) / RECORD).exists()]

    def _taken_up(self, frozen: Any) -> Trial:
        trial = self._trial(frozen)
        return recorded(folder_of(self.root, frozen.number), trial.values) or trial

    def _trial(self, frozen: Any) -> Trial:
        facts = frozen.user_attrs
        course = frozen.intermediate_values
        states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
        return Trial(
            number=frozen.number,
            values={key: as_text(value) for key, value in frozen.params.items()},
            folder=Path(facts.get("folder") or folder_of(self.root, frozen.number)),
            state=states.get(frozen.state.name, "open"),
            value=frozen.value if frozen.value is not None else course[max(course)] if course else None,
            reason=facts.get("reason"),
            seconds=facts.get("seconds"),
        )

    def _live(self, number: int) -> Any:
        """What ``ask`` gave, also for a trial that an earlier process asked for."""
        return optuna.trial.Trial(self._study, self._frozen(number)._trial_id)

    def _frozen(self, number: int) -> Any:
        return self._study.get_trials(deepcopy=False)[number]


def distribution(dimension: Dimension) -> BaseDistribution:
    """Raises ``UserError``."""
    if dimension.choices:
        return CategoricalDistribution(dimension.choices)
    low, high, step, log = dimension.low, dimension.high, dimension.step, dimension.log
    try:
        if isinstance(low, int):
            return IntDistribution(low, high, log=log, step=step or 1)
        return FloatDistribution(low, high, log=log, step=step)
    except ValueError as error:
        raise UserError(f"{dimension.text}: {one_line(error)}") from None


def open_study(config: SweepConfig, root: Path) -> Any:
    """Made, or found again. Raises ``UserError``."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    direction = "minimize" if lower_is_better(config.metric) else "maximize"
    pruner = optuna.pruners.MedianPruner(config.startup_trials, n_warmup_steps=config.prune_after)
    url, name = config.storage or f"sqlite:///{root / 'study.db'}", config.study or root.name
    try:
        study = optuna.create_study(
            storage=url, study_name=name, direction=direction, pruner=pruner, load_if_exists=True
        )
    except (SQLAlchemyError, ImportError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"the study's database cannot be opened: {line}; sweep.storage is a URL such as sqlite:////path/study.db"
        ) from None
    if study.direction.name.lower() != direction:
        raise UserError(
            f"sweep.study={name} was begun to {study.direction.name.lower()}, not by {config.metric}: rename"
        )
    return study


def sampler(config: SweepConfig, number: int) -> Any:
    """TPE for the trial ``number``. Those that still run count as bad, so that the next one is drawn elsewhere."""
    seed = random.Random(f"{config.seed}/{number}").getrandbits(32)
    return optuna.samplers.TPESampler(n_startup_trials=config.startup_trials, seed=seed, constant_liar=True)
