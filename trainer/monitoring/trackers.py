"""Where else the metrics of a run are seen: TensorBoard, MLflow, Weights & Biases.

``metrics.jsonl`` has every line, whatever becomes of these. A thread of rank 0's own logs to them, so that a slow server
holds no training up, and one that fails is given up with a warning. A resumed run continues the same MLflow and
Weights & Biases run, by its id in ``trackers.json`` of the run folder. Servers, projects and keys are these programs' own
environment variables (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``, ``WANDB_PROJECT``, ``WANDB_API_KEY`` …): no key
stands in a configuration.
"""

import contextlib
import importlib
import importlib.util
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import yaml

from data_loaders.errors import UserError
from data_loaders.messages import warn
from data_loaders.state_files import read_json, write_json
from trainer.config.monitoring import LoggingConfig

CLOSE_SECONDS = 30.0  # for what is left to send when a run ends
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
IDS = "trackers.json"
PARAMETERS_AT_ONCE, PARAMETER_LENGTH = 100, 500  # what every MLflow server takes
LEFT_OUT = ("slices", "alerts")  # one figure for each of a column's values; text
NOT_A_NAME = re.compile(r"[^\w\-./ ]")  # MLflow refuses others


class Tracker(Protocol):
    """Raises what it likes: it is given up then."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def text(self, message: str, step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path, tree: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        # What a resumed run will train again is left out of the curves.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=10)
        self.writer.add_text("config", f"```\n{_yaml(tree)}```", step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, message: str, step: int) -> None:
        self.writer.add_text("alerts", message, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class MLflow:
    def __init__(self, folder: Path, tree: Mapping[str, Any], step: int) -> None:
        self.mlflow = importlib.import_module("mlflow")
        run_id = _ids(folder).get("mlflow")
        named = {"run_id": run_id} if run_id else {"run_name": _name(folder)}
        self.run_id = self.mlflow.start_run(**named).info.run_id
        _remember(folder, "mlflow", self.run_id)
        self.mlflow.log_dict(dict(tree), "config.yaml")
        if not run_id:  # they are for good, and a resumed run may have a few of another value
            given = list(_parameters(tree).items())
            for first in range(0, len(given), PARAMETERS_AT_ONCE):
                self.mlflow.log_params(dict(given[first : first + PARAMETERS_AT_ONCE]))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(values), step=step, run_id=self.run_id)

    def text(self, message: str, step: int) -> None:
        self.mlflow.set_tag(f"alert.step-{step}", message)

    def close(self, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


class WeightsAndBiases:
    def __init__(self, folder: Path, tree: Mapping[str, Any], step: int) -> None:
        self.wandb = importlib.import_module("wandb")
        run_id = _ids(folder).get("wandb")
        named = {"id": run_id, "resume": "allow"} if run_id else {"name": _name(folder)}
        self.run = self.wandb.init(dir=str(folder), config=dict(tree), **named)
        _remember(folder, "wandb", self.run.id)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def text(self, message: str, step: int) -> None:
        self.run.alert(title="training", text=message)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


KINDS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


class Trackers:
    """Logs to trackers, made by ``makers`` in a thread of its own while entered; without any, nothing."""

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]]) -> None:
        self._makers = makers
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._failed = False

    def __enter__(self) -> "Trackers":
        if self._makers:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def log(self, split: str, values: Mapping[str, Any], step: int) -> None:
        """Every number of a line of metrics, as ``split/name``."""
        named = {f"{split}/{name}": value for name, value in numbers(values)}
        messages = [alert["message"] for alert in values.get("alerts", ())]

        def log(tracker: Tracker) -> None:
            tracker.scalars(named, step)
            for message in messages:
                tracker.text(message, step)

        if self._makers:
            self._waiting.put(log)

    def close(self, *, failed: bool = False) -> None:
        """Waits ``CLOSE_SECONDS`` for what is left to send."""
        if not self._thread.is_alive():
            return
        self._failed = failed
        self._waiting.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            _warn(f"{' and '.join(self._makers)} did not take everything within {CLOSE_SECONDS:.0f} s")

    def _work(self) -> None:
        made: dict[str, Tracker] = {}
        for name, make in self._makers.items():
            with _given_up(name):
                made[name] = make()
        while (log := self._waiting.get()) is not None:
            for name in list(made):
                tracker = made.pop(name)
                with _given_up(name):
                    log(tracker)
                    made[name] = tracker
            made = {name: made[name] for name in self._makers if name in made}
        for name, tracker in made.items():
            with _given_up(name):
                tracker.close(self._failed)


def make_trackers(config: LoggingConfig, folder: Path, tree: Mapping[str, Any], step: int, *, here: bool) -> Trackers:
    """The trackers of the configuration where ``here`` (rank 0). ``step``: made so far."""
    names = chosen(config) if here else []
    return Trackers({name: partial(KINDS[name], folder, tree, step) for name in names})


def check_installed(config: LoggingConfig) -> None:
    """Raises ``UserError`` for a tracker that was asked for and is not installed."""
    for name in chosen(config):
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"logging.{name}=true, but the package '{PACKAGES[name]}' is not installed: pip install {PACKAGES[name]}, or "
                f"set logging.{name}=false"
            )


def chosen(config: LoggingConfig) -> list[str]:
    return [name for name in KINDS if getattr(config, name)]


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Names and values of all numbers, those of parts as ``part/name``; what is not known is left out."""
    for name, value in values.items():
        if isinstance(value, Mapping) and name not in LEFT_OUT:
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield NOT_A_NAME.sub("_", f"{prefix}{name}"), value


@contextlib.contextmanager
def _given_up(name: str) -> Iterator[None]:
    """A tracker that fails gets nothing any more; no run ends by it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a server or its client raises
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        _warn(f"{name} gets nothing more of this run ({type(error).__name__}: {first.strip()[:300]})")


def _warn(message: str) -> None:
    warn(f"{message}; metrics.jsonl has all of it")


def _name(folder: Path) -> str:
    """<name>/<date-time>, as the run folder has it."""
    return f"{folder.parent.name}/{folder.name}"


def _ids(folder: Path) -> dict[str, str]:
    return {name: run_id for name, run_id in read_json(folder / IDS, {}).items() if isinstance(run_id, str)}


def _remember(folder: Path, name: str, run_id: str) -> None:
    write_json(folder / IDS, {**_ids(folder), name: run_id})


def _parameters(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """What runs are compared by: ``{"optim.dense.lr": "0.001"}``, of all keys but the data's columns and tables."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= {} if name == "data.schema" else _parameters(value, f"{name}.")
        else:
            found[NOT_A_NAME.sub("_", name)] = str(value)[:PARAMETER_LENGTH]
    return found


def _yaml(tree: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
