"""`clicktrainer sweep [sweep=optuna] [sweep.KEY=VALUE …] key=a,b key=interval(0, 1) …`, from start to end."""

import argparse
import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from data_loaders.errors import UserError
from data_loaders.messages import fail, note
from data_loaders.secrets import redact_override
from launch.folder import check_settings, locked
from launch.options import split as own_keys
from launch.rank import command as rank_command
from launch.ranks import count_gpus
from launch.sweep import options, results, space
from launch.sweep.grid import Grid
from launch.sweep.options import SweepConfig
from launch.sweep.running import Command, Runner, Search
from launch.sweep.shares import Share, split, usable_cores, visible_gpus
from launch.sweep.space import Dimension
from launch.sweep.trials import Trial
from trainer.config import arguments
from trainer.config.compose import compose, parse
from trainer.config.job import TrainConfig


@dataclass(frozen=True)
class Plan:
    """What the command line says, checked. ``launcher``: options of clicktrainer train, for each trial. ``base``: the
    configuration of a first trial."""

    sweep: SweepConfig
    fixed: list[str]
    dimensions: list[Dimension]
    config_dirs: list[str]
    launcher: list[str]
    base: TrainConfig
    root: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same when the command is given again."""
        return settings_of(self.sweep, self.fixed, self.dimensions, self.config_dirs)


def main(argv: Sequence[str] | None = None) -> int:
    return start(arguments.sweep().parse_intermixed_args(argv))


def start(options: argparse.Namespace) -> int:
    """Returns the exit code: 0; 1 where no trial came to its end, or one is left to resume; 2 for a mistake; 128 + n after a
    signal."""
    try:
        plan = make_plan(options)
        with locked(plan.root, "sweep.dir"):
            check_settings(plan.root, "sweep.dir", plan.settings)
            return run(plan, trial_command(plan))
    except ValueError as error:
        return fail(error)


def run(plan: Plan, command: Command) -> int:
    search = make_search(plan)
    note(f"sweep: in {plan.root}; the same command resumes it")
    runner = Runner(search, shares(plan), command, plan.sweep.metric)
    runner.run()
    trials = search.trials()
    results.leave(plan.root, trials, plan.dimensions, plan.fixed, plan.config_dirs, plan.sweep.metric)
    if runner.stopped:
        return 128 + runner.stopped
    states = {trial.state for trial in trials}
    if "open" in states:
        note("sweep: a trial has not finished; the same command resumes it")
    return 0 if "complete" in states and "open" not in states else 1


def make_search(plan: Plan) -> Search:
    if plan.sweep.method == "grid":
        return Grid(plan.dimensions, plan.root)
    return optuna_study().Search(plan.sweep, plan.dimensions, plan.root)


def optuna_study() -> ModuleType:
    """``launch.sweep.study``. Raises ``UserError`` where Optuna is not installed."""
    try:
        from launch.sweep import study
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UserError("sweep=optuna needs Optuna: .venv/bin/pip install 'optuna>=4.7,<6'") from None
    return study


def make_plan(given: argparse.Namespace) -> Plan:
    """Raises ``UserError`` for what cannot work, with any value of the space where that can be known beforehand."""
    own, rest = own_keys(given.overrides, "sweep")
    _, overrides = parse(rest)
    sweep = options.read(own, given.config_dir)
    fixed, dimensions = space.parse([*overrides, *(f"{key}={text}" for key, text in sweep.params.items())])
    if not dimensions:
        raise UserError("nothing is swept: give values, as in model=deepfm,din optim.dense.lr=1e-3,3e-4")
    if any(text.startswith("run.dir=") for text in fixed) or any(d.key == "run.dir" for d in dimensions):
        raise UserError("run.dir is of a single run: give sweep.dir=DIR, in which each trial has a folder")
    base = check_trials(arguments.job_words(given, fixed), dimensions, sweep)
    digest = hashlib.sha256(
        json.dumps(settings_of(sweep, fixed, dimensions, given.config_dir), sort_keys=True).encode()
    ).hexdigest()
    root = Path(sweep.dir or Path(base.run.root) / f"sweep-{digest[:8]}").absolute()
    launcher = [*arguments.rank_words(given), *arguments.job_words(given, [])]
    return Plan(sweep, fixed, dimensions, given.config_dir, launcher, base, root)


def settings_of(
    sweep: SweepConfig, fixed: Sequence[str], dimensions: Sequence[Dimension], config_dirs: Sequence[str]
) -> dict[str, Any]:
    plain = [redact_override(text) for text in fixed]
    # As it was when there could be one folder: earlier sweeps are resumed.
    folders = config_dirs[0] if len(config_dirs) == 1 else list(config_dirs) or None
    chosen = {"method": sweep.method, "metric": sweep.metric, "config_dir": folders}
    return {**chosen, "overrides": plain, "space": [redact_override(dimension.text) for dimension in dimensions]}


def check_trials(words: Sequence[str], dimensions: Sequence[Dimension], sweep: SweepConfig) -> TrainConfig:
    """Composes every trial of a grid; of a search, a trial for each value or end of each dimension. Returns a first one."""
    if sweep.method == "grid":
        candidates: Iterator[dict[str, str]] = space.grid(dimensions)
    else:
        list(map(optuna_study().distribution, dimensions))
        first = {dimension.key: dimension.corners[0] for dimension in dimensions}
        candidates = ({**first, d.key: value} for d in dimensions for value in d.corners)
    configs = (_checked([*words, *(f"{k}={v}" for k, v in values.items())], sweep) for values in candidates)
    base = next(configs)
    for _ in configs:
        pass
    return base


def _checked(words: Sequence[str], sweep: SweepConfig) -> TrainConfig:
    config = compose(words).config
    config.check_addresses()
    if not config.data.valid:
        raise UserError(f"sweep.metric is {sweep.metric}, but data.valid is empty: name valid's files")
    if sweep.metric == "valid.gauc" and not config.evaluation.group_by:
        raise UserError("sweep.metric is valid.gauc, but evaluation.group_by is null: name the column to group rows by")
    return config


def shares(plan: Plan) -> list[Share]:
    """Raises ``UserError`` where the machine is too small."""
    if plan.sweep.parallel == 1 or plan.sweep.through:
        return [Share()] * plan.sweep.parallel
    gpus = visible_gpus(count_gpus(), os.environ) if plan.base.device != "cpu" else []
    return split(plan.sweep.parallel, gpus, usable_cores())


def trial_command(plan: Plan) -> Command:
    def command(trial: Trial, share: Share) -> list[str]:
        child = [*shlex.split(plan.sweep.through or ""), *rank_command("launch.run", [])]
        return [*child, *plan.launcher, *plan.fixed, *trial.overrides, f"run.dir={arguments.quoted(trial.folder)}"]

    return command
