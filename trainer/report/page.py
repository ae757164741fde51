"""The page, put together: sections of pictures, tables and text. Bokeh comes along with it, its core alone (1.3 MB)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment

from trainer.report import curves, plan, scores, slices, tables, texts
from trainer.report.files import Run, read
from trainer.report.style import Card
from trainer.report.template import PAGE, STYLE
from trainer.run_folder import write_text

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
            state=texts.state(run),
            tiles=texts.tiles(run),
            alerts=run.alerts,
            sections=shown,
            divs=divs,
            style=STYLE,
            scripts=f"{bokeh}\n{script}",
        )
    )


def sections(run: Run) -> list[Section]:
    results, counters, environment = texts.results(run), texts.counters(run), texts.environment(run)
    listed = tables.listed(run)
    steps = {found["step"] for found in run.scores.values()}
    scored = [f"At step {', '.join(f'{step:,}' for step in sorted(steps))}."] if steps else []
    data = [] if counters or not run.figures.get("train", {}).get("seconds") else [NOTHING_DROPPED]
    return [
        Section("results", "Results", texts=texts.remarks(run), tables=[results] if results else []),
        Section("curves", "Curves", curves.cards(run)),
        Section("scores", "Calibration and scores", scores.cards(run), scored),
        Section("slices", "AUC by slice", slices.cards(run)),
        Section(
            "tables",
            "Embedding tables",
            tables.cards(run),
            listed["notes"] if listed else [],
            [listed] if listed else [],
        ),
        Section("plan", "Sharding plan", plan.cards(run)),
        Section("data", "Data", texts=data, tables=[counters] if counters else []),
        Section("config", "Configuration", code=run.config_text, code_title="config.yaml"),
        Section("environment", "Environment", tables=[environment] if environment else []),
    ]
