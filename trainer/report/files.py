"""The files of a run folder, read for its report: as much of them as is there yet."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

PLACE = ("step", "rows_trained", "epoch")
CURVES = ("logloss", "auc", "gauc", "ne", "calibration", "samples_per_second", "input_wait_fraction")
FINAL = {"final": "train"}  # names of lines that ``metrics.json`` calls otherwise


@dataclass
class Course:
    """The lines of a split, in order of steps. ``last`` is the newest one, whole."""

    lines: list[tuple[float, ...]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def column(self, name: str) -> NDArray[np.float64]:
        """float64 [lines], NaN where a line does not have it."""
        place = (*PLACE, *CURVES).index(name)
        return np.array([line[place] for line in self.lines], np.float64)


@dataclass(frozen=True)
class Run:
    """``figures``: by split, the metrics that the run ended with; of one that has not ended those of the last lines. Files that
    are not there are empty."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    status: dict[str, Any]
    courses: dict[str, Course]
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


def read(folder: Path) -> Run:
    """Raises ``ValueError`` for what is no run folder."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} has no config.yaml: give the folder of a run")
    text = (folder / "config.yaml").read_text()
    status, ended = _json(folder, "status.json", {}), _json(folder, "metrics.json", {})
    courses, told, unreadable = read_lines(folder / "metrics.jsonl")
    if status.get("state", "finished") != "finished":  # it goes on from an end: the figures of then are old
        ended = {}
    figures = {FINAL.get(split, split): course.last for split, course in courses.items() if course.last}
    return Run(
        folder=folder,
        config_text=text,
        config=yaml.safe_load(text) or {},
        status=status,
        courses=courses,
        figures=figures | ended,
        alerts=ended.get("alerts", told),
        unreadable=unreadable,
        plan=_json(folder, "plan.json", []),
        scores=_json(folder, "distributions.json", {}),
        tables=_json(folder, "tables.json", {}),
        environment=_json(folder, "environment.json", {}),
    )


def read_lines(path: Path) -> tuple[dict[str, Course], list[dict[str, Any]], int]:
    """By split its lines; all alerts; and how many lines could not be read. The last line may still be being written."""
    courses: dict[str, Course] = {}
    alerts: dict[str, dict[str, Any]] = {}
    unreadable = 0
    if not path.exists():
        return courses, [], 0
    with open(path, "rb") as file:
        for text in file:
            try:
                line = json.loads(text) if text.endswith(b"\n") else None
            except ValueError:
                unreadable += 1
                continue
            if isinstance(line, dict) and "split" in line:
                _take(courses, line)
                alerts.update((alert["name"], alert) for alert in line.get("alerts", ()))
    return courses, list(alerts.values()), unreadable


def _take(courses: dict[str, Course], line: Mapping[str, Any]) -> None:
    """A run that was resumed trains steps again: what it wrote of them before is forgotten."""
    split, step = line["split"], line["step"]
    if split == "train":
        for course in courses.values():
            _forget(course.lines, step)
    course = courses.setdefault(split, Course())
    _forget(course.lines, step)
    course.lines.append(tuple(_number(line.get(name)) for name in (*PLACE, *CURVES)))
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


def _json(folder: Path, name: str, default: Any) -> Any:
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else default
