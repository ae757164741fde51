"""Embedding tables: the share of rows trained, and the norms of rows (``tables.json``)."""

from typing import Any

from bokeh.models import NumeralTickFormatter, Range1d

from trainer.report.pictures import BLUE, GREY, Card, Key, distinct, hover, label, make_figure, set_axes, source_of
from trainer.report.run_record import RunRecord
from trainer.report.template import Table

MOST_DRAWN = 40  # the largest
MOST_LISTED = 300
LOW, MIDDLE, HIGH = 1, 3, 5  # of table_statistics.QUANTILES: 5, 50 and 95 %
PARTS = {
    "trained": Key(BLUE, "trained rows"),
    "never_trained": Key(GREY, "never trained: initial values"),
    "all": Key(BLUE, "all rows"),
}


def cards(run: RunRecord) -> list[Card]:
    tables = run.tables.get("tables", [])[:MOST_DRAWN]
    return [_trained(tables), _norms(tables)] if tables else []


def _trained(tables: list[dict[str, Any]]) -> Card:
    names = distinct(label(table["table"]) for table in tables)
    known, unknown = [], []
    for name, table in zip(names, tables):
        share = table["trained"]
        (unknown if share is None else known).append({"name": name, "share": share, "rows": table["rows"]})
    tooltips = [("", "@name"), ("trained", "@share{0.0%}"), ("rows", "@rows{0,0}")]
    plot = make_figure(80 + 17 * len(names), tooltips, False, y_range=names[::-1], x_range=Range1d(0, 1.2))
    if known:
        source = source_of(known)
        plot.hbar(y="name", left=0, right=1, height=0.7, source=source, color=GREY, alpha=0.22)
        hover(plot, plot.hbar(y="name", right="share", height=0.7, source=source, color=BLUE))
    texts = [(1.01, row["name"], _percent(row["share"])) for row in known]
    for x, name, text in (*texts, *((0.01, row["name"], "unknown") for row in unknown)):
        plot.text([x], [name], [text], text_baseline="middle", text_font_size="11px")
    set_axes(plot, x={"formatter": NumeralTickFormatter(format="0%"), "ticker": [0, 0.25, 0.5, 0.75, 1]})
    keys = [Key(BLUE, "trained at least once"), Key(GREY, "never trained")]
    return Card(
        "Share of rows trained", plot, keys, "Unknown where the optimizer keeps no state (SGD)." if unknown else ""
    )


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 or not share else f"{share:.1%}"


def _norms(tables: list[dict[str, Any]]) -> Card:
    names = distinct(label(table["table"]) for table in tables)
    tooltips = [
        ("", "@name, @rows"),
        ("5 – 50 – 95 %", "@low{0.0000} – @middle{0.0000} – @high{0.0000}"),
        ("mean", "@mean{0.0000}"),
    ]
    plot = make_figure(80 + 17 * len(names), tooltips, False, y_range=names[::-1])
    drawn = []
    for part in PARTS:
        lines = [(name, table["norms"][part]) for name, table in zip(names, tables) if part in table["norms"]]
        if not lines:
            continue
        source = source_of([{"name": name, "rows": PARTS[part].text} | _norm(norms) for name, norms in lines])
        color = PARTS[part].color
        plot.segment("low", "name", "high", "name", source=source, color=color, line_width=3, alpha=0.45)
        hover(plot, plot.scatter("middle", "name", source=source, color=color, size=7))
        drawn.append(PARTS[part])
    plot.x_range.update(start=0)
    set_axes(plot, x={"formatter": NumeralTickFormatter(format="0.[000]")})
    return Card("L2 norm of rows", plot, drawn, "Point: median; bar: from 5 to 95 % of the rows.")


def _norm(norms: dict[str, Any]) -> dict[str, float]:
    quantiles = {name: norms["quantiles"][place] for name, place in (("low", LOW), ("middle", MIDDLE), ("high", HIGH))}
    return {"mean": norms["mean"], **quantiles}


def listed(run: RunRecord) -> list[Table]:
    """The same as text: a line a table."""
    tables = run.tables.get("tables", [])
    sizes = {row["table"]: sum(row["bytes"].values()) for row in run.plan}
    head = ["table", "rows", "dim", "optimizer", "MB", "trained", "never trained", "row of missing ids", "mean norm"]
    lines = [_line(table, sizes.get(table["table"])) for table in tables[:MOST_LISTED]]
    return [Table(head, lines, f"{len(tables)} tables")] if tables else []


def _line(table: dict[str, Any], size: int | None) -> list[str]:
    share, row = table["trained"], table["missing_row"]
    missing = (
        "none"
        if row is None
        else f"{row}" + {True: ", trained", False: ", never trained"}.get(table["missing_row_trained"], "")
    )
    norms = table["norms"].get("trained") or table["norms"].get("all")
    return [
        table["table"],
        f"{table['rows']:,}",
        f"{table['dim']}",
        table["optimizer"],
        "–" if size is None else f"{size / 1e6:,.2f}",
        "unknown" if share is None else f"{share:.1%}",
        "unknown" if share is None else f"{1 - share:.1%}",
        missing,
        "–" if norms is None or norms["mean"] is None else f"{norms['mean']:.4f}",
    ]


def notes(run: RunRecord) -> list[str]:
    tables = run.tables.get("tables", [])
    if not tables:
        return []
    notes = [f"At step {run.tables['step']:,}. A row counts as trained when its optimizer has state for it."]
    sampled = [table for table in tables if table["sampled"] < table["rows"]]
    if sampled:
        most = max(table["sampled"] for table in sampled)
        notes.append(
            f"Of {len(sampled)} tables a sample: at most {most:,} rows, one of each of as many blocks of equal length."
        )
    if any(table["missing_row"] == 0 for table in tables):
        notes.append("Row 0 of a table of hashed ids is reserved for missing ids: no value is hashed to it.")
    if len(tables) > MOST_DRAWN:
        notes.append(f"The pictures have the {MOST_DRAWN} largest tables.")
    if len(tables) > MOST_LISTED:
        notes.append(f"The list has the {MOST_LISTED} largest; tables.json has all.")
    return notes
