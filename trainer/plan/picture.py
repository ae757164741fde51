"""An estimate as a page: bars by rank."""

from pathlib import Path
from typing import Any

from bokeh.models import Span

from trainer.plan.estimate import HELD
from trainer.report.memory import bars_by_rank
from trainer.report.pictures import COLORS, TEXT, Card, Key
from trainer.report.template import write_picture
from trainer.sharding.hardware import GIB


def draw(data: dict[str, Any], path: Path) -> None:
    """``data``: of ``report.as_data``. GiB of each rank by kind, with the device's memory and the part of it that the plan may
    fill."""
    ranks, device = data["memory"], data["device"]
    parts = [part for rank, sizes in enumerate(ranks) for part in _bar(rank, sizes)]
    tooltips = [("rank", "@rank"), ("", "@kind"), ("GiB", "@size{0,0.000}")]
    plot = bars_by_rank(parts, len(ranks), tooltips, "GiB", ",.3f")
    plot.x_range.update(end=max(plot.x_range.end, device["memory"] / GIB * 1.05))
    for name, dash in (("memory", "solid"), ("usable", "dashed")):
        plot.add_layout(Span(location=device[name] / GIB, dimension="height", line_color=TEXT, line_dash=dash))
    keys = [Key(color, kind.replace("_", " ")) for kind, color in zip(HELD, COLORS)]
    note = f"Solid: the device's memory, {device['memory'] / GIB:.1f} GiB; dashed: what the plan may fill."
    title = f"{data['topology']}: {'fits' if data['fits'] else 'does not fit'}"
    write_picture(path, title, Card("Memory by rank", plot, keys, note, wide=True))


def _bar(rank: int, sizes: dict[str, int]) -> list[dict[str, Any]]:
    parts, left = [], 0.0
    for kind, color in zip(HELD, COLORS):
        size = sizes[kind] / GIB
        part = {"rank": rank, "kind": kind.replace("_", " "), "size": size, "color": color}
        parts.append(part | {"left": left, "right": left + size})
        left += size
    return parts
