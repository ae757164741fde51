"""How all pictures look: few colours, distinct without colour vision (Okabe and Ito 2008), a light grid."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Plot
from bokeh.plotting import figure

BLUE, ORANGE, GREEN, PINK, SKY, DARK, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#222222",
    "#8A8F98",
)
COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, DARK, GREY)
GRID, TEXT = "#E6E8EB", "#4A4F57"
AXIS = {
    "axis_line_color": GREY,
    "major_tick_line_color": GREY,
    "minor_tick_line_color": None,
    "major_label_text_color": TEXT,
    "axis_label_text_color": TEXT,
    "major_label_text_font_size": "12px",
    "axis_label_text_font_size": "12px",
    "axis_label_text_font_style": "normal",
}
NAMES = {"train": "training", "valid": "valid", "test": "test", "before": "before training"}  # of splits
MOST_LETTERS = 24
# Of probabilities on an axis of logits, the most telling first; and where scores lie close together.
TICKS = (0.5, 0.1, 0.9, 0.01, 0.99, 1e-3, 0.999, 0.2, 0.8, 0.05, 0.95, 1e-4, 0.9999, 0.02, 0.98, 0.3, 0.7, 1e-5, 1e-6)
CLOSE = tuple(n / 100 for n in range(1, 100)) + tuple(n / 1000 for n in range(1, 1000))
FEWEST_TICKS = 3


@dataclass(frozen=True)
class Key:
    """What a colour stands for: a line of a card's legend."""

    color: str
    text: str


@dataclass(frozen=True)
class Card:
    """A picture with its title, its legend and a note. ``wide``: it takes the page's whole width."""

    title: str
    plot: Plot
    keys: Sequence[Key] = field(default_factory=tuple)
    note: str = ""
    wide: bool = False


def make_figure(height: int = 260, tooltips: Any = None, y_grid: bool = True, **options: Any) -> figure:
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        tools="box_zoom,pan,reset,save",
        active_drag=None,
        toolbar_location="above",
        toolbar_inner=True,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_right=14,
        **options,
    )
    plot.toolbar.update(logo=None, autohide=True)
    for axis in plot.axis:
        axis.update(**AXIS)
    for grid in plot.grid:
        grid.update(grid_line_color=GRID if y_grid or grid in plot.xgrid else None)
    if tooltips:
        plot.add_tools(HoverTool(tooltips=tooltips, renderers=[]))
    return plot


def source_of(rows: Sequence[Mapping[str, Any]]) -> ColumnDataSource:
    """A column for each key of ``rows``, which are not empty and have the same keys."""
    return ColumnDataSource({key: [row[key] for row in rows] for key in rows[0]})


def hover(plot: figure, renderer: Any) -> None:
    """Only what is named shows a tooltip."""
    for tool in plot.select(HoverTool):
        tool.update(renderers=[*tool.renderers, renderer])


def set_axes(plot: figure, x: Mapping[str, Any] = {}, y: Mapping[str, Any] = {}) -> None:
    """Properties of the axes."""
    for axes, properties in ((plot.xaxis, x), (plot.yaxis, y)):
        for axis in axes:
            axis.update(**properties)


def label(text: Any, most: int = MOST_LETTERS) -> str:
    """A name of the data's own in a picture: not too long, and nothing that Bokeh takes for TeX, for which it would load MathJax
    from elsewhere."""
    shown = str(text)
    shown = shown if len(shown) <= most else f"{shown[: most - 1]}…"
    return shown.replace("$", "$\u200b").replace("\\", "\\\u200b")


def distinct(labels: Iterable[str]) -> list[str]:
    """An axis of categories needs different ones."""
    seen: dict[str, int] = {}
    found = []
    for text in labels:
        seen[text] = seen.get(text, 0) + 1
        found.append(text if seen[text] == 1 else f"{text} ({seen[text]})")
    return found


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def probability_axis(axis: Any, low: float, high: float, most: int = 7) -> None:
    """Probabilities on an axis of logits from ``low`` to ``high``: some that are not too close."""
    shown: list[float] = []
    for number, tick in enumerate((*TICKS, *CLOSE)):
        place = logit(tick)
        near = any(abs(place - logit(other)) < (high - low) / most for other in shown)
        enough = number >= len(TICKS) and len(shown) >= FEWEST_TICKS
        if low <= place <= high and not near and not enough:
            shown.append(tick)
    fixed_ticks(axis, {logit(tick): f"{tick:.6%}".rstrip("0%").rstrip(".") + "%" for tick in shown})


def fixed_ticks(axis: Any, texts: dict[float, str]) -> None:
    axis.update(ticker=FixedTicker(ticks=list(texts)), major_label_overrides=texts)
