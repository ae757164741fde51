"""Model and loss as the training pipeline steps them: ``batch -> (loss, outputs)``.

B is the number of rows of this rank. The pipeline traces ``forward`` symbolically down to the embedding collections,
so it stays straight-line; whatever computes is inside a sub-module.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_loaders.batch import Batch, Cursor


class TaskOutput(NamedTuple):
    """What a step leaves for metrics and progress: ``loss`` [] is this rank's, its mean over ranks that of the global
    batch; ``logits``, ``labels``, ``weights`` [B] (weight 0: padding). Nothing here keeps the graph alive."""

    loss: Tensor
    logits: Tensor
    labels: Tensor
    weights: Tensor
    cursor: Cursor


class WeightedLogLoss(nn.Module):
    """``sum(weights * binary cross-entropy) / normalizer`` in float32.

    ``mean_over_ranks`` is put in where normalizers differ between ranks (see ``Batch.normalizer``). A global batch
    without any row that counts has loss 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mean_over_ranks: Callable[[Tensor], Tensor] | None = None

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor, normalizer: Tensor) -> Tensor:
        losses = functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")  # [B]
        if self.mean_over_ranks is not None:
            normalizer = self.mean_over_ranks(normalizer)
        return (losses * weights).sum() / normalizer.clamp(min=torch.finfo(torch.float32).tiny)


class StepGuard(nn.Module):
    """A look at each training step between forward and backward.

    ``check(loss, logits, cursor)`` is put in from outside. What it raises ends the step before any table is touched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.check: Callable[[Tensor, Tensor, Cursor], None] | None = None

    def forward(self, loss: Tensor, logits: Tensor, cursor: Cursor) -> None:
        if self.training and self.check is not None:
            self.check(loss.detach(), logits.detach(), cursor)


class ClickTask(nn.Module):
    """A model (``forward(batch) -> logits [B]``), its loss, and what guards a step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = WeightedLogLoss()
        self.guard = StepGuard()

    def forward(self, batch: Batch) -> tuple[Tensor, TaskOutput]:
        logits = self.model(batch)  # [B]
        loss = self.loss(logits, batch.labels, batch.weights, batch.normalizer)
        self.guard(loss, logits, batch.cursor)
        return loss, TaskOutput(loss.detach(), logits.detach(), batch.labels, batch.weights, batch.cursor)
