"""All metrics of an evaluation: fixed sums always, and those by group that the configuration asks for."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from trainer.config.evaluation import EvaluationConfig
from trainer.metrics.click_metrics import ClickMetrics, relative_improvement
from trainer.metrics.grouped import GroupAUC, Groups, Slices
from trainer.metrics.qualities import ItemFacts, Qualities
from trainer.metrics.ranking import Ranking
from trainer.metrics.shuffle_by_key import KeyedRows
from trainer.modules.task import TaskOutput
from trainer.runtime.distributed import all_reduce_sum

Texts = Callable[[str, list[int]], Mapping[int, str | None]]


class EvaluationMetrics:
    """``update`` with the outputs of each batch, whose ``keys`` are those of ``options.columns``; then ``compute``, on all
    ranks together. ``texts(column, keys)``: the values that keys stand for, the same on every rank; ``items``: what is known
    of items besides, without which novelty and cosines are left out."""

    def __init__(
        self, options: EvaluationConfig, device: torch.device, texts: Texts, items: ItemFacts | None = None
    ) -> None:
        self._options, self._texts, self._items = options, texts, items or ItemFacts()
        self._sums = ClickMetrics(device=device, calibration_bins=options.calibration_bins)
        self._rows = KeyedRows(options.memory_mb << 20) if options.columns else None
        self.distribution: dict[str, Any] = {}  # of the scores, once computed

    def update(self, outputs: TaskOutput) -> None:
        self._sums.update(outputs.logits, outputs.labels, outputs.weights)
        if self._rows is not None:
            self._rows.update(outputs.logits, outputs.labels, outputs.weights, outputs.group_ids)

    def compute(self) -> dict[str, Any]:
        """Raises ``UserError``, on every rank alike, when a logit was NaN."""
        options = self._options
        sums = self._sums.over_ranks(all_reduce_sum)
        values: dict[str, Any] = sums.compute()
        self.distribution = sums.distribution()
        if options.base_auc is not None and values["auc"] is not None:
            values["relaimpr"] = relative_improvement(values["auc"], options.base_auc)
        slices = {}
        for number, column in enumerate(options.columns):
            found = self._by_group(number, column)
            if "slices" in found:
                slices[column] = found.pop("slices")
            values |= found
        return values | ({"slices": slices} if slices else {})

    def _by_group(self, number: int, column: str) -> dict[str, Any]:
        """What is asked for by this column; its rows are dealt out once."""
        metrics = self._metrics_of(column)
        if not metrics:
            return {}
        columns = self._options.columns
        others = self._options.qualities.columns if column == self._options.request else ()
        for part, rows in self._rows.parts(number, [columns.index(name) for name in others]):
            groups = Groups.of(rows)
            for metric in metrics:
                metric.add(part, groups)
        return {name: value for metric in metrics for name, value in metric.values(self._rows.num_parts).items()}

    def _metrics_of(self, column: str) -> list[GroupAUC | Ranking | Qualities | Slices]:
        options = self._options
        metrics: list[GroupAUC | Ranking | Qualities | Slices] = []
        if column == options.group_by:
            metrics.append(GroupAUC())
        if column == options.request:
            metrics.append(Ranking(options.top_k))
            if options.qualities.item:
                metrics.append(Qualities(options.top_k, self._items, category=bool(options.qualities.category)))
        if column in options.slices:
            metrics.append(Slices(partial(self._texts, column)))
        return metrics
