"""What a sweep leaves: a table, `results.json`, a picture, and the best trial as an experiment."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from data_loaders.messages import program
from data_loaders.state_files import write_json
from launch import messages
from launch.sweep import experiment, picture
from launch.sweep.space import Dimension
from launch.sweep.trials import Trial, best, ranked

PICTURE = "sweep.html"


def leave(
    root: Path,
    trials: Sequence[Trial],
    dimensions: Sequence[Dimension],
    fixed: Sequence[str],
    config_dirs: Sequence[str],
    metric: str,
) -> None:
    """Writes all of it to ``root``, and says where."""
    trials = ranked(list(trials), metric)
    write_json(
        root / "results.json",
        [{**asdict(trial), "values": trial.shown, "folder": str(trial.folder)} for trial in trials],
    )
    print_table(trials, dimensions, metric)
    if any(trial.value is not None for trial in trials):
        picture.draw(root / PICTURE, trials, dimensions, metric)
        messages.result(f"Picture: {root / PICTURE}")
    if (winner := best(trials, metric)) is not None:
        headline = f"Trial {winner.number} of {root}: {metric} {winner.value:.6f}"
        arguments = experiment.write(root, [*fixed, *winner.overrides], config_dirs, headline)
        messages.result(f"Best: {winner}, {metric} {winner.value:.6f}, in {winner.folder}")
        messages.result(f"Run it: {program()} train {shlex.join(arguments)}")


def print_table(trials: Sequence[Trial], dimensions: Sequence[Dimension], metric: str) -> None:
    table = Table(title=f"{len(trials)} trials by {metric}", title_justify="left")
    for name in ("trial", *(dimension.key for dimension in dimensions), metric, "state", "seconds"):
        table.add_column(name, justify="right" if name in (metric, "seconds", "trial") else "left")
    for trial in trials:
        values = [_short(trial.shown[dimension.key]) for dimension in dimensions]
        figure = "–" if trial.value is None else f"{trial.value:.5f}"
        state = f"{trial.state}: {trial.reason}" if trial.state == "failed" else trial.state
        table.add_row(
            str(trial.number), *values, figure, state, "–" if trial.seconds is None else f"{trial.seconds:.0f}"
        )
    messages.show(table)


def _short(value: str) -> str:
    """Six digits of a fraction are enough to read."""
    try:
        return f"{float(value):.6g}" if "." in value or "e" in value else value
    except ValueError:
        return value
