"""All metrics of an evaluation: fixed sums always, and those by group that the configuration asks for."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from trainer.config.evaluation import EvaluationConfig
from trainer.metrics.click_metrics import ClickMetrics, relative_improvement
from trainer.metrics.grouped import GroupAUC, Groups, Slices
from trainer.metrics.ranking import Ranking
from trainer.metrics.shuffle_by_key import KeyedRows
from trainer.modules.task import TaskOutput
from trainer.runtime.distributed import all_reduce_sum

Texts = Callable[[str, list[int]], Mapping[int, str | None]]


class EvaluationMetrics:
    """``update`` with the outputs of each batch, whose ``keys`` are those of ``options.columns``; then ``compute``, on all
    ranks together. ``texts(column, keys)``: the values that keys stand for, the same on every rank."""

    def __init__(self, options: EvaluationConfig, device: torch.device, texts: Texts) -> None:
        self._options, self._texts = options, texts
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
        metrics: list[GroupAUC | Ranking | Slices] = []
        if column == self._options.group_by:
            metrics.append(GroupAUC())
        if column == self._options.request:
            metrics.append(Ranking(self._options.top_k))
        if column in self._options.slices:
            metrics.append(Slices(partial(self._texts, column)))
        for part, rows in self._rows.parts(number):
            groups = Groups.of(rows)
            for metric in metrics:
                metric.add(part, groups)
        return {name: value for metric in metrics for name, value in metric.values(self._rows.num_parts).items()}
