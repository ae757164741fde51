"""Dice, the data adaptive activation of DIN (Zhou et al., 2018, "Deep Interest Network", equation 3).

Shapes: N rows or tokens, C channels.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from trainer.modules.constants import constant
from trainer.modules.normalization import BatchStatistics, Rows, SumOverRanks, through_statistics


class Dice(BatchStatistics):
    """``f(s) = p(s) * s + (1 - p(s)) * alpha * s`` with ``p(s) = sigmoid((s - E[s]) / sqrt(Var[s] + eps))``, the mean and
    variance those of the batch in training, their moving averages in evaluation."""

    def __init__(self, channels: int, *, eps: float = 1e-8, momentum: float = 0.01) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.alpha = nn.Parameter(torch.zeros(channels))

    def forward(self, inputs: Tensor, valid: Tensor | Rows | None = None) -> Tensor:
        """``inputs`` [N, C]; rows where ``valid`` [N] is not positive stay out of the statistics -> [N, C]."""
        with torch.autocast(inputs.device.type, enabled=False):
            if not self.training:
                return (slope(self.moving_normalized(inputs).sigmoid(), self.alpha) * inputs).to(inputs.dtype)
            found = self.normalized(inputs, Rows.of(inputs, valid))
            return _Dice.apply(inputs, self.alpha, *found, self.all_reduce)


def slope(p: Tensor, alpha: Tensor) -> Tensor:
    """``p + (1 - p) alpha``, which ``f`` multiplies s by: [N, C]."""
    return torch.lerp(alpha, constant(1.0, alpha), p)


class _Dice(torch.autograd.Function):
    """(s [N, C], alpha [C], and ``BatchStatistics.normalized`` of s) -> ``s * (p + (1 - p) alpha)``, ``p = sigmoid(z)``, with
    the gradient through the statistics, in a quarter of the operations that autograd would take."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        inputs: Tensor,
        alpha: Tensor,
        normalized: Tensor,
        scale: Tensor,
        share: Tensor,
        all_reduce: SumOverRanks | None,
    ) -> Tensor:
        p = normalized.sigmoid()
        factor = slope(p, alpha)
        ctx.save_for_backward(inputs, alpha, normalized, scale, share, p, factor)
        ctx.all_reduce = all_reduce
        return torch.mul(factor, inputs, out=torch.empty_like(inputs))

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, alpha, normalized, scale, share, p, factor = ctx.saved_tensors
        of_alpha, of_normalized, moved = terms = p.new_empty(3, *p.shape)
        torch.sub(1, p, out=of_alpha).mul_(gradient).mul_(inputs)  # g s (1 - p)
        torch.sub(factor, alpha, out=of_normalized).mul_(of_alpha)  # dz: factor - alpha is p (1 - alpha)
        torch.mul(of_normalized, normalized, out=moved)
        sums = terms.sum(1)  # [3, C]
        if ctx.all_reduce is not None:
            ctx.all_reduce(sums[1:])
        of_inputs = through_statistics(of_normalized, normalized, sums[1:], share)
        direct = factor * gradient
        of_inputs = torch.addcmul(direct, of_inputs, scale, out=torch.empty_like(inputs))
        return of_inputs, sums[0], None, None, None, None
