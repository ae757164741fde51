"""Model and loss as the training pipeline steps them: ``batch -> (loss, outputs)``.

B is the number of rows of this rank. The pipeline traces ``forward`` symbolically down to the embedding collections,
so it stays straight-line; whatever computes is inside a sub-module.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from data_loaders.batch import Batch, Cursor
from trainer.modules.contract import check_logits


class TaskOutput(NamedTuple):
    """What a step leaves for metrics and progress: ``loss`` [] is this rank's, its mean over ranks that of the global
    batch; ``logits``, ``labels``, ``weights`` [B] (weight 0: padding); ``group_ids`` [B, G] as in the batch. Nothing here
    keeps the graph alive."""

    loss: Tensor
    logits: Tensor
    labels: Tensor
    weights: Tensor
    cursor: Cursor
    group_ids: Tensor | None = None


class WeightedLogLoss(nn.Module):
    """``sum(weights * binary cross-entropy) / normalizer`` in float32.

    ``mean_over_ranks`` is given where normalizers differ between ranks (see ``Batch.normalizer``). A global batch without
    any row that counts has loss 0.

    ``label_smoothing`` ε: a click counts as 1 - ε / 2, none as ε / 2 (Szegedy et al., 2016, "Rethinking the Inception
    Architecture", section 7, with two classes).
    """

    def __init__(self, label_smoothing: float = 0.0, mean_over_ranks: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.label_smoothing, self.mean_over_ranks = label_smoothing, mean_over_ranks

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor, normalizer: Tensor) -> Tensor:
        labels = labels.float()
        if self.label_smoothing:
            labels = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        if self.mean_over_ranks is not None:
            normalizer = self.mean_over_ranks(normalizer.to(weights.device, non_blocking=True))
        shares = weights * normalizer.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()  # [B]
        return _CrossEntropy.apply(logits.float(), labels, shares)


class _CrossEntropy(torch.autograd.Function):
    """``Σ share · (log(1 + e^x) - x y)`` of logits x, labels y and shares, [B] each: 3 kernels forward and 4 backward, where
    PyTorch's own function takes twice as many. The gradient is share · (σ(x) - y)."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels, shares)
        losses = functional.softplus(logits).addcmul_(logits, labels, value=-1)  # [B]
        return torch.dot(losses, shares)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, shares = ctx.saved_tensors
        return torch.sigmoid(logits).sub_(labels).mul_(shares).mul_(gradient), None, None


class Outcome(nn.Module):
    """What a step leaves (``TaskOutput``).

    Where only a share w of the negatives is in the training data, scores are corrected for it: of a probability p learnt
    there, q = p / (p + (1 - p) / w) is that of all data (He et al., 2014, "Practical Lessons from Predicting Clicks on Ads
    at Facebook", section 6.3), which adds log w to the logit. Training itself, and its own metrics, are of the data as they
    are."""

    def __init__(self, negative_sampling_rate: float = 1.0) -> None:
        super().__init__()
        self.correction = math.log(negative_sampling_rate)

    def forward(self, loss: Tensor, logits: Tensor, batch: Batch) -> TaskOutput:
        logits = logits.detach() if self.training else logits.detach() + self.correction
        return TaskOutput(loss.detach(), logits, batch.labels, batch.weights, batch.cursor, batch.group_ids)


class LogitsCheck(nn.Module):
    """Whether what a model of ``model_class`` returns are logits (``trainer.modules.contract``)."""

    def __init__(self, model_class: type) -> None:
        super().__init__()
        self.model_class = model_class

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        check_logits(self.model_class, logits, labels, training=self.training)
        return logits


class ClickTask(nn.Module):
    """A model (``forward(batch) -> logits [B]``), its loss, and what a step leaves for metrics."""

    def __init__(
        self,
        model: nn.Module,
        *,
        label_smoothing: float = 0.0,
        negative_sampling_rate: float = 1.0,
        mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.logits_check = LogitsCheck(type(model))
        self.loss = WeightedLogLoss(label_smoothing, mean_over_ranks)
        self.outcome = Outcome(negative_sampling_rate)

    def forward(self, batch: Batch) -> tuple[Tensor, TaskOutput]:
        logits = self.logits_check(self.model(batch), batch.labels)  # [B]
        loss = self.loss(logits, batch.labels, batch.weights, batch.normalizer)
        return loss, self.outcome(loss, logits, batch)
