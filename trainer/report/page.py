"""``report.html``: the sections of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data_loaders.messages import one_line, warn
from data_loaders.state_files import write_text
from trainer.report import curves, memory, scores, slices, tables, texts
from trainer.report.run_record import RunRecord
from trainer.report.template import Section, render
from trainer.runtime import run_folder

T = TypeVar("T")


def write(folder: Path, output: Path) -> None:
    """Raises ``UserError`` for what is no run folder."""
    write_text(output, html(RunRecord(folder)))


def html(run: RunRecord) -> str:
    state = _or_warn(lambda: texts.state(run), "state", "state unknown", run)
    return render(
        run.name,
        f"{run.folder.resolve().name} · {state}",
        sections(run),
        tiles=_or_warn(lambda: texts.tiles(run), "head", list[tuple[str, str]](), run),
        alerts=run.alerts,
    )


def sections(run: RunRecord) -> list[Section]:
    made = {
        "results": lambda: Section("results", "Results", texts=texts.remarks(run), tables=texts.results(run)),
        "curves": lambda: Section("curves", "Curves", curves.cards(run)),
        "scores": lambda: Section("scores", "Calibration and scores", scores.cards(run), scores.notes(run)),
        "slices": lambda: Section("slices", "AUC by slice", slices.cards(run)),
        "tables": lambda: Section(
            "tables", "Embedding tables", tables.cards(run), tables.notes(run), tables.listed(run)
        ),
        "plan": lambda: Section("plan", "Sharding plan", memory.cards(run)),
        "data": lambda: Section("data", "Data", texts=texts.clean(run), tables=texts.counters(run)),
        "config": lambda: Section("config", "Configuration", code=run.config_text, code_title=run_folder.CONFIG),
        "environment": lambda: Section("environment", "Environment", tables=texts.environment(run)),
    }
    found = {name: _or_warn(make, f"section '{name}'", None, run) for name, make in made.items()}
    return [section for section in found.values() if section is not None]


def _or_warn(make: Callable[[], T], what: str, default: T, run: RunRecord) -> T:
    """What a damaged file of the run keeps from being drawn is left out: the rest is worth seeing."""
    try:
        return make()
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        warn(f"the report of {run.folder} lacks its {what}: a file is damaged ({reason})")
        return default
