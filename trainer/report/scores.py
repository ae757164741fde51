"""Calibration and the distribution of scores, of the newest evaluation of each split (``distributions.json``)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.models import ColumnDataSource, NumeralTickFormatter, Range1d

from trainer.report.curves import SPLITS
from trainer.report.pictures import (
    BLUE,
    GREY,
    NAMES,
    ORANGE,
    Card,
    Key,
    hover,
    logit,
    make_figure,
    probability_axis,
    set_axes,
    source_of,
)
from trainer.report.run_record import RunRecord

SURE = 1.96  # of a normal distribution: 95 % lie within
HEIGHT = 320


def cards(run: RunRecord) -> list[Card]:
    scores = [(split, run.scores[split]) for split in ("valid", "test") if split in run.scores]
    drawn = {str(split): found for split, found in scores if found["calibration"]}
    return [_calibration(drawn), *(_spread(split, found["scores"]) for split, found in drawn.items())] if drawn else []


def notes(run: RunRecord) -> list[str]:
    steps = sorted({found["step"] for found in run.scores.values()})
    return [f"At step {', '.join(f'{step:,}' for step in steps)}."] if steps else []


def _calibration(scores: Mapping[str, Any]) -> Card:
    """Observed click rate over mean prediction, both on an axis of logits, with an interval of 95 %."""
    points = {split: [_point(split, found) for found in part["calibration"]] for split, part in scores.items()}
    ends = ("predicted", "observed", "low", "high")
    known = [point[end] for part in points.values() for point in part for end in ends if 0 < point[end] < 1]
    low, high = logit(min(known)) - 0.3, logit(max(known)) + 0.3
    tooltips = [
        ("", "@name"),
        ("predicted", "@predicted{0.00%}"),
        ("observed", "@observed{0.00%}"),
        ("95 %", "@low{0.00%} – @high{0.00%}"),
        ("rows", "@weight{0,0}"),
    ]
    plot = make_figure(HEIGHT, tooltips, x_axis_label="predicted", y_axis_label="observed", match_aspect=False)
    plot.update(x_range=Range1d(low, high), y_range=Range1d(low, high))
    plot.line([low, high], [low, high], color=GREY, line_dash="dashed")
    for split, part in points.items():
        placed = [point | {f"{end}_at": _within(point[end], low, high) for end in ends} for point in part]
        at, color = {"source": source_of(placed)}, SPLITS[split]
        plot.segment("predicted_at", "low_at", "predicted_at", "high_at", **at, color=color, alpha=0.55)
        hover(plot, plot.scatter("predicted_at", "observed_at", **at, color=color, size=7))
    for axis in plot.axis:
        probability_axis(axis, low, high)
    keys = [Key(SPLITS[split], f"{NAMES[split]}: {_counts(part)}") for split, part in points.items()]
    return Card(
        "Predicted against observed",
        plot,
        keys,
        "Bars: 95 % confidence intervals of the click rate. Dashed: perfect calibration.",
    )


def _point(split: str, found: dict[str, float]) -> dict[str, Any]:
    low, high = wilson(found["observed"], found["weight"])
    return {"name": NAMES[split], **found, "low": low, "high": high}


def wilson(rate: float, rows: float) -> tuple[float, float]:
    """The 95 % interval of a rate seen in ``rows`` rows (Wilson 1927, "Probable inference, the law of succession, and statistical
    inference")."""
    z = SURE * SURE / rows
    middle, half = rate + z / 2, SURE * math.sqrt((rate * (1 - rate) + z / 4) / rows)
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def _within(probability: float, low: float, high: float) -> float:
    """Its logit; that of 0 or 1 is the edge of the picture."""
    if not 0 < probability < 1:
        return low if probability <= 0 else high
    return min(max(logit(probability), low), high)


def _counts(points: Sequence[dict[str, Any]]) -> str:
    fewest, most = (round(pick(point["weight"] for point in points)) for pick in (min, max))
    rows = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    return f"{len(points)} bins of {rows} rows"


def _spread(split: str, scores: dict[str, list[float]]) -> Card:
    """The distribution of scores of clicks, and of others."""
    edges, totals = scores["edges"], {kind: sum(scores[kind]) for kind in ("others", "clicks")}
    tooltips = [("predicted", "@from{0.00%} – @to{0.00%}"), ("clicks", "@clicks{0,0}"), ("others", "@others{0,0}")]
    plot = make_figure(HEIGHT, tooltips, x_axis_label="predicted", y_axis_label="share of the class")
    keys = []
    for kind, color in (("others", BLUE), ("clicks", ORANGE)):
        shares = [value / totals[kind] if totals[kind] else 0.0 for value in scores[kind]]
        columns = {"left": edges[:-1], "right": edges[1:], "top": shares}
        columns |= {
            "from": [_probability(edge) for edge in edges[:-1]],
            "to": [_probability(edge) for edge in edges[1:]],
        }
        source = ColumnDataSource(columns | {name: scores[name] for name in ("clicks", "others")})
        quads = plot.quad("left", "right", "top", 0, source=source, fill_color=color, fill_alpha=0.3, line_color=None)
        plot.step([*edges, edges[-1]], [*shares, shares[-1], 0.0], mode="after", color=color, line_width=1.5)
        hover(plot, quads)
        keys.append(Key(color, f"{'clicks' if kind == 'clicks' else 'no clicks'}: {totals[kind]:,.0f}"))
    low, high = _most(scores)
    plot.update(x_range=Range1d(low, high))
    plot.y_range.update(start=0)
    set_axes(plot, y={"formatter": NumeralTickFormatter(format="0.[0]%")})
    probability_axis(plot.xaxis[0], low, high)
    return Card(f"Scores of {split}", plot, keys)


def _most(scores: dict[str, list[float]]) -> tuple[float, float]:
    """Where all but a thousandth of the rows at each end lie."""
    edges, weights = scores["edges"], [a + b for a, b in zip(scores["clicks"], scores["others"])]
    limit, first, last = sum(weights) / 1000, 0, len(weights) - 1
    while first < last and sum(weights[: first + 1]) < limit:
        first += 1
    while last > first and sum(weights[last:]) < limit:
        last -= 1
    margin = (edges[last + 1] - edges[first]) * 0.04
    return edges[first] - margin, edges[last + 1] + margin


def _probability(score: float) -> float:
    return 1 / (1 + math.exp(-score))
