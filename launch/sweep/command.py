"""`python -m launch.run --multirun [sweep=optuna] [sweep.KEY=VALUE …] key=a,b key=interval(0, 1) …`, from start to end."""

import argparse
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_loaders.errors import UserError
from data_loaders.secrets import redact_override, scrub
from launch import group
from launch.folder import check_settings, locked
from launch.rank import command as rank_command
from launch.sweep import options, results, space
from launch.sweep.grid import Grid
from launch.sweep.options import SweepConfig
from launch.sweep.running import Command, Runner
from launch.sweep.running import Search as AnySearch
from launch.sweep.shares import Share, split, usable_cores, visible_gpus
from launch.sweep.space import Dimension
from launch.sweep.study import Search
from launch.sweep.trials import Trial
from trainer.config.compose import compose, parse
from trainer.config.job import TrainConfig


@dataclass(frozen=True)
class Plan:
    """What the command line says, checked. ``launcher``: launch.run's own options, for each trial. ``base``: the
    configuration of a first trial."""

    sweep: SweepConfig
    fixed: list[str]
    dimensions: list[Dimension]
    config_dir: str | None
    launcher: list[str]
    base: TrainConfig
    root: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same when the command is given again."""
        return settings_of(self.sweep, self.fixed, self.dimensions, self.config_dir)


def main(launch: argparse.Namespace, argv: Sequence[str]) -> int:
    """Returns the exit code: 0; 1 where no trial came to its end, or one has to go on; 2 for a mistake; 128 + n after a
    signal."""
    try:
        plan = make_plan(launch, argv)
        with locked(plan.root, "sweep.dir"):
            check_settings(plan.root, "sweep.dir", plan.settings)
            return run(plan, trial_command(plan))
    except ValueError as error:
        print(f"error: {scrub(str(error))}", file=sys.stderr)
        return 2


def run(plan: Plan, command: Command) -> int:
    search: AnySearch
    if plan.sweep.method == "optuna":
        search = Search(plan.sweep, plan.dimensions, plan.root)
    else:
        search = Grid(plan.dimensions, plan.root)
    print(f"Sweep in {plan.root}: the same command goes on where it stopped", flush=True)
    runner = Runner(search, shares(plan), command, plan.sweep.metric)
    runner.run()
    trials = search.trials()
    results.leave(plan.root, trials, plan.dimensions, plan.fixed, plan.config_dir, plan.sweep.metric)
    if runner.stopped:
        return 128 + runner.stopped
    states = {trial.state for trial in trials}
    if "open" in states:
        print("A trial is not at its end: the same command goes on with it", file=sys.stderr)
    return 0 if "complete" in states and "open" not in states else 1


def make_plan(launch: argparse.Namespace, argv: Sequence[str]) -> Plan:
    """Raises ``UserError`` for what cannot work, with any value of the space where that can be told beforehand."""
    if launch.module != "trainer.train":
        raise UserError(f"--module {launch.module}: a sweep is of trainer.train")
    own, rest = group.split(argv, "sweep")
    parsed, overrides = parse(rest)
    sweep = options.read(own, parsed.config_dir)
    fixed, dimensions = space.parse([*overrides, *(f"{key}={text}" for key, text in sweep.params.items())])
    if not dimensions:
        raise UserError(
            "--multirun, but nothing is swept: give values, as in model=deepfm,din optim.dense.lr=1e-3,3e-4"
        )
    if any(text.startswith("run.dir=") for text in fixed) or any(d.key == "run.dir" for d in dimensions):
        raise UserError("run.dir is of a single run: give sweep.dir=DIR, in which each trial has a folder")
    folder = ["--config-dir", parsed.config_dir] if parsed.config_dir else []
    fixed_arguments = [*folder, "--config-name", parsed.config_name, *fixed]
    base = check_trials(fixed_arguments, dimensions, sweep)
    digest = hashlib.sha256(
        json.dumps(settings_of(sweep, fixed, dimensions, parsed.config_dir), sort_keys=True).encode()
    ).hexdigest()
    root = Path(sweep.dir or Path(base.run.root) / f"sweep-{digest[:8]}").absolute()
    launcher = ["--nproc-per-node", launch.nproc_per_node, "--max-restarts", str(launch.max_restarts)]
    launcher += ["--grace", str(launch.grace), *folder, "--config-name", parsed.config_name]
    return Plan(sweep, fixed, dimensions, parsed.config_dir, launcher, base, root)


def settings_of(
    sweep: SweepConfig, fixed: Sequence[str], dimensions: Sequence[Dimension], config_dir: str | None
) -> dict[str, Any]:
    plain = [redact_override(text) for text in fixed]
    chosen = {"method": sweep.method, "metric": sweep.metric, "config_dir": config_dir}
    return {**chosen, "overrides": plain, "space": [redact_override(dimension.text) for dimension in dimensions]}


def check_trials(arguments: Sequence[str], dimensions: Sequence[Dimension], sweep: SweepConfig) -> TrainConfig:
    """Composes every trial of a grid; of a search, a trial for each value or end of each dimension. Returns a first one."""
    if sweep.method == "grid":
        candidates: Iterator[dict[str, str]] = space.grid(dimensions)
    else:
        [dimension.distribution() for dimension in dimensions]
        first = {dimension.key: dimension.corners[0] for dimension in dimensions}
        candidates = ({**first, d.key: value} for d in dimensions for value in d.corners)
    configs = (_checked([*arguments, *(f"{k}={v}" for k, v in values.items())], sweep) for values in candidates)
    base = next(configs)
    for _ in configs:
        pass
    return base


def _checked(arguments: Sequence[str], sweep: SweepConfig) -> TrainConfig:
    config = compose(arguments).config
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
    from launch.run import count_gpus

    gpus = visible_gpus(count_gpus(), os.environ) if plan.base.device != "cpu" else []
    return split(plan.sweep.parallel, gpus, usable_cores())


def trial_command(plan: Plan) -> Command:
    def command(trial: Trial, share: Share) -> list[str]:
        child = [*shlex.split(plan.sweep.through or ""), *rank_command("launch.run", [])]
        folder = "'" + str(trial.folder).replace("\\", "\\\\").replace("'", "\\'") + "'"
        return [*child, *plan.launcher, *plan.fixed, *trial.overrides, f"run.dir={folder}"]

    return command
