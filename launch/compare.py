"""Runs side by side: `python -m launch.compare RUN RUN … [--metric valid.auc] [--picture compare.png]`.

What differs in their configurations, the metrics each ended with, and the course of one metric by rows trained, as a table
and a picture. A run may still be going on. Exit code: 0, or 2 for a mistake in the command.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

WIDTH = 160  # of a table that is not written to a terminal
FIGURES = ("auc", "gauc", "auc_pr", "logloss", "ne", "calibration")
SPEED = ("rows_trained", "samples_per_second", "seconds")
POINTS = 8  # of a course, as a table


@dataclass(frozen=True)
class Run:
    """``config`` flat: dotted key -> value. ``metrics``: of ``metrics.json``; empty before the end. ``lines``: of
    ``metrics.jsonl``."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    lines: list[dict[str, Any]]
    state: str

    def course(self, metric: str) -> list[tuple[int, float]]:
        """(rows trained, value) of ``split.name``. Steps that a resumed run wrote twice count as written last."""
        split, _, name = metric.partition(".")
        found = {
            line["rows_trained"]: line[name] for line in self.lines if line["split"] == split and _is_number(line, name)
        }
        return sorted(found.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.compare", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--metric", default="valid.auc", help="the course to show: split.name of metrics.jsonl")
    parser.add_argument("--picture", type=Path, help="where to draw the courses (a .png, .svg or .pdf)")
    options = parser.parse_args(argv)
    try:
        runs = read_all([Path(run).expanduser() for run in options.runs])
        check_metric(runs, options.metric)
        show(runs, options.metric)
        if options.picture:
            draw(options.picture, runs, options.metric)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_all(folders: Sequence[Path]) -> list[Run]:
    """Named by as much of their paths as tells them apart. Raises ``ValueError`` for what is no run folder."""
    paths = [folder.resolve() for folder in folders]
    if repeated := {path for path in paths if paths.count(path) > 1}:
        raise ValueError(f"{min(repeated)} is given twice")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [read(folder, "/".join(path.parts[-depth:])) for folder, path in zip(folders, paths)]


def read(folder: Path, name: str) -> Run:
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} has no config.yaml: give the folder of a run")
    lines = folder / "metrics.jsonl"
    return Run(
        name=name,
        config=flatten(yaml.safe_load((folder / "config.yaml").read_text())),
        metrics=_json(folder / "metrics.json"),
        # The last line may still be being written.
        lines=[json.loads(line) for line in lines.read_text().splitlines(True) if line.endswith("\n")]
        if lines.exists()
        else [],
        state=_json(folder / "status.json").get("state", "unknown"),
    )


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
    if any(run.lines for run in runs) and not any(run.course(metric) for run in runs):
        known = {
            f"{line['split']}.{name}"
            for run in runs
            for line in run.lines
            for name in FIGURES
            if _is_number(line, name)
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
    value = (metrics.get(split) or {}).get(name)
    return value if isinstance(value, (int, float)) else None


def _is_number(line: Mapping[str, Any], name: str) -> bool:
    return isinstance(line.get(name), (int, float))


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.5f}"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
