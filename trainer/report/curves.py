"""Curves by rows trained: of one run's training and evaluations, and of one metric of several runs."""

import math
from collections.abc import Mapping

import numpy as np
from bokeh.models import ColumnDataSource, NumeralTickFormatter, Range1d, Span
from bokeh.plotting import figure
from numpy.typing import NDArray

from trainer.report.pictures import (
    BLUE,
    COLORS,
    DARK,
    GREY,
    NAMES,
    ORANGE,
    Card,
    Key,
    hover,
    label,
    make_figure,
    set_axes,
)
from trainer.report.run_record import History, RunRecord

SPLITS = {"train": BLUE, "valid": ORANGE, "test": DARK}
# Metrics drawn: the title, how numbers read, the value that would be perfect or useless, and what that is.
CURVES: tuple[tuple[str, str, str, float | None, str], ...] = (
    ("logloss", "Log loss", "0.0000", None, ""),
    ("auc", "AUC", "0.0000", None, ""),
    ("gauc", "GAUC", "0.0000", None, ""),
    ("ne", "Normalized entropy", "0.0000", 1.0, "1: no better than always predicting the mean"),
    ("calibration", "Calibration", "0.000", 1.0, "1: as many clicks predicted as there were"),
    ("samples_per_second", "Samples per second", "0.[0]a", None, ""),
    ("input_wait_fraction", "Input wait", "0.[0]%", None, "share of the time that training waits for rows"),
)
ROWS = "0.[0]a"  # how a number of rows reads
FROM_ZERO = ("samples_per_second", "input_wait_fraction")
MOST_POINTS = 1000
POINTS_SHOWN, FEW = 60, 12  # of an evaluation, of training: as points, not only as a line
DASHES = ("solid", "dashed", "dotted")  # of as many runs as there are colours each


def cards(run: RunRecord) -> list[Card]:
    return [card for curve in CURVES if (card := _card(run, *curve)) is not None]


def comparison(runs: Mapping[str, RunRecord], metric: str) -> Card:
    """``metric`` (split.name) of each run, by its name."""
    tooltips = [("", "@name"), ("rows", "@rows{0,0}"), (metric, "@value{0.00000}")]
    plot = make_figure(480, tooltips, x_axis_label="rows trained")
    set_axes(plot, x={"formatter": NumeralTickFormatter(format=ROWS)})
    keys = []
    for number, (name, run) in enumerate(runs.items()):
        curve = run.curve(metric)
        kept = kept_points(np.array([value for _, value in curve]))
        rows, values = zip(*(curve[place] for place in kept)) if curve else ((), ())
        source = ColumnDataSource({"rows": rows, "value": values, "name": [label(name)] * len(rows)})
        color, dash = COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]
        plot.line("rows", "value", source=source, color=color, line_width=2, line_dash=dash)
        hover(plot, plot.scatter("rows", "value", source=source, size=5, color=color))
        keys.append(Key(color, name if dash == "solid" else f"{name} ({dash})"))
    return Card(metric, plot, keys, wide=True)


def _card(run: RunRecord, name: str, title: str, number: str, reference: float | None, note: str) -> Card | None:
    drawn = {split: run.histories[split] for split in SPLITS if split in run.histories}
    drawn = {split: history for split, history in drawn.items() if not np.isnan(history.column(name)).all()}
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
    for split, history in drawn.items():
        _draw(plot, split, history, name)
        keys.append(Key(SPLITS[split], f"{NAMES[split]} {_text(history.column(name)[-1], number)}"))
    format = number.replace(".0", ".[0") + "]" if ".0" in number else number
    set_axes(
        plot, x={"formatter": NumeralTickFormatter(format=ROWS)}, y={"formatter": NumeralTickFormatter(format=format)}
    )
    end = max(float(history.column("rows_trained").max()) for history in drawn.values()) * 1.03
    limits = _limits({split: history.column(name) for split, history in drawn.items()}, reference, name in FROM_ZERO)
    plot.update(x_range=Range1d(0, end), y_range=Range1d(*limits))
    if reference is not None:
        plot.add_layout(Span(location=reference, dimension="width", line_color=GREY, line_dash="dashed", line_width=1))
    return Card(title, plot, keys, note)


def _draw(plot: figure, split: str, history: History, name: str) -> None:
    values = history.column(name)
    kept = kept_points(values)
    columns = {"rows": history.column("rows_trained"), "step": history.column("step"), "epoch": history.column("epoch")}
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


def kept_points(values: NDArray[np.float64], most: int = MOST_POINTS) -> NDArray[np.int64]:
    """Ascending indices of at most ``most`` values: the first, the last, the smallest and the largest of each of ``most / 4``
    stretches of equal length, so that no extreme is lost. NaN is no value, but where there is nothing else."""
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), max(most // 4, 1) + 1).astype(np.int64)
    kept = []
    for begin, end in zip(edges[:-1], edges[1:]):
        part = values[begin:end]
        kept += [begin, end - 1]
        if not np.isnan(part).all():
            kept += [begin + int(np.nanargmin(part)), begin + int(np.nanargmax(part))]
    return np.unique(np.array(kept, np.int64))


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
