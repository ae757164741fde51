"""What a run says while it goes: a progress line, ``metrics.jsonl`` (and trackers), warnings, the final table."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data_loaders.errors import UserError
from data_loaders.loader import Loader
from data_loaders.messages import program
from trainer.checkpoint import Reader
from trainer.checkpoint.piece import Piece, whole_piece
from trainer.metrics.click_metrics import ClickMetrics
from trainer.metrics.scored_rows import CollectedRows
from trainer.modules.task import TaskOutput
from trainer.monitoring.alerts import FACTS as ALERTS_FACTS
from trainer.monitoring.alerts import Alerts, say
from trainer.monitoring.feature_coverage import FeatureCoverage
from trainer.monitoring.progress_bar import ProgressBar
from trainer.monitoring.stragglers import StragglerMeter
from trainer.monitoring.trackers import Trackers
from trainer.runtime.checked_json import Whole, check_form
from trainer.runtime.distributed import Ranks, all_reduce_sum, from_first, peak_memory_mb, sum_counters
from trainer.runtime.progress import Progress
from trainer.runtime.run_folder import LINES, REPORT, append_json_line

WINDOW_BINS = 1 << 14
FACTS = {"epoch": Whole(-1), "last": dict, "alerts": dict}
SHOWN = ("auc", "logloss", "ne", "calibration")  # in a checkpoint's facts


class MetricsLogger:
    """Collects the training metrics of the window since the last report and of the current epoch.

    All ranks take part in a report (metrics are reduced); rank 0 writes and draws. ``alerts`` looks at each line, and
    ``trackers`` get it too; those of training name ``stragglers``.
    """

    def __init__(
        self,
        folder: Path,
        loader: Loader,
        total_steps: int,
        every_steps: int,
        ranks: Ranks,
        alerts: Alerts | None = None,
        stragglers: StragglerMeter | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        self.path = folder / LINES
        self.loader, self.every_steps, self.ranks = loader, every_steps, ranks
        self.window = ClickMetrics(num_bins=WINDOW_BINS, device=ranks.device)
        self.epoch = ClickMetrics(device=ranks.device)
        self._rows = CollectedRows(self.window.add, self.epoch.add)
        self._epoch_number = -1
        self._last: dict[str, Any] = {}  # metrics of each split, when they were last computed
        self._started = self._window_started = time.perf_counter()
        self._trained = self._window_rows = self._window_steps = 0
        self._outside = 0.0
        self._window_wait = 0.0
        self._line = ProgressBar(total_steps, quiet=not ranks.is_first)
        self.alerts, self.stragglers, self.trackers = alerts, stragglers, trackers
        self._early: list[dict[str, Any]] | None = None  # warnings of the first step; None before it

    def begin(self) -> None:
        """Training begins: the time before, of building and loading, is none of it."""
        self._started = self._window_started = time.perf_counter()
        self._outside = 0.0

    def snapshot(self) -> list[Piece]:
        """The sums of the rows trained so far, over all ranks, for rank 0 to save."""
        pieces = []
        self._rows.flush()
        for name, metrics in self._metrics().items():
            sums = all_reduce_sum(metrics.sums.clone())
            pieces.append(Piece(f"metrics/{name}", tuple(sums.shape), (0,), sums, written=self.ranks.is_first))
        return pieces

    def facts(self) -> dict[str, Any]:
        alerts = self.alerts.facts() if self.alerts is not None else {}
        return {"epoch": self._epoch_number, "last": self._last, "alerts": alerts}

    def restore(self, facts: Mapping[str, Any], reader: Reader) -> None:
        """Goes on with saved sums, which rank 0 takes over."""
        self._epoch_number, self._last = facts["epoch"], dict(facts["last"])
        if self.alerts is not None:
            check_form(facts["alerts"], ALERTS_FACTS, f"checkpoint {reader.path}: state.json: metrics.alerts")
            self.alerts.restore(facts["alerts"])
        self._rows.clear()
        for metrics in self._metrics().values():
            metrics.reset()
        from_first(lambda: self._read_sums(reader))

    def _read_sums(self, reader: Reader) -> None:
        """Raises ``UserError`` where they are not those of such metrics."""
        sums = {f"metrics/{name}": metrics.sums for name, metrics in self._metrics().items()}
        reader.load([whole_piece(name, values) for name, values in sums.items()])
        for name, values in sums.items():
            if not (torch.isfinite(values).all() and (values >= 0).all()):
                raise UserError(f"checkpoint {reader.path}: {name} holds what no sum of counts can be")

    def _metrics(self) -> dict[str, ClickMetrics | FeatureCoverage]:
        metrics: dict[str, ClickMetrics | FeatureCoverage] = {"window": self.window, "epoch": self.epoch}
        return metrics if self.alerts is None else metrics | {"seen": self.alerts.coverage}

    def _of(self, metrics: ClickMetrics) -> dict[str, Any]:
        """Of all rows so far, over all ranks."""
        self._rows.flush()
        return metrics.compute(all_reduce_sum)

    def update(self, outputs: TaskOutput, progress: Progress) -> None:
        if outputs.cursor.epoch != self._epoch_number:
            self._rows.flush()
            self.epoch.reset()
            self._epoch_number = outputs.cursor.epoch
        self._rows.update(outputs.logits, outputs.labels, outputs.weights)
        self._window_rows += outputs.cursor.rows
        self._window_steps += 1
        self._trained += outputs.cursor.rows
        self._line.step(progress)

    def is_due(self, progress: Progress) -> bool:
        """Whether ``maybe_report`` has something to say."""
        return self._early is None or progress.step % self.every_steps == 0

    def maybe_report(self, progress: Progress) -> None:
        """A line of ``metrics.jsonl`` every ``every_steps``. Raises ``UserError`` on all ranks when the loss is not finite."""
        if self._early is None:
            self._look_early(progress)
        if progress.step % self.every_steps == 0:
            self.report(progress)

    def _look_early(self, progress: Progress) -> None:
        """After the first step of this process: numbers that no model can take should not wait for the first line."""
        self._early = []
        if self.alerts is not None and self.alerts.config.enabled:
            values = self._of(self.window)
            self._early = self.alerts.first_look(values, progress.step, self.loader.magnitudes, all_reduce_sum)
            if self.ranks.is_first:
                say(self._early)

    def report(self, progress: Progress) -> None:
        values = self._of(self.window)
        elapsed = time.perf_counter() - self._window_started
        wait = self.loader.wait_seconds - self._window_wait
        values.update(samples_per_second=self._window_rows / elapsed, input_wait_fraction=wait / elapsed)
        if self.stragglers is not None:
            values.update(self.stragglers.report())
        self.write("train", values, progress)
        self._line.report(progress, values, elapsed / max(self._window_steps, 1))
        self.window.reset()
        self._window_rows = self._window_steps = 0
        self._window_started, self._window_wait = time.perf_counter(), self.loader.wait_seconds

    def write(self, split: str, values: Mapping[str, Any], progress: Progress, loader: Loader | None = None) -> None:
        """A line of ``metrics.jsonl``, and what it gives reason to warn of. ``loader``: of the rows that ``values`` are of,
        where they are not those trained. All ranks call it together."""
        self._last[split] = {"step": progress.step, **{name: values.get(name) for name in SHOWN}}
        values = {**values, **self._new_alerts(split, values, progress, loader or self.loader)}
        if self.ranks.is_first:
            if self.trackers is not None:
                self.trackers.log(split, values, progress.step)
            line = {
                "step": progress.step,
                "epoch": progress.epoch,
                "rows_trained": progress.rows,
                "split": split,
                **values,
            }
            append_json_line(self.path, line)

    def _new_alerts(self, split: str, values: Mapping[str, Any], progress: Progress, loader: Loader) -> dict[str, Any]:
        if self.alerts is None:
            return {}
        place = (progress.step, progress.epoch)
        counters = self.loader.counters
        new = self.alerts.consider(split, values, *place, counters, all_reduce_sum, loader.magnitudes)
        if self.ranks.is_first:
            say(new)
        early, self._early = self._early or [], self._early and []
        return {"alerts": [*early, *new]} if early or new else {}

    def outside(self, seconds: float) -> None:
        """Time spent in something else than training (evaluation, checkpoints), kept out of samples/s."""
        self._outside += seconds
        self._window_started += seconds

    def training_metrics(self) -> dict[str, Any]:
        """Progressive metrics of the last epoch (each row scored before it was trained), speed of the whole run."""
        seconds = max(time.perf_counter() - self._started - self._outside, 1e-9)
        values = self._of(self.epoch)
        return {
            **values,
            "rows_trained": self._trained,
            "samples_per_second": self._trained / seconds,
            "seconds": seconds,
            "input_wait_fraction": self.loader.wait_seconds / seconds,
            "peak_memory_mb": peak_memory_mb(self.ranks.device),
            "data": sum_counters(self.loader.counters),
        }

    def close(self) -> None:
        self._line.close()


def print_plan(rows: list[dict[str, Any]], most: int = 40) -> None:
    """The sharding plan: a line a table, the largest first."""
    table = Table(title="Sharding plan", title_justify="left")
    for column in ("table", "rows", "dim", "type", "kernel", "ranks", "MB by rank"):
        table.add_column(column, justify="right" if column in ("rows", "dim", "MB by rank") else "left", no_wrap=True)
    ordered = sorted(rows, key=lambda row: -sum(row["bytes"].values()))
    for row in ordered[:most]:
        megabytes = ", ".join(f"{size / 1e6:.1f}" for size in row["bytes"].values())
        ranks = ", ".join(map(str, row["ranks"]))
        table.add_row(
            row["table"], f"{row['rows']:,}", str(row["dim"]), row["sharding"], row["kernel"], ranks, megabytes
        )
    console = Console(stderr=True)
    console.print(table)
    if len(ordered) > most:
        console.print(f"… and {len(ordered) - most} smaller tables; all of them in plan.json")


def print_summary(final: Mapping[str, Any], folder: Path, report: bool) -> None:
    """The small table a run ends with."""
    train, best = final["train"], final.get("best", {})
    table = Table(title="Result", title_justify="left", show_header=False)
    table.add_row("rows trained", f"{train['rows_trained']:,}")
    table.add_row("samples/s", f"{train['samples_per_second']:,.0f}")
    for split in ("valid", "test"):
        if split in final:
            values = final[split]
            table.add_row(f"{split} AUC", _shown(values["auc"]) + _of_best(best.get(split), "auc"))
            if "gauc" in values:
                table.add_row(f"{split} GAUC", _shown(values["gauc"]))
            table.add_row(f"{split} log loss", _shown(values["logloss"]) + _of_best(best.get(split), "logloss"))
    if "wide" in final:
        wide = final["wide"]
        table.add_row("wide weights not 0", f"{wide['nonzero']:,} of {wide['rows']:,} ({wide['share']:.1%})")
    if best:
        table.add_row("best possible", "of the probabilities that the rows were drawn with: no model can do better")
    table.add_row("run folder", str(folder))
    if report:
        table.add_row("report", str(folder / REPORT))
    Console().print(table)
    print("Next:")  # below the table, which would break long lines: they are there to be copied
    run = shlex.quote(str(folder))
    for command in (f"evaluate {run}", f"predict {run} --input FILE --output FILE", f"compare {run} RUN"):
        print(f"  {program()} {command}")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.5f}"


def _of_best(best: Mapping[str, Any] | None, name: str) -> str:
    return f"   (best possible: {_shown(best[name])})" if best else ""
