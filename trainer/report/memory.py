"""What each rank holds: tables and their optimizer state, by the plan (``plan.json``)."""

from collections.abc import Sequence
from typing import Any

from bokeh.models import BasicTicker, CustomJSTickFormatter, NumeralTickFormatter, Range1d
from bokeh.plotting import figure

from trainer.report.pictures import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    Card,
    Key,
    hover,
    make_figure,
    set_axes,
    source_of,
)
from trainer.report.run_record import RunRecord

KINDS = {
    "table_wise": BLUE,
    "row_wise": ORANGE,
    "column_wise": GREEN,
    "data_parallel": PINK,
    "table_row_wise": SKY,
    "grid_shard": DARK,
}
MOST_BARS = 3000  # parts of bars in the picture
MEGABYTE = 1e6


def cards(run: RunRecord) -> list[Card]:
    return [_card(run.plan)] if run.plan else []


def _card(plan: list[dict[str, Any]]) -> Card:
    ranks = 1 + max(int(rank) for row in plan for rank in row["bytes"])
    parts = segments(plan, max(1, MOST_BARS // ranks))
    tooltips = [("rank", "@rank"), ("table", "@table"), ("sharding", "@sharding"), ("MB", "@size{0,0.000}")]
    plot = bars_by_rank(parts, ranks, tooltips, "MB of tables and optimizer state")
    kinds = dict.fromkeys(part["sharding"] for part in parts)
    sizes = {kind: sum(part["size"] for part in parts if part["sharding"] == kind) for kind in kinds}
    keys = [Key(KINDS.get(kind, GREY), f"{kind.replace('_', ' ')} {size:,.1f} MB") for kind, size in sizes.items()]
    return Card("Memory by rank", plot, keys, "A part of a bar is a table: point at it.", wide=True)


def bars_by_rank(
    parts: Sequence[dict[str, Any]], ranks: int, tooltips: Any, label: str, number: str = ",.1f"
) -> figure:
    """A bar a rank. ``parts``: each with ``rank``, its ends ``left`` and ``right``, its ``color``, and what tooltips show;
    ``number``: how the total of a bar is written."""
    height = round(90 + ranks * min(40, max(4, 640 / ranks)))
    plot = make_figure(height, tooltips, False, x_axis_label=label, y_axis_label="rank")
    source = source_of(parts)
    bars = plot.hbar(
        y="rank",
        left="left",
        right="right",
        height=0.8,
        source=source,
        color="color",
        line_color="white",
        line_width=0.5,
    )
    hover(plot, bars)
    totals = [max((part["right"] for part in parts if part["rank"] == rank), default=0.0) for rank in range(ranks)]
    if ranks <= 32:
        texts = [format(total, number) for total in totals]
        plot.text(totals, list(range(ranks)), texts, x_offset=5, text_baseline="middle", text_font_size="12px")
    plot.update(x_range=Range1d(0, max(totals) * 1.15 or 1.0), y_range=Range1d(ranks - 0.4, -0.6))
    whole = CustomJSTickFormatter(code="return Number.isInteger(tick) ? String(tick) : ''")
    y = {"ticker": BasicTicker(min_interval=1, num_minor_ticks=0), "formatter": whole}
    set_axes(plot, x={"formatter": NumeralTickFormatter(format="0,0.[00]")}, y=y)
    return plot


def segments(plan: list[dict[str, Any]], most_tables: int) -> list[dict[str, Any]]:
    """The parts of all bars, ``left`` to ``right`` in MB: a table each, the largest first within their kind of sharding; what is
    beyond ``most_tables`` is one part for each kind of sharding."""
    rows = sorted(plan, key=lambda row: -sum(row["bytes"].values()))
    held: dict[tuple[str, str], dict[int, int]] = {}
    for number, row in enumerate(rows):
        name = row["table"] if number < most_tables else "smaller tables"
        part = held.setdefault((row["sharding"], name), {})
        for rank, size in row["bytes"].items():
            part[int(rank)] = part.get(int(rank), 0) + size
    kinds = list(dict.fromkeys(kind for kind, _ in held))
    ends: dict[int, float] = {}
    found = []
    for (kind, name), sizes in sorted(held.items(), key=lambda item: kinds.index(item[0][0])):
        for rank, size in sizes.items():
            left = ends.get(rank, 0.0)
            ends[rank] = left + size / MEGABYTE
            found.append(
                {"rank": rank, "table": name, "sharding": kind, "left": left, "right": ends[rank]}
                | {"size": size / MEGABYTE, "color": KINDS.get(kind, GREY)}
            )
    return found
