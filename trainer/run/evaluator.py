"""Scoring held-out rows with the model in training: metrics over all ranks, without holding predictions."""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from data_loaders.loader import Loader
from data_loaders.manifest import Manifest
from data_loaders.reader import Handle, RowGroups
from trainer.config.evaluation import EvaluationConfig
from trainer.metrics.click_metrics import ClickMetrics
from trainer.metrics.evaluation_metrics import EvaluationMetrics
from trainer.metrics.qualities import ItemFacts
from trainer.modules.task import TaskOutput
from trainer.monitoring.metrics_logger import MetricsLogger
from trainer.report.record import Record
from trainer.runtime.distributed import Ranks, from_first, sum_counters
from trainer.runtime.progress import Progress
from trainer.sharding.pipeline import StepPipeline


def score(pipeline: StepPipeline, loader: Loader, alive: Callable[[], None] = lambda: None) -> Iterator[TaskOutput]:
    """Yields the outputs of every batch of ``loader`` in order, in evaluation mode. ``alive`` is called for each: scoring may
    take its time."""
    with contextlib.closing(loader.epoch(0)) as batches, pipeline.evaluation() as scoring:
        while True:
            alive()
            try:
                with torch.no_grad():
                    outputs = scoring.progress(batches)
            except StopIteration:
                return
            yield outputs


def evaluate(
    pipeline: StepPipeline,
    loader: Loader,
    options: EvaluationConfig,
    ranks: Ranks,
    *,
    under_way: bool = True,
    keep: Callable[[dict[str, Any]], None] = lambda distribution: None,
    alive: Callable[[], None] = lambda: None,
    items: ItemFacts | None = None,
) -> dict[str, Any]:
    """Metrics and speed on all rows of ``loader``, which has the group ids of ``options.columns``; the same on every rank.
    ``keep`` is given the distribution of the scores (``trainer.metrics.histograms``). ``items``: for novelty and cosines.

    A training pipeline may be ``under_way``: its batches in flight are kept. One that has not begun is left alone.
    """

    def texts(column: str, keys: list[int]) -> dict[int, str | None]:
        return from_first(lambda: loader.group_texts(column, keys))

    metrics = EvaluationMetrics(options, ranks.device, texts, items)
    started = time.perf_counter()
    if under_way:
        pipeline.detach()
    for outputs in score(pipeline, loader, alive):
        metrics.update(outputs)
    if under_way:
        # The batches in flight keep their input distribution. (To start it anew, attach's default, breaks sequence tables.)
        pipeline.attach(sparse_dist=False)
    values = metrics.compute()
    seconds = time.perf_counter() - started
    keep(metrics.distribution)
    return {
        **values,
        "samples_per_second": values["rows"] / seconds,
        "seconds": seconds,
        "data": sum_counters(loader.counters),
    }


class Evaluator:
    """Evaluates ``valid`` every ``options.every_steps`` steps, or at the end of each epoch."""

    def __init__(
        self,
        *,
        pipeline: StepPipeline,
        valid: Loader | None,
        options: EvaluationConfig,
        epoch_steps: int,
        logger: MetricsLogger,
        record: Record,
        ranks: Ranks,
        alive: Callable[[], None],
    ) -> None:
        self.pipeline, self.valid, self.options, self.epoch_steps = pipeline, valid, options, epoch_steps
        self.logger, self.record, self.ranks, self.alive = logger, record, ranks, alive
        self.last: tuple[int, dict[str, Any]] | None = None

    def is_due(self, progress: Progress) -> bool:
        every = self.options.every_steps
        due = progress.step % every == 0 if every else progress.epoch_step == self.epoch_steps
        return due and self.valid is not None

    def evaluate(self, progress: Progress) -> dict[str, Any]:
        """Metrics of ``valid`` at this step, computed and logged once."""
        assert self.valid is not None
        if self.last is None or self.last[0] != progress.step:
            values = self.score("valid", self.valid, progress.step)
            self.logger.outside(values["seconds"])
            self.logger.write("valid", values, progress, self.valid)
            self.last = (progress.step, values)
        return self.last[1]

    def score(self, split: str, loader: Loader, step: int) -> dict[str, Any]:
        """Metrics of a split with the weights of ``step``; the distribution of the scores is kept for the report."""
        keep = partial(self.record.scores, split, step)
        return evaluate(self.pipeline, loader, self.options, self.ranks, keep=keep, alive=self.alive)


def best_possible(manifest: Manifest, label: str, probability: str) -> dict[str, Any]:
    """AUC and log loss of the true click probability, where the data keeps it: no model can do better but by chance."""
    metrics = ClickMetrics()
    groups, handle = RowGroups(manifest, [label, probability], set()), Handle()
    for number in range(groups.count):
        for table in groups.read(number, 1 << 16, handle):
            true = torch.tensor(table[probability].to_numpy(), dtype=torch.float64)
            labels = torch.tensor(table[label].to_numpy(), dtype=torch.float32)
            metrics.update(torch.logit(true, eps=1e-12), labels, torch.ones_like(labels))
    values = metrics.compute()
    return {name: values[name] for name in ("auc", "logloss")}
