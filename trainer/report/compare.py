"""Runs side by side: `python -m trainer.report.compare RUN RUN … [--metric valid.auc] [--picture compare.png]`.

What differs in their configurations, the metrics each ended with, and the course of one metric by rows trained, as a table
and a picture. A run may still be going on. Exit code: 0, or 2 for a mistake in the command.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_loaders.output_files import PICTURES, check_output, is_picture
from trainer.report import files

WIDTH = 160  # of a table that is not written to a terminal
FIGURES = ("auc", "gauc", "auc_pr", "logloss", "ne", "calibration")
SPEED = ("rows_trained", "samples_per_second", "seconds")
POINTS = 8  # of a course, as a table


@dataclass(frozen=True)
class Run:
    """``config`` flat: dotted key -> value. ``metrics``: of ``metrics.json``; empty before the end. ``courses``: by split, as
    the report has them."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    courses: dict[str, files.Course]
    state: str

    def course(self, metric: str) -> list[tuple[int, float]]:
        """(rows trained, value) of ``split.name``."""
        split, _, name = metric.partition(".")
        course = self.courses.get(split)
        if course is None or not course.lines or name not in course.names:
            return []
        pairs = zip(course.column("rows_trained").tolist(), course.column(name).tolist(), strict=True)
        return [(int(rows), value) for rows, value in pairs if math.isfinite(value) and math.isfinite(rows)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.report.compare", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--metric", default="valid.auc", help="the course to show: split.name of metrics.jsonl")
    parser.add_argument("--picture", type=Path, help="where to draw the courses (a .png, .svg or .pdf)")
    options = parser.parse_intermixed_args(argv)
    try:
        if options.picture:
            check_output("--picture", options.picture, PICTURES, is_picture)
        runs = read_all([Path(run).expanduser() for run in options.runs], options.metric)
        check_metric(runs, options.metric)
        show(runs, options.metric)
        if options.picture:
            draw(options.picture, runs, options.metric)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_all(folders: Sequence[Path], metric: str = "valid.auc") -> list[Run]:
    """Named by as much of their paths as tells them apart, with the courses of ``metric`` and ``FIGURES``. Raises
    ``ValueError`` for what is no run folder."""
    paths = [folder.resolve() for folder in folders]
    if repeated := {path for path in paths if paths.count(path) > 1}:
        raise ValueError(f"{min(repeated)} is given twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    names = tuple(dict.fromkeys((*FIGURES, metric.partition(".")[2])))
    return [read(folder, "/".join(path.parts[-depth:]), names) for folder, path in zip(folders, paths)]


def read(folder: Path, name: str, names: Sequence[str]) -> Run:
    run = files.read(folder, names)
    return Run(name, flatten(run.config), run.ended, run.courses, str(run.status.get("state", "unknown")))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Keys whose values differ, with each run's (``–``: it has no such key). Where a run lies is no difference."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    table = {key: [run.config.get(key, "–") for run in runs] for key in keys if not key.startswith("run.")}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def figures(runs: Sequence[Run]) -> dict[str, list[float | None]]:
    """Metrics of ``metrics.json`` that some run has, each run's (None: it has not)."""
    names = [("train", name) for name in SPEED]
    names = [*((split, name) for split in ("valid", "test", "train") for name in FIGURES), *names]
    table = {f"{split}.{name}": [_figure(run.metrics, split, name) for run in runs] for split, name in names}
    return {name: values for name, values in table.items() if any(value is not None for value in values)}


def check_metric(runs: Sequence[Run], metric: str) -> None:
    """Raises ``ValueError`` where some run has lines, but none this metric."""
    if any(run.courses for run in runs) and not any(run.course(metric) for run in runs):
        known = {
            f"{split}.{name}"
            for run in runs
            for split in run.courses
            for name in FIGURES
            if run.course(f"{split}.{name}")
        }
        raise ValueError(f"--metric {metric}: no run has it (valid: {', '.join(sorted(known))})")


def show(runs: Sequence[Run], metric: str) -> None:
    names = [run.name for run in runs]
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    changed = differences(runs)
    if changed:
        _print(console, "Configuration, where it differs", names, {k: list(map(str, v)) for k, v in changed.items()})
    else:
        console.print("The configurations are the same.")
    ended = {name: [_text(value) for value in values] for name, values in figures(runs).items()}
    _print(console, "At the end", names, {"state": [run.state for run in runs], **ended})
    _print(console, f"{metric} by rows trained", names, courses(runs, metric))


def courses(runs: Sequence[Run], metric: str) -> dict[str, list[str]]:
    """At ``POINTS`` of all rows at which some run was evaluated, the first and the last among them."""
    by_run = [dict(run.course(metric)) for run in runs]
    rows = sorted({number for course in by_run for number in course})
    if len(rows) > POINTS:
        rows = [rows[round(place * (len(rows) - 1) / (POINTS - 1))] for place in range(POINTS)]
    return {f"{number:,}": [_text(course.get(number)) for course in by_run] for number in rows}


def draw(path: Path, runs: Sequence[Run], metric: str) -> None:
    """Raises ``ValueError`` without matplotlib, and for a kind of picture it does not know."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--picture needs matplotlib: .venv/bin/pip install 'matplotlib>=3.9'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    plot = figure.add_subplot()
    for run in runs:
        course = run.course(metric)
        plot.plot([rows for rows, _ in course], [value for _, value in course], marker=".", label=run.name)
    plot.set(xlabel="rows trained", ylabel=metric)
    plot.grid(alpha=0.3)
    plot.legend()
    figure.savefig(path, dpi=110)
    print(f"Picture: {path}")


def _print(console: Console, title: str, names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def _figure(metrics: Mapping[str, Any], split: str, name: str) -> float | None:
    figures = metrics.get(split)
    value = figures.get(name) if isinstance(figures, dict) else None
    return value if isinstance(value, (int, float)) else None


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.5f}"


if __name__ == "__main__":
    sys.exit(main())
