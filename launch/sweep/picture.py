"""Parallel coordinates: an axis for each dimension and one for the metric, a line for each trial, coloured by the metric."""

import math
from collections.abc import Sequence
from pathlib import Path

from bokeh.models import ColumnDataSource, Span
from bokeh.palettes import Viridis256

from launch.sweep.space import Dimension, number
from launch.sweep.trials import Trial, lower_is_better, without_secret
from trainer.report.pictures import TEXT, Card, fixed_ticks, hover, label, make_figure, set_axes
from trainer.report.template import write_picture


def draw(path: Path, trials: Sequence[Trial], dimensions: Sequence[Dimension], metric: str) -> None:
    """Trials that reached a value; pruned ones dotted."""
    shown = [trial for trial in trials if trial.value is not None]
    axes = [*(axis_of(dimension, shown) for dimension in dimensions), metric_axis(shown, metric)]
    heights = list(zip(*(axis.heights for axis in axes)))
    # The best is bright, whichever way the metric goes.
    bright = [1 - places[-1] if lower_is_better(metric) else places[-1] for places in heights]
    source = ColumnDataSource(
        {
            "x": [list(range(len(axes)))] * len(shown),
            "y": [list(places) for places in heights],
            "color": [Viridis256[round(255 * place)] for place in bright],
            "dash": ["solid" if trial.state == "complete" else "dotted" for trial in shown],
            "trial": [label(str(trial), 500) for trial in shown],
            "value": [trial.value for trial in shown],
        }
    )
    plot = make_figure(480, [("", "@trial"), (metric, "@value{0.000000}")], y_grid=False, y_range=(-0.05, 1.05))
    hover(plot, plot.multi_line("x", "y", source=source, color="color", line_dash="dash", line_width=2))
    for place, axis in enumerate(axes):
        plot.add_layout(Span(location=place, dimension="height", line_color=TEXT))
        ys, texts = zip(*axis.ticks)
        plot.text(
            [place] * len(ys),
            ys,
            list(map(label, texts)),
            x_offset=4,
            text_baseline="middle",
            text_font_size="12px",
            background_fill_color="white",
            background_fill_alpha=0.7,
        )
    plot.x_range.update(end=len(axes) - 0.5)  # room for the labels of the last one
    fixed_ticks(plot.xaxis[0], {place: label(axis.name, 40) for place, axis in enumerate(axes)})
    set_axes(plot, y={"visible": False})
    write_picture(path, f"{len(shown)} trials by {metric}", Card("Dotted: stopped early", plot, wide=True))


class Axis:
    """``heights``: of each trial, from 0 to 1. ``ticks``: (height, label)."""

    def __init__(self, name: str, heights: list[float], ticks: list[tuple[float, str]]) -> None:
        self.name, self.heights, self.ticks = name, heights, ticks


def axis_of(dimension: Dimension, trials: Sequence[Trial]) -> Axis:
    """Choices at equal distances, in their order; numbers to scale."""
    values = [trial.values[dimension.key] for trial in trials]
    if dimension.choices:
        last = max(len(dimension.choices) - 1, 1)
        places = {choice: place / last for place, choice in enumerate(dimension.choices)}
        ticks = [(height, without_secret(dimension.key, choice)) for choice, height in places.items()]
        return Axis(dimension.key, [places[value] for value in values], ticks)
    numbers = [number(value) or 0.0 for value in values]
    return _scaled(dimension.key, numbers, dimension.low, dimension.high, dimension.log)


def metric_axis(trials: Sequence[Trial], metric: str) -> Axis:
    values = [trial.value for trial in trials if trial.value is not None]
    return _scaled(metric, values, min(values, default=0.0), max(values, default=1.0), log=False)


def _scaled(name: str, values: list[float], low: float, high: float, log: bool) -> Axis:
    to = math.log if log else float
    span = to(high) - to(low) or 1.0
    back = math.exp if log else float
    ticks = [(step / 4, f"{back(to(low) + span * step / 4):.4g}") for step in range(5)]
    return Axis(name, [(to(value) - to(low)) / span for value in values], ticks)
