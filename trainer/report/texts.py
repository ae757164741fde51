"""What a report says in words and numbers: its head, the final figures, the data's counters, the environment."""

import datetime
from dataclasses import dataclass
from typing import Any

from trainer.report.files import Run

SPLITS = ("test", "valid", "train", "before")
NAMES = {"train": "training", "before": "before training"}
METRICS = (
    ("auc", "AUC", ".4f"),
    ("gauc", "GAUC", ".4f"),
    ("auc_pr", "AUC-PR", ".4f"),
    ("logloss", "log loss", ".4f"),
    ("ne", "normalized entropy", ".4f"),
    ("calibration", "calibration", ".3f"),
    ("ece", "calibration error", ".4f"),
    ("accuracy", "accuracy", ".4f"),
    ("relaimpr", "RelaImpr", ".2%"),
    ("label_mean", "click rate", ".2%"),
    ("rows", "rows", ",d"),
    ("samples_per_second", "samples/s", ",.0f"),
    ("seconds", "seconds", ",.1f"),
)
HEADLINE = ("auc", "logloss", "ne", "calibration")


@dataclass(frozen=True)
class Table:
    head: list[str]
    lines: list[list[str]]
    title: str = ""


def tiles(run: Run) -> list[tuple[str, str]]:
    """(what, how much) of the head: the figures of test, or what else there is, then rows and time."""
    split = next((split for split in SPLITS[:3] if run.figures.get(split)), None)
    values = run.figures.get(split, {}) if split else {}
    where = f"{NAMES.get(split, split)} " if split else ""
    short = {"ne": "NE"}
    found = [
        (where + short.get(name, title), _shown(values.get(name), form))
        for name, title, form in METRICS
        if name in HEADLINE
    ]
    train = run.figures.get("train", {})
    found.append(("rows trained", f"{run.rows_trained:,}"))
    if "seconds" in train:
        since = " (last start)" if train.get("rows_trained", run.rows_trained) < run.rows_trained else ""
        found.append((f"training time{since}", duration(train["seconds"])))
    if train.get("samples_per_second"):
        found.append(("samples/s", _shown(train["samples_per_second"], ",.0f")))
    return found


def state(run: Run) -> str:
    """How the run stands, in a line."""
    word = run.status.get("state", "unknown")
    step = run.status.get(
        "step", max((course.last["step"] for course in run.courses.values() if course.last), default=None)
    )
    words = {
        "running": "still going on",
        "preempted": "stopped",
        "killed": "ended without a word",
        "unknown": "state unknown",
    }
    reason = f": {run.status['reason']}" if run.status.get("reason") else ""
    return words.get(word, word) + (f" at step {step:,}" if step is not None else "") + reason


def results(run: Run) -> Table | None:
    """A line a metric, a column a split."""
    splits = [split for split in SPLITS if run.figures.get(split)]
    if not splits:
        return None
    best = run.figures.get("best", {})
    lines = []
    for name, title, form in (*_ranking(run, splits), *METRICS):
        values = [run.figures[split].get(name) for split in splits]
        if any(value is not None for value in values):
            possible = [(best.get(split) or {}).get(name) for split in splits]
            cells = [
                _shown(value, form) + (f" (best possible {_shown(p, form)})" if p else "")
                for value, p in zip(values, possible)
            ]
            lines.append([title, *cells])
    return Table(["", *(NAMES.get(split, split) for split in splits)], lines)


def remarks(run: Run) -> list[str]:
    """What belongs to the figures and is no figure of a split."""
    found = []
    if selected := run.figures.get("selected"):
        stopped = f"; training stopped because {selected['stopped']}" if selected.get("stopped") else ""
        found.append(
            f"Figures of the best checkpoint, step {selected['best_step']:,}, by {selected['metric']}{stopped}."
        )
    if wide := run.figures.get("wide"):
        found.append(f"Linear part: {wide['nonzero']:,} of {wide['rows']:,} weights are not 0 ({wide['share']:.1%}).")
    memory = (run.figures.get("train") or {}).get("peak_memory_mb")
    if memory:
        found.append(
            "Most memory of a rank: " + ", ".join(f"{size:,} MB {kind}" for kind, size in memory.items()) + "."
        )
    if memory:
        found.append("Training: rows of the last epoch, each scored before it was trained.")
    if run.unreadable:
        found.append(f"{run.unreadable:,} lines of metrics.jsonl could not be read.")
    return found


def counters(run: Run) -> Table | None:
    """What happened to values that do not fit, by column and split, and how much of the rows that is."""
    splits = [split for split in SPLITS if (run.figures.get(split) or {}).get("data")]
    names = sorted({name for split in splits for name in run.figures[split]["data"]})
    if not names:
        return None
    lines = []
    for name in names:
        column, _, what = name.rpartition(".")
        counts = [run.figures[split]["data"].get(name, 0) for split in splits]
        lines.append([column, what.replace("_", " "), *(f"{count:,}" for count in counts)])
    names = {"valid": "valid, all evaluations"} | NAMES
    return Table(["column", "what", *(names.get(split, split) for split in splits)], lines)


def environment(run: Run) -> Table | None:
    facts = {name: value for name, value in run.environment.items() if value is not None}
    started, updated = (when(run.status.get(name)) for name in ("started", "updated"))
    facts = {"started": started, "last news": updated, "run folder": run.folder.resolve().name} | facts
    return Table([], [[name, str(value)] for name, value in facts.items() if value])


def when(stamp: str | None) -> str:
    """A time of ``status.json``, for people."""
    return "" if not stamp else datetime.datetime.fromisoformat(stamp).strftime("%Y-%m-%d %H:%M UTC")


def duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{seconds:.1f} s"


def _ranking(run: Run, splits: list[str]) -> list[tuple[str, str, str]]:
    """Metrics of requests, whose names depend on ``evaluation.top_k``."""
    names = dict.fromkeys(name for split in splits for name in run.figures[split])
    return [(name, name, ".4f") for name in names if name == "mrr" or name.startswith(("ndcg@", "hit_rate@"))]


def _shown(value: Any, form: str) -> str:
    if not isinstance(value, (int, float)):
        return "–"
    return format(int(value) if form.endswith("d") else value, form)
