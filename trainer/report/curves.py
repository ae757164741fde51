"""Curves of training and of each evaluation by rows trained."""

import math

import numpy as np
from bokeh.models import ColumnDataSource, NumeralTickFormatter, Range1d, Span
from bokeh.plotting import figure
from numpy.typing import NDArray

from trainer.report.files import Course, Run
from trainer.report.style import BLUE, DARK, GREY, ORANGE, Card, Key, hover, make_figure
from trainer.report.thinning import kept_points

SPLITS = {"train": BLUE, "valid": ORANGE, "test": DARK}
NAMES = {"train": "training", "valid": "valid", "test": "test"}
# What is drawn: of ``metrics.jsonl``, its title, how numbers read, the value that would be perfect or useless, and what that is.
CURVES: tuple[tuple[str, str, str, float | None, str], ...] = (
    ("logloss", "Log loss", "0.0000", None, ""),
    ("auc", "AUC", "0.0000", None, ""),
    ("gauc", "GAUC", "0.0000", None, ""),
    ("ne", "Normalized entropy", "0.0000", 1.0, "1: no better than always predicting the mean"),
    ("calibration", "Calibration", "0.000", 1.0, "1: as many clicks predicted as there were"),
    ("samples_per_second", "Samples per second", "0.[0]a", None, ""),
    ("input_wait_fraction", "Input wait", "0.[0]%", None, "share of the time that training waits for rows"),
)
FROM_ZERO = ("samples_per_second", "input_wait_fraction")
POINTS_SHOWN, FEW = 60, 12  # of an evaluation, of training: as points, not only as a line


def cards(run: Run) -> list[Card]:
    return [card for curve in CURVES if (card := _card(run, *curve)) is not None]


def _card(run: Run, name: str, title: str, number: str, reference: float | None, note: str) -> Card | None:
    drawn = {split: run.courses[split] for split in SPLITS if split in run.courses}
    drawn = {split: course for split, course in drawn.items() if not np.isnan(course.column(name)).all()}
    if not drawn:
        return None
    tooltips = [
        ("", "@name"),
        ("step", "@step{0,0}"),
        ("rows", "@rows{0,0}"),
        ("epoch", "@epoch"),
        (title, f"@value{{{number}}}"),
    ]
    plot = make_figure(tooltips=tooltips, x_axis_label="rows trained")
    keys = []
    for split, course in drawn.items():
        _draw(plot, split, course, name)
        keys.append(Key(SPLITS[split], f"{NAMES[split]} {_text(course.column(name)[-1], number)}"))
    plot.xaxis.formatter, plot.yaxis.formatter = (
        NumeralTickFormatter(format="0.[0]a"),
        NumeralTickFormatter(format=number.replace(".0", ".[0") + "]" if ".0" in number else number),
    )
    plot.x_range = Range1d(0, max(float(course.column("rows_trained").max()) for course in drawn.values()) * 1.03)
    low, high = _limits({split: course.column(name) for split, course in drawn.items()}, reference, name in FROM_ZERO)
    plot.y_range = Range1d(low, high)
    if reference is not None:
        plot.add_layout(Span(location=reference, dimension="width", line_color=GREY, line_dash="dashed", line_width=1))
    return Card(title, plot, keys, note)


def _draw(plot: figure, split: str, course: Course, name: str) -> None:
    values = course.column(name)
    kept = kept_points(values)
    columns = {"rows": course.column("rows_trained"), "step": course.column("step"), "epoch": course.column("epoch")}
    columns["value"] = values
    source = ColumnDataSource(
        {key: column[kept] for key, column in columns.items()} | {"name": [NAMES[split]] * len(kept)}
    )
    color = SPLITS[split]
    if split == "test":
        hover(plot, plot.scatter("rows", "value", source=source, marker="diamond", size=11, color=color))
        return
    plot.line("rows", "value", source=source, color=color, line_width=1.5 if split == "train" else 2)
    few = len(kept) <= (POINTS_SHOWN if split == "valid" else FEW)
    hover(
        plot, plot.scatter("rows", "value", source=source, size=5 if few else 3, color=color, alpha=1.0 if few else 0.0)
    )


def _limits(values: dict[str, NDArray[np.float64]], reference: float | None, from_zero: bool) -> tuple[float, float]:
    """What is drawn lies within, but for the outermost hundredth of training: a first window, or one that spiked, would leave the
    rest a flat line. (It can be moved into view.)"""
    ends: list[float] = [] if reference is None else [reference]
    for split, column in values.items():
        there = column[~np.isnan(column)]
        ends += np.quantile(there, (0.01, 0.99) if split == "train" else (0, 1)).tolist()
    low, high = min(ends), max(ends)
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 0.01
    return (0.0 if from_zero else low - margin), high + margin


def _text(value: float, number: str) -> str:
    if math.isnan(value):
        return "–"
    if number.endswith("%"):
        return f"{value:.1%}"
    if number.endswith("a"):
        return f"{value:,.0f}"
    return f"{value:.{number.count('0') - 1}f}"
