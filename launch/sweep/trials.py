"""A trial: its values, its run folder, and what became of it, read from what the run itself wrote."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from data_loaders.secrets import redact_override
from data_loaders.state_files import read_json, write_json
from trainer.report.run_record import RunRecord

LOWER_IS_BETTER = ("logloss", "ne")
# ``open``: not at its end, so the same command resumes it.
STATES = ("open", "complete", "pruned", "failed")
RECORD, OUTPUT = "trial.json", "output.txt"

UNDEFINED = (
    "where valid's rows are all clicks or none, or no group has both, give it others, or sweep.metric=valid.logloss"
)


@dataclass(frozen=True)
class Trial:
    """``values``: override key -> value. ``value`` of the metric: at the end, or where it was stopped."""

    number: int
    values: dict[str, str]
    folder: Path
    state: str = "open"
    value: float | None = None
    reason: str | None = None
    seconds: float | None = None

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.values.items()]

    @property
    def shown(self) -> dict[str, str]:
        """``values`` as they may be written down and printed."""
        return {key: without_secret(key, value) for key, value in self.values.items()}

    def __str__(self) -> str:
        return f"trial {self.number} ({' '.join(f'{key}={value}' for key, value in self.shown.items())})"


def without_secret(key: str, value: str) -> str:
    """A value as it may be written down and printed."""
    return redact_override(f"{key}={value}").partition("=")[2]


def lower_is_better(metric: str) -> bool:
    return metric.rpartition(".")[2] in LOWER_IS_BETTER


def ranked(trials: list[Trial], metric: str) -> list[Trial]:
    """The best first, then those that were stopped, then those that failed or are open."""
    sign = 1 if lower_is_better(metric) else -1
    order = {"complete": 0, "pruned": 1, "failed": 2, "open": 3}
    worst = float("inf")
    return sorted(trials, key=lambda t: (order[t.state], worst if t.value is None else sign * t.value, t.number))


def best(trials: list[Trial], metric: str) -> Trial | None:
    complete = [trial for trial in ranked(trials, metric) if trial.state == "complete"]
    return complete[0] if complete else None


def folder_of(root: Path, number: int) -> Path:
    """Bears the sweep's name, too: ``checkpoint.root`` distinguishes runs by the names of their folders."""
    return root / f"{root.name}-{number:04d}"


def record(trial: Trial) -> None:
    """``trial.json`` in the run folder."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    facts = {name: getattr(trial, name) for name in ("number", "state", "value", "reason", "seconds")}
    write_json(trial.folder / RECORD, {**facts, "values": trial.shown})


def recorded(folder: Path, values: dict[str, str]) -> Trial | None:
    """What ``record`` has written of the trial of ``values`` (a secret among them is not written); None where that is not
    there, or damaged."""
    facts = read_json(folder / RECORD, {})
    whole = {field.name for field in fields(Trial)} == {*facts, "folder"} and facts["state"] in STATES
    return Trial(**{**facts, "folder": folder, "values": values}) if whole else None


def evaluations(folder: Path, metric: str) -> list[float]:
    """The metric at each evaluation so far."""
    return [value for _, value in RunRecord(folder, (metric.partition(".")[2],)).curve(metric)]


def outcome(trial: Trial, metric: str, code: int | None, pruned: bool) -> Trial:
    """The trial as its run folder records it; ``code``: the exit code (None: it was not started), ``pruned``: we stopped it."""
    run = RunRecord(trial.folder)
    state = run.status.get("state")
    if state == "finished" and (code in (None, 0) or pruned):
        value = run.final_value(metric)
        if value is None:
            reason = f"metrics.json has no {metric}: {UNDEFINED}"
            return replace(trial, state="failed", reason=reason)
        return replace(trial, state="complete", value=value, reason=None)
    if code is None:
        return replace(trial, state="open")
    if pruned:
        course = evaluations(trial.folder, metric)
        reason = f"stopped after {len(course)} evaluations"
        return replace(trial, state="pruned", value=course[-1] if course else None, reason=reason)
    if state == "preempted" or code in (130, 143, 138):
        return replace(trial, state="open", reason="someone asked it to stop")
    return replace(trial, state="failed", reason=failure(run, code))


def failure(run: RunRecord, code: int) -> str:
    """One line: what the run said last of an error."""
    output = run.folder / OUTPUT
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    said = [line.removeprefix("error: ") for line in lines if line.startswith(("error: ", "launch: rank "))]
    if said:
        return said[-1]
    known = run.status.get("reason") if run.status.get("state") == "failed" else None
    return known or f"exit code {code}: see {output}"
