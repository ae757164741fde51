"""AUC by the values of chosen columns (``evaluation.slices``)."""

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from bokeh.models import NumeralTickFormatter, Span

from data_loaders.prepare.declaration import MISSING_ID, UNKNOWN_ID
from trainer.report.pictures import BLUE, GREY, Card, Key, distinct, hover, label, make_figure, set_axes, source_of
from trainer.report.run_record import RunRecord
from trainer.warm_start.vocabularies import vocabulary_file

RESERVED = {str(MISSING_ID): "missing", str(UNKNOWN_ID): "unknown"}
MOST_VALUES = 40  # those of most rows


def cards(run: RunRecord) -> list[Card]:
    found = run.last_with("slices")
    if found is None:
        return []
    split, columns = found
    whole = run.metrics[split]["auc"]
    made = [_card(split, column, with_words(run.config, column, values), whole) for column, values in columns.items()]
    return [card for card in made if card is not None]


def with_words(config: dict[str, Any], column: str, values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``values`` with the vocabulary's words in place of ids, where ``column`` is a feature of a prepared data set."""
    data = config["data"]
    features = data["schema"]["features"]
    tables = [each.get("table") for name, each in features.items() if (each.get("column") or name) == column]
    folder = Path(data["prepared"]) if data.get("prepared") else None
    file = next((file for table in tables if table and (file := vocabulary_file(folder, table))), None)
    if file is None:
        return values
    ids = [int(value["value"]) for value in values if str(value.get("value")).isdigit()]
    table = pq.read_table(file, columns=["id", "value"], filters=[("id", "in", ids)]) if ids else None
    words = RESERVED | (dict(zip(map(str, table["id"].to_pylist()), table["value"].to_pylist())) if table else {})
    return [{**value, "value": words.get(value.get("value"), value.get("value"))} for value in values]


def _card(split: str, column: str, values: list[dict[str, Any]], whole: float) -> Card | None:
    drawn = in_order([value for value in values if value.get("auc") is not None][:MOST_VALUES])
    if not drawn:
        return None
    names = distinct(
        f"{label('null' if value['value'] is None else value['value'])} · {value['rows']:,}" for value in drawn
    )
    rows = [_point(name, value) for name, value in zip(names, drawn)]
    tooltips = [
        ("", "@name"),
        ("AUC", "@auc{0.0000} (95 %: @low{0.000} – @high{0.000})"),
        ("log loss", "@logloss{0.0000}"),
        ("calibration", "@calibration{0.000}"),
        ("click rate", "@label_mean{0.00%}"),
    ]
    plot = make_figure(70 + 19 * len(drawn), tooltips, False, y_range=names[::-1], x_axis_label=f"AUC on {split}")
    plot.add_layout(Span(location=whole, dimension="height", line_color=GREY, line_dash="dashed"))
    source = source_of(rows)
    plot.segment("low", "name", "high", "name", source=source, color=BLUE, alpha=0.5)
    hover(plot, plot.scatter("auc", "name", source=source, color=BLUE, size=8))
    set_axes(plot, x={"formatter": NumeralTickFormatter(format="0.00")})
    left_out = len(values) - len(drawn)
    note = "Each value with its number of rows; bars: 95 % confidence intervals."
    note += f" {left_out} further values: of fewer rows, or of one class only." if left_out else ""
    return Card(f"By {label(column)}", plot, [Key(GREY, f"all rows {whole:.4f} (dashed)")], note)


def _point(name: str, value: dict[str, Any]) -> dict[str, Any]:
    error = 1.96 * standard_error(value["auc"], value["rows"], value["label_mean"])
    shown = {key: value.get(key) for key in ("auc", "rows", "logloss", "calibration", "label_mean")}
    return {"name": name, **shown, "low": value["auc"] - error, "high": value["auc"] + error}


def in_order(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Numbers by size; anything else as it comes, most rows first."""
    try:
        return sorted(values, key=lambda value: float(value["value"]))
    except (TypeError, ValueError):
        return values


def standard_error(auc: float, rows: float, rate: float) -> float:
    """Of an AUC (Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve", eq. 1)."""
    clicks, others = rows * rate, rows * (1 - rate)
    both_above, both_below = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    spread = auc * (1 - auc) + (clicks - 1) * (both_above - auc * auc) + (others - 1) * (both_below - auc * auc)
    return math.sqrt(max(spread, 0.0) / (clicks * others))
