"""The one reader of run folders, for reports and comparisons: as much of their files as is there, and whole."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_loaders import safe_yaml
from data_loaders.state_files import read_json
from trainer.run_folder import read_status

PLACE = ("step", "rows_trained", "epoch")
CURVES = ("logloss", "auc", "gauc", "ne", "calibration", "samples_per_second", "input_wait_fraction")
FINAL = {"final": "train"}  # names of lines that ``metrics.json`` calls otherwise


@dataclass
class Course:
    """The lines of a split, in order of steps: of each its place, then ``names``. ``last`` is the newest one, whole."""

    names: Sequence[str] = CURVES
    lines: list[tuple[float, ...]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def column(self, name: str) -> NDArray[np.float64]:
        """float64 [lines], NaN where a line does not have it."""
        place = (*PLACE, *self.names).index(name)
        return np.array([line[place] for line in self.lines], np.float64)


@dataclass(frozen=True)
class Run:
    """``ended``: ``metrics.json``, of a run that is at its end. ``figures``: the same by split; of a run that has not ended
    those of the last lines. Files that are not there, or damaged, are empty."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    status: dict[str, Any]
    courses: dict[str, Course]
    ended: dict[str, Any]
    figures: dict[str, Any]
    alerts: list[dict[str, Any]]
    unreadable: int
    plan: list[dict[str, Any]]
    scores: dict[str, Any]
    tables: dict[str, Any]
    environment: dict[str, Any]

    @property
    def name(self) -> str:
        model, data = (self.config.get(part) or {} for part in ("model", "data"))
        return f"{model.get('name', 'a model')} on {data.get('name') or 'data'}"

    @property
    def rows_trained(self) -> int:
        return max((int(course.lines[-1][1]) for course in self.courses.values() if course.lines), default=0)


def read(folder: Path, names: Sequence[str] = CURVES) -> Run:
    """``names``: the metrics that courses hold. Raises ``ValueError`` for what is no run folder; a damaged file is passed over
    with a line on stderr."""
    text, config = read_config(folder)
    status, ended = read_status(folder), read_json(folder / "metrics.json", {})
    courses, told, unreadable = read_lines(folder / "metrics.jsonl", names)
    if status.get("state", "finished") != "finished":  # it goes on from an end: the figures of then are old
        ended = {}
    figures = {FINAL.get(split, split): course.last for split, course in courses.items() if course.last}
    return Run(
        folder=folder,
        config_text=text,
        config=config,
        status=status,
        courses=courses,
        ended=ended,
        figures=figures | ended,
        alerts=ended.get("alerts", told),
        unreadable=unreadable,
        plan=read_json(folder / "plan.json", []),
        scores=read_json(folder / "distributions.json", {}),
        tables=read_json(folder / "tables.json", {}),
        environment=read_json(folder / "environment.json", {}),
    )


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """``config.yaml`` as text and as a map. Raises ``ValueError`` where there is none."""
    path = folder / "config.yaml"
    try:
        text = path.read_bytes().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} has no config.yaml: give the folder of a run") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    config = safe_yaml.parse(text, str(path)) or {}
    if not isinstance(config, dict):
        raise ValueError(f"{path} cannot be read: it is no map of keys")
    return text, config


def read_lines(path: Path, names: Sequence[str] = CURVES) -> tuple[dict[str, Course], list[dict[str, Any]], int]:
    """By split its lines; all alerts; and how many lines could not be read. The last line may still be being written."""
    courses: dict[str, Course] = {}
    alerts: dict[str, dict[str, Any]] = {}
    unreadable = 0
    try:
        with open(path, "rb") as file:
            for text in file:
                if (line := _line(text)) is not None:
                    _take(courses, line, names)
                    alerts.update((alert["name"], alert) for alert in line["alerts"])
                elif text.endswith(b"\n"):
                    unreadable += 1
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        print(f"warning: {path} cannot be read ({error.strerror}) and is passed over", file=sys.stderr, flush=True)
    return courses, list(alerts.values()), unreadable


def _line(text: bytes) -> dict[str, Any] | None:
    """A line as the run wrote it, with its ``alerts``; None for any other."""
    try:
        line = json.loads(text) if text.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("split"), str) or type(line.get("step")) is not int:
        return None
    told = line.get("alerts")
    alerts = [alert for alert in told if isinstance(alert, dict)] if isinstance(told, list) else []
    return {**line, "alerts": [alert for alert in alerts if {"name", "message"} <= set(alert)]}


def _take(courses: dict[str, Course], line: Mapping[str, Any], names: Sequence[str]) -> None:
    """A run that was resumed trains steps again: what it wrote of them before is forgotten."""
    split, step = line["split"], line["step"]
    if split == "train":
        for course in courses.values():
            _forget(course.lines, step)
    course = courses.setdefault(split, Course(names))
    _forget(course.lines, step)
    course.lines.append(tuple(_number(line.get(name)) for name in (*PLACE, *names)))
    course.last = dict(line)


def _forget(lines: list[tuple[float, ...]], step: int) -> None:
    while lines and lines[-1][0] >= step:
        lines.pop()


def last_with(run: Run, key: str, splits: Iterable[str] = ("test", "valid", "train")) -> tuple[str, Any] | None:
    """The first of ``splits`` whose figures have ``key``, and its value."""
    for split in splits:
        if (run.figures.get(split) or {}).get(key):
            return split, run.figures[split][key]
    return None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
