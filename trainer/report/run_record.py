"""The one reader of run folders, of runs that have ended and of those that have not: as much as is there, and whole."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_loaders import safe_yaml
from data_loaders.errors import UserError
from data_loaders.messages import warn
from data_loaders.state_files import read_json
from trainer.runtime import run_folder

PLACE = ("step", "rows_trained", "epoch")
METRICS = ("logloss", "auc", "gauc", "ne", "calibration", "samples_per_second", "input_wait_fraction")
FINAL = {"final": "train"}  # splits of ``metrics.jsonl`` that ``metrics.json`` calls otherwise


@dataclass
class History:
    """The lines of one split by ascending step: of each ``PLACE``, then the metrics ``names``. ``last``: the newest, whole;
    empty where that was rewound."""

    names: Sequence[str]
    lines: list[tuple[float, ...]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def column(self, name: str) -> NDArray[np.float64]:
        """float64 [lines], NaN where a line does not have it."""
        place = (*PLACE, *self.names).index(name)
        return np.array([line[place] for line in self.lines], np.float64)

    def add(self, line: Mapping[str, Any]) -> None:
        self.rewind(line["step"])
        self.lines.append(tuple(_number(line.get(name)) for name in (*PLACE, *self.names)))
        self.last = dict(line)

    def rewind(self, step: int) -> None:
        """Drops ``step`` and all later ones: a run that was resumed trains them again."""
        while self.lines and self.lines[-1][0] >= step:
            self.lines.pop()
            self.last = {}


class RunRecord:
    """A run folder, each of its files read when it is first asked for. ``names``: the metrics of its histories. A file that is
    missing or damaged is empty (the latter with a line on stderr); only a missing configuration is an error."""

    def __init__(self, folder: Path, names: Sequence[str] = METRICS) -> None:
        self.folder, self._names = folder, tuple(names)

    @cached_property
    def config_text(self) -> str:
        """Raises ``UserError`` for what is no run folder."""
        path = self.folder / run_folder.CONFIG
        try:
            return path.read_bytes().decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.folder} has no {path.name}: give the folder of a run") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    @cached_property
    def config(self) -> dict[str, Any]:
        path = self.folder / run_folder.CONFIG
        config = safe_yaml.parse(self.config_text, str(path)) or {}
        if not isinstance(config, dict):
            raise UserError(f"{path} cannot be read: it is no map of keys")
        return config

    @property
    def name(self) -> str:
        model, data = (self.config.get(part) or {} for part in ("model", "data"))
        return f"{model.get('name', 'a model')} on {data.get('name') or 'data'}"

    @cached_property
    def status(self) -> dict[str, Any]:
        return run_folder.read_status(self.folder)

    @cached_property
    def final(self) -> dict[str, Any]:
        """``metrics.json``; empty of a run that was resumed after its end and has not ended again."""
        ended = self.status.get("state", "finished") == "finished"
        return read_json(self.folder / run_folder.METRICS, {}) if ended else {}

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """By split: ``final``, else the newest lines."""
        newest = {FINAL.get(split, split): history.last for split, history in self.histories.items() if history.last}
        return newest | self.final

    @cached_property
    def plan(self) -> list[dict[str, Any]]:
        return read_json(self.folder / run_folder.PLAN, [])

    @cached_property
    def scores(self) -> dict[str, Any]:
        return read_json(self.folder / run_folder.SCORES, {})

    @cached_property
    def tables(self) -> dict[str, Any]:
        return read_json(self.folder / run_folder.TABLES, {})

    @cached_property
    def environment(self) -> dict[str, Any]:
        return read_json(self.folder / run_folder.ENVIRONMENT, {})

    @property
    def histories(self) -> dict[str, History]:
        """By split."""
        return self._lines[0]

    @property
    def alerts(self) -> list[dict[str, Any]]:
        return self.final.get("alerts", self._lines[1])

    @property
    def unreadable(self) -> int:
        """Damaged lines of ``metrics.jsonl``."""
        return self._lines[2]

    @cached_property
    def _lines(self) -> tuple[dict[str, History], list[dict[str, Any]], int]:
        return _read_lines(self.folder / run_folder.LINES, self._names)

    @property
    def rows_trained(self) -> int:
        return max((int(history.lines[-1][1]) for history in self.histories.values() if history.lines), default=0)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(rows trained, value) of ``split.name`` wherever it is defined: what reports, comparisons and sweeps go by."""
        split, _, name = metric.partition(".")
        history = self.histories.get(split)
        if history is None or name not in history.names:
            return []
        rows, values = history.column("rows_trained"), history.column(name)
        defined = np.isfinite(rows) & np.isfinite(values)
        return list(zip(rows[defined].astype(int).tolist(), values[defined].tolist()))

    def final_value(self, metric: str) -> float | None:
        """``split.name`` of ``final``."""
        split, _, name = metric.partition(".")
        values = self.final.get(split)
        value = values.get(name) if isinstance(values, dict) else None
        return value if isinstance(value, (int, float)) else None

    def last_with(self, key: str, splits: Iterable[str] = ("test", "valid", "train")) -> tuple[str, Any] | None:
        """The first of ``splits`` whose metrics have ``key``, and its value."""
        for split in splits:
            if (self.metrics.get(split) or {}).get(key):
                return split, self.metrics[split][key]
        return None


def _read_lines(path: Path, names: Sequence[str]) -> tuple[dict[str, History], list[dict[str, Any]], int]:
    """By split its lines; all alerts; and how many lines could not be read. The last line may still be being written."""
    histories: dict[str, History] = {}
    alerts: dict[str, dict[str, Any]] = {}
    unreadable = 0
    try:
        with open(path, "rb") as file:
            for text in file:
                if (line := _line(text)) is not None:
                    _add(histories, line, names)
                    alerts.update((alert["name"], alert) for alert in line["alerts"])
                elif text.endswith(b"\n"):
                    unreadable += 1
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        warn(f"{path} cannot be read ({error.strerror}) and is passed over")
    return histories, list(alerts.values()), unreadable


def _line(text: bytes) -> dict[str, Any] | None:
    """A line as the run wrote it, with its ``alerts``; None for any other."""
    try:
        line = json.loads(text) if text.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("split"), str) or type(line.get("step")) is not int:
        return None
    given = line.get("alerts")
    alerts = [alert for alert in given if isinstance(alert, dict)] if isinstance(given, list) else []
    return {**line, "alerts": [alert for alert in alerts if {"name", "message"} <= set(alert)]}


def _add(histories: dict[str, History], line: Mapping[str, Any], names: Sequence[str]) -> None:
    """Training that was rewound rewinds all splits. (A line of test may be of an earlier step: that of the best checkpoint.)"""
    if line["split"] == "train":
        for history in histories.values():
            history.rewind(line["step"])
    histories.setdefault(line["split"], History(names)).add(line)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
