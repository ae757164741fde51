"""An estimate as plain data (JSON) and as tables in the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from trainer.plan.estimate import HELD, Estimate
from trainer.sharding.hardware import GIB, Cluster

MOST_TABLES, MOST_RANKS, MOST_REASONS = 40, 16, 10  # lines


def as_data(estimate: Estimate, smallest: Cluster | None, advice: list[str]) -> dict[str, Any]:
    """Bytes and milliseconds."""
    hardware = estimate.cluster.hardware
    return {
        "topology": str(estimate.cluster),
        "ranks": estimate.cluster.ranks,
        "device": {"name": hardware.name, "memory": estimate.capacity, "usable": estimate.usable},
        "fits": estimate.fits,
        "why_not": estimate.short or None,
        "batch_size_of_a_rank": estimate.batch_size,
        "memory": estimate.memory,
        "step_ms": estimate.step | {"total": estimate.step_ms},
        "tables": estimate.tables,
        "smallest": str(smallest) if smallest else None,
        "advice": advice,
    }


def show(data: dict[str, Any], console: Console) -> None:
    """``as_data``'s, for people."""
    console.print(_memory(data))
    console.print(_tables(data))
    if len(data["tables"]) > MOST_TABLES:
        console.print(f"… and {len(data['tables']) - MOST_TABLES} smaller tables (--json has all)")
    for row in data["tables"][:MOST_REASONS]:
        console.print(f"{row['table']} is {row['sharding']}: {row['why']}", highlight=False, markup=False)
    console.print(_step(data))
    rows = f"{data['batch_size_of_a_rank']:,} rows a rank"
    console.print(f"{rows}; these times rank plans and were never measured", highlight=False)
    console.print(f"[bold]{data['topology']}: {'fits' if data['fits'] else 'does not fit'}[/bold]", highlight=False)
    if data["why_not"]:
        console.print(f"  {data['why_not']}", highlight=False)
    console.print(f"smallest cluster that fits: {data['smallest'] or 'none'}", highlight=False)
    for line in data["advice"]:
        console.print(f"- {line}", highlight=False, markup=False)


def _memory(data: dict[str, Any]) -> Table:
    """A line a rank; of many the first ones, which are alike in most plans, and the fullest."""
    room = f"{data['device']['memory'] / GIB:.1f} GiB each, {data['device']['usable'] / GIB:.1f} for the plan"
    table = Table(title=f"GiB by rank of {data['topology']} ({room})", title_justify="left")
    for column in ("rank", *(kind.replace("_", " ") for kind in HELD), "all"):
        table.add_column(column, justify="right")
    totals = [sum(rank.values()) for rank in data["memory"]]
    fullest = totals.index(max(totals))
    shown = sorted({*range(min(MOST_RANKS, len(totals))), fullest})
    for rank in shown:
        name = f"{rank} (fullest)" if rank == fullest and len(totals) > 1 else str(rank)
        values = [*data["memory"][rank].values(), totals[rank]]
        table.add_row(name, *(f"{value / GIB:.3f}" for value in values))
    return table


def _tables(data: dict[str, Any]) -> Table:
    table = Table(title="Tables", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits 80 columns
    for column in ("table", "rows", "dim", "optimizer", "GiB", "type", "ranks"):
        table.add_column(column, justify="right" if column in ("rows", "dim", "GiB", "ranks") else "left")
    for row in data["tables"][:MOST_TABLES]:
        size = f"{row['size'] / GIB:.3f}"
        held = str(len(row["ranks"])) if len(row["ranks"]) > 1 else f"#{row['ranks'][0]}"
        name, rows, dim = row["table"], f"{row['rows']:,}", str(row["dim"])
        table.add_row(name, rows, dim, row["optimizer"], size, row["sharding"], held)
    return table


def _step(data: dict[str, Any]) -> Table:
    table = Table(title="Estimated step", title_justify="left")
    table.add_column("part")
    table.add_column("ms", justify="right")
    for part, milliseconds in data["step_ms"].items():
        table.add_row(part.replace("_", " "), f"{milliseconds:.3f}")
    return table
