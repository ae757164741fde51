"""What a warm start will do, shown before anything is trained: ``warm_start.json`` and two tables to read."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.warm_start.dense import DenseTransfer
from trainer.warm_start.matching import NEW
from trainer.warm_start.plan import Plan
from trainer.warm_start.tables import TableTransfer

SHOWN = 5  # features of a dense tensor
WIDTH = 160  # of what is not written to a terminal


@dataclass(frozen=True)
class TableReport:
    """``ids_kept``: the percentage of the old table's ids that have a row in the new one; None where there is no old or no
    new table. ``state``, the optimizer's: kept, decayed (times what), reset, new or none."""

    table: str
    source: str | None
    status: str
    old_rows: int
    new_rows: int
    ids_kept: float | None
    rows_new: int
    rows_dropped: int
    state: str


@dataclass(frozen=True)
class DenseReport:
    """The features whose columns are kept, new and dropped, for the tensors that have columns of features."""

    name: str
    source: str | None
    status: str
    size: int
    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    state: str


@dataclass(frozen=True)
class Report:
    """``source``: the checkpoint. ``totals``: tables and dense tensors by status, rows and ids over all tables."""

    source: str
    step: int
    tables: tuple[TableReport, ...]
    dense: tuple[DenseReport, ...]
    notes: tuple[str, ...]
    totals: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def print(self, console: Console) -> None:
        console.print(f"Warm start from {self.source} (step {self.step:,})", highlight=False, soft_wrap=True)
        console.print(_tables(self.tables), _dense(self.dense))
        for note in self.notes:
            console.print(f"warning: {note}", highlight=False, soft_wrap=True)
        rows = self.totals["rows"]
        console.print(
            f"Rows: {rows['kept']:,} kept, {rows['new']:,} new, {rows['dropped']:,} dropped",
            highlight=False,
            soft_wrap=True,
        )


def make_report(plan: Plan, source: str, step: int) -> Report:
    tables = tuple(_of_table(table) for table in plan.tables)
    dense = tuple(_of_dense(tensor) for tensor in plan.dense)
    kept = sum(table.rows_kept for table in plan.tables)
    totals = {
        "tables": dict(Counter(table.status for table in tables)),
        "dense": dict(Counter(tensor.status for tensor in dense)),
        "rows": {
            "kept": kept,
            "new": sum(table.rows_new for table in tables),
            "dropped": sum(table.rows_dropped for table in tables),
        },
    }
    return Report(source, step, tables, dense, plan.notes, totals)


def _of_table(plan: TableTransfer) -> TableReport:
    ids, kept = plan.ids, plan.rows_kept
    percent = None if ids is None else 100 * ids.kept / ids.known if ids.known else 100.0
    return TableReport(
        plan.table,
        plan.source,
        plan.status,
        plan.old_rows,
        plan.new_rows,
        percent,
        plan.new_rows - kept,
        plan.old_rows - kept,
        _state(plan),
    )


def _of_dense(plan: DenseTransfer) -> DenseReport:
    return DenseReport(
        plan.name, plan.source, plan.status, plan.size, plan.kept, plan.added, plan.removed, _state(plan)
    )


def _state(plan: TableTransfer | DenseTransfer) -> str:
    if not plan.has_state:
        return "none"
    if plan.status == NEW:
        return "new"
    if plan.factor is None:
        return "reset"
    return "kept" if plan.factor == 1 else f"decayed ×{plan.factor:g}"


def _tables(reports: tuple[TableReport, ...]) -> Table:
    table = Table(title="Tables", title_justify="left")
    for column in ("table", "status", "old rows", "new rows", "ids kept", "initial", "dropped", "state"):
        right = column not in ("table", "status", "state")
        table.add_column(column, justify="right" if right else "left", overflow="fold", min_width=6)
    for it in reports:
        name = it.table if it.source in (None, it.table) else f"{it.source} → {it.table}"
        percent = "" if it.ids_kept is None else f"{it.ids_kept:.1f} %"
        counts = [f"{count:,}" if count else "" for count in (it.old_rows, it.new_rows)]
        table.add_row(name, it.status, *counts, percent, f"{it.rows_new:,}", f"{it.rows_dropped:,}", it.state)
    return table


def _dense(reports: tuple[DenseReport, ...]) -> Table:
    table = Table(title="Dense tensors", title_justify="left")
    for column in ("tensor", "status", "values", "columns kept", "columns new", "columns dropped", "state"):
        table.add_column(column, justify="right" if column == "values" else "left", overflow="fold", min_width=6)
    for it in reports:
        name = it.name if it.source in (None, it.name) else f"{it.source} → {it.name}"
        table.add_row(name, it.status, f"{it.size:,}", *map(_some, (it.kept, it.new, it.dropped)), it.state)
    return table


def _some(features: tuple[str, ...]) -> str:
    more = f" and {len(features) - SHOWN} more" if len(features) > SHOWN else ""
    return ", ".join(features[:SHOWN]) + more


def make_console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(width=WIDTH, stderr=stderr)
