"""What a report says in words and numbers: its head, the metrics, the data's counters, the environment."""

import datetime
from typing import Any

import numpy as np

from trainer.monitoring.slowdown import CAUSE, find_collapse
from trainer.report.pictures import NAMES
from trainer.report.run_record import RunRecord
from trainer.report.template import Table

SPLITS = ("test", "valid", "train", "before")
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
HEADLINE = {"auc": "AUC", "logloss": "log loss", "ne": "NE", "calibration": "calibration"}
STATES = {"preempted": "stopped", "unknown": "state unknown"}  # others as they are
NOTHING_DROPPED = "Every value fitted: nothing was null, out of range, cut or left out."


def tiles(run: RunRecord) -> list[tuple[str, str]]:
    """(what, how much) of the head: the metrics of test, or what else there is, then rows and time."""
    split = next((split for split in SPLITS[:3] if run.metrics.get(split)), "")
    values, forms = run.metrics.get(split, {}), {name: form for name, _, form in METRICS}
    found = [
        (f"{NAMES.get(split, '')} {title}".strip(), _shown(values.get(name), forms[name]))
        for name, title in HEADLINE.items()
    ]
    train = run.metrics.get("train", {})
    found.append(("rows trained", f"{run.rows_trained:,}"))
    if "seconds" in train:
        since = " (last start)" if train.get("rows_trained", run.rows_trained) < run.rows_trained else ""
        found.append((f"training time{since}", duration(train["seconds"])))
    if train.get("samples_per_second"):
        found.append(("samples/s", _shown(train["samples_per_second"], ",.0f")))
    return found


def state(run: RunRecord) -> str:
    """The run's state, in a line."""
    word = run.status.get("state", "unknown")
    last = max((history.last["step"] for history in run.histories.values() if history.last), default=None)
    step = run.status.get("step", last)
    reason = f": {run.status['reason']}" if run.status.get("reason") else ""
    return STATES.get(word, word) + (f" at step {step:,}" if step is not None else "") + reason


def results(run: RunRecord) -> list[Table]:
    """A line a metric, a column a split; the best possible value in a line of its own."""
    splits = [split for split in SPLITS if run.metrics.get(split)]
    best = run.metrics.get("best", {})
    lines = []
    for name, title, form in (*_ranking(run, splits), *METRICS):
        lines += _line(title, [run.metrics[split].get(name) for split in splits], form)
        lines += _line(f"{title}, best possible", [(best.get(split) or {}).get(name) for split in splits], form)
    return [Table(["", *(NAMES[split] for split in splits)], lines)] if lines else []


def _line(title: str, values: list[Any], form: str) -> list[list[str]]:
    """None where no split has it."""
    return [[title, *(_shown(value, form) for value in values)]] if any(value is not None for value in values) else []


def remarks(run: RunRecord) -> list[str]:
    """What belongs to the metrics and is no metric of a split."""
    found = []
    if selected := run.metrics.get("selected"):
        stopped = f"; early stopping: {selected['stopped']}" if selected.get("stopped") else ""
        found.append(
            f"Metrics of the best checkpoint, step {selected['best_step']:,}, by {selected['metric']}{stopped}."
        )
    if wide := run.metrics.get("wide"):
        found.append(f"Linear part: {wide['nonzero']:,} of {wide['rows']:,} weights are not 0 ({wide['share']:.1%}).")
    if memory := (run.metrics.get("train") or {}).get("peak_memory_mb"):
        found.append(
            "Peak memory of a rank: " + ", ".join(f"{size:,} MB {kind}" for kind, size in memory.items()) + "."
        )
        found.append("Training: rows of the last epoch, each scored before it was trained.")
    found += slowdown(run)
    if run.metrics.get("best"):
        found.append("Best possible: what the true click probabilities reach (data.probability).")
    if run.unreadable:
        found.append(f"{run.unreadable:,} lines of metrics.jsonl could not be read.")
    return found


def slowdown(run: RunRecord) -> list[str]:
    """Said where throughput fell within the run and stayed down. (Its first line fills caches and pools.)"""
    if (history := run.histories.get("train")) is None:
        return []
    rates, steps = history.column("samples_per_second")[1:], history.column("step")[1:]
    known = np.isfinite(rates)
    collapse = find_collapse(rates[known])
    if collapse is None:
        return []
    where = f"after step {int(steps[known][collapse.place - 1]):,}"
    return [f"Throughput fell from {collapse.before:,.0f} to {collapse.after:,.0f} samples/s {where}: {CAUSE}."]


def counters(run: RunRecord) -> list[Table]:
    """What happened to values that do not fit, by column and split."""
    counts = {split: run.metrics[split]["data"] for split in SPLITS if (run.metrics.get(split) or {}).get("data")}
    lines = []
    for name in sorted({name for split in counts.values() for name in split}):
        column, _, what = name.rpartition(".")
        lines.append([column, what.replace("_", " "), *(f"{split.get(name, 0):,}" for split in counts.values())])
    titles = NAMES | {"valid": "valid, all evaluations"}
    return [Table(["column", "what", *(titles[split] for split in counts)], lines)] if lines else []


def clean(run: RunRecord) -> list[str]:
    """Said where a run has ended without any of ``counters``."""
    return [NOTHING_DROPPED] if run.metrics.get("train", {}).get("seconds") and not counters(run) else []


def environment(run: RunRecord) -> list[Table]:
    started, updated = (when(run.status.get(name)) for name in ("started", "updated"))
    facts = {"started": started, "last update": updated, "run folder": run.folder.resolve().name} | run.environment
    return [Table([], [[name, str(value)] for name, value in facts.items() if value])]


def when(stamp: str | None) -> str:
    """A time of ``status.json``, for people."""
    return "" if not stamp else datetime.datetime.fromisoformat(stamp).strftime("%Y-%m-%d %H:%M UTC")


def duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{seconds:.1f} s"


def _ranking(run: RunRecord, splits: list[str]) -> list[tuple[str, str, str]]:
    """Metrics and qualities of requests, whose names depend on ``evaluation.top_k``."""
    names = dict.fromkeys(name for split in splits for name in run.metrics[split])
    return [(name, name, ".4f") for name in names if name == "mrr" or "@" in name]


def _shown(value: Any, form: str) -> str:
    if not isinstance(value, (int, float)):
        return "–"
    return format(int(value) if form.endswith("d") else value, form)
