"""Parallel coordinates: an axis for each dimension and one for the metric, a line for each trial, coloured by the metric."""

import math
from collections.abc import Sequence
from pathlib import Path

from launch.sweep.space import Dimension, number
from launch.sweep.trials import Trial, lower_is_better, without_secret

MISSING = "no picture: it needs matplotlib (.venv/bin/pip install 'matplotlib>=3.9')"


def draw(path: Path, trials: Sequence[Trial], dimensions: Sequence[Dimension], metric: str) -> None:
    """Trials that reached a value; pruned ones dashed. Raises ``ValueError`` without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError(MISSING) from None
    from matplotlib.figure import Figure

    shown = [trial for trial in trials if trial.value is not None]
    axes = [*(axis_of(dimension, shown) for dimension in dimensions), metric_axis(shown, metric)]
    figure = Figure(figsize=(2.2 * len(axes) + 1.5, 5), layout="constrained")
    plot = figure.add_subplot()
    # The best is bright, whichever way the metric goes.
    colours = matplotlib.colormaps["viridis_r" if lower_is_better(metric) else "viridis"]
    for trial, *heights in sorted(
        zip(shown, *(axis.heights for axis in axes)), key=lambda row: row[0].state == "complete"
    ):
        style = "-" if trial.state == "complete" else ":"
        plot.plot(range(len(axes)), heights, style, color=colours(heights[-1]), alpha=0.9, linewidth=1.6)
    for place, axis in enumerate(axes):
        plot.axvline(place, color="black", linewidth=0.8)
        for height, label in axis.ticks:
            plot.text(
                place + 0.02, height, label, fontsize=8, va="center", bbox={"color": "white", "alpha": 0.7, "pad": 1}
            )
    plot.set_xticks(range(len(axes)), [axis.name for axis in axes], rotation=15)
    plot.set_yticks([])
    plot.set_title(f"{len(shown)} trials by {metric}; dotted: stopped early")
    plot.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)


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
