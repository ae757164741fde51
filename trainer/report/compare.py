"""Runs side by side: `clicktrainer compare RUN RUN … [--metric valid.auc] [--picture compare.html]`.

What differs in their configurations, the metrics each ended with, and the curve of one metric by rows trained, as a table
and a picture. A run need not have ended. Exit code: 0, or 2 for a mistake in the command.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_loaders.errors import UserError
from data_loaders.messages import fail
from trainer.config import arguments
from trainer.report.drawing import check_page, draw_comparison
from trainer.report.run_record import RunRecord

WIDTH = 160  # of a table that is not written to a terminal
METRICS = ("auc", "gauc", "auc_pr", "logloss", "ne", "calibration")
SPEED = ("rows_trained", "samples_per_second", "seconds")
POINTS = 8  # of a curve, as a table

Runs = Mapping[str, RunRecord]  # by name


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments.compare().parse_intermixed_args(argv)
    try:
        if options.picture:
            check_page("--picture", options.picture)
        runs = read_all([run.expanduser() for run in options.runs], options.metric)
        check_metric(runs, options.metric)
        show(runs, options.metric)
        if options.picture:
            draw_comparison(runs, options.metric, options.picture)
            print(f"Picture: {options.picture}")
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


def read_all(folders: Sequence[Path], metric: str = "valid.auc") -> dict[str, RunRecord]:
    """Named by as much of their paths as distinguishes them, with the curves of ``metric`` and ``METRICS``."""
    paths = [folder.resolve() for folder in folders]
    if repeated := {path for path in paths if paths.count(path) > 1}:
        raise UserError(f"{min(repeated)} is given twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    names = tuple(dict.fromkeys((*METRICS, metric.partition(".")[2])))
    return {"/".join(path.parts[-depth:]): RunRecord(folder, names) for folder, path in zip(folders, paths)}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def differences(runs: Runs) -> dict[str, list[Any]]:
    """Keys whose values differ, with each run's (``–``: it has no such key). Where a run lies is no difference."""
    configs = [flatten(run.config) for run in runs.values()]
    keys = dict.fromkeys(key for config in configs for key in config if not key.startswith("run."))
    table = {key: [config.get(key, "–") for config in configs] for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def final_metrics(runs: Runs) -> dict[str, list[float | None]]:
    """Metrics of ``metrics.json`` that some run has, each run's (None: it has not)."""
    names = [f"{split}.{name}" for split in ("valid", "test", "train") for name in METRICS]
    names += [f"train.{name}" for name in SPEED]
    table = {name: [run.final_value(name) for run in runs.values()] for name in names}
    return {name: values for name, values in table.items() if any(value is not None for value in values)}


def check_metric(runs: Runs, metric: str) -> None:
    """Raises ``UserError`` where some run has lines, but none this metric."""
    known = {
        f"{split}.{name}"
        for run in runs.values()
        for split, history in run.histories.items()
        for name in history.names
        if run.curve(f"{split}.{name}")
    }
    if any(run.histories for run in runs.values()) and metric not in known:
        raise UserError(f"--metric {metric}: no run has it (valid: {', '.join(sorted(known))})")


def show(runs: Runs, metric: str) -> None:
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    changed = differences(runs)
    if changed:
        _print(console, "Configuration, where it differs", runs, {k: list(map(str, v)) for k, v in changed.items()})
    else:
        console.print("The configurations are the same.")
    states = [str(run.status.get("state", "unknown")) for run in runs.values()]
    ended = {name: [_text(value) for value in values] for name, values in final_metrics(runs).items()}
    _print(console, "At the end", runs, {"state": states, **ended})
    _print(console, f"{metric} by rows trained", runs, curves(runs, metric))


def curves(runs: Runs, metric: str) -> dict[str, list[str]]:
    """At ``POINTS`` of all numbers of rows at which some run was evaluated, the first and the last among them."""
    by_run = [dict(run.curve(metric)) for run in runs.values()]
    rows = sorted({number for curve in by_run for number in curve})
    if len(rows) > POINTS:
        rows = [rows[round(place * (len(rows) - 1) / (POINTS - 1))] for place in range(POINTS)]
    return {f"{number:,}": [_text(curve.get(number)) for curve in by_run] for number in rows}


def _print(console: Console, title: str, names: Runs, rows: Mapping[str, Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.5f}"


if __name__ == "__main__":
    sys.exit(main())
