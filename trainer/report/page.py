"""The page, put together: sections of pictures, tables and text. Bokeh comes along with it, its core alone (1.3 MB)."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment

from data_loaders.state_files import write_text
from trainer.report import curves, plan, scores, slices, tables, texts
from trainer.report.files import Run, read
from trainer.report.style import Card
from trainer.report.template import PAGE, STYLE

T = TypeVar("T")
NOTHING_DROPPED = "Every value fitted: nothing was null, out of range, cut or left out."


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    cards: Sequence[Card] = ()
    texts: Sequence[str] = ()
    tables: Sequence[Any] = ()
    code: str = ""
    code_title: str = ""

    @property
    def empty(self) -> bool:
        return not (self.cards or self.texts or self.tables or self.code)


def write(folder: Path, output: Path) -> None:
    """Raises ``ValueError`` for what is no run folder."""
    write_text(output, html(read(folder)))


def html(run: Run) -> str:
    found = [section for section in sections(run) if not section.empty]
    cards = {f"{section.id}-{number}": card for section in found for number, card in enumerate(section.cards)}
    script, divs = components({name: card.plot for name, card in cards.items()}) if cards else ("", {})
    bokeh = Resources(mode="inline", components=["bokeh"]).render_js() if cards else ""
    shown = [
        {
            **vars(section),
            "cards": [(name, card) for name, card in cards.items() if name.rpartition("-")[0] == section.id],
        }
        for section in found
    ]
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(PAGE)
        .render(
            name=run.name,
            folder=run.folder.resolve().name,
            state=_or_warn(lambda: texts.state(run), "state", "state unknown", run),
            tiles=_or_warn(lambda: texts.tiles(run), "head", [], run),
            alerts=run.alerts,
            sections=shown,
            divs=divs,
            style=STYLE,
            scripts=f"{bokeh}\n{script}",
        )
    )


def sections(run: Run) -> list[Section]:
    made = {
        "results": lambda: _results(run),
        "curves": lambda: Section("curves", "Curves", curves.cards(run)),
        "scores": lambda: _scores(run),
        "slices": lambda: Section("slices", "AUC by slice", slices.cards(run)),
        "tables": lambda: _tables(run),
        "plan": lambda: Section("plan", "Sharding plan", plan.cards(run)),
        "data": lambda: _data(run),
        "config": lambda: Section("config", "Configuration", code=run.config_text, code_title="config.yaml"),
        "environment": lambda: _environment(run),
    }
    found = {name: _or_warn(make, f"section '{name}'", None, run) for name, make in made.items()}
    return [section for section in found.values() if section is not None]


def _or_warn(make: Callable[[], T], what: str, default: T, run: Run) -> T:
    """What a damaged file of the run keeps from being drawn is left out: the rest is worth seeing."""
    try:
        return make()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"warning: the report of {run.folder} lacks its {what}: a file is damaged ({reason})", file=sys.stderr)
        return default


def _results(run: Run) -> Section:
    results = texts.results(run)
    return Section("results", "Results", texts=texts.remarks(run), tables=[results] if results else [])


def _scores(run: Run) -> Section:
    steps = {found["step"] for found in run.scores.values()}
    scored = [f"At step {', '.join(f'{step:,}' for step in sorted(steps))}."] if steps else []
    return Section("scores", "Calibration and scores", scores.cards(run), scored)


def _tables(run: Run) -> Section:
    listed = tables.listed(run)
    notes, lists = (listed["notes"], [listed]) if listed else ([], [])
    return Section("tables", "Embedding tables", tables.cards(run), notes, lists)


def _data(run: Run) -> Section:
    counters = texts.counters(run)
    data = [] if counters or not run.figures.get("train", {}).get("seconds") else [NOTHING_DROPPED]
    return Section("data", "Data", texts=data, tables=[counters] if counters else [])


def _environment(run: Run) -> Section:
    environment = texts.environment(run)
    return Section("environment", "Environment", tables=[environment] if environment else [])
