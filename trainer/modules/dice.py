"""Dice, the data adaptive activation of DIN (Zhou et al., 2018, "Deep Interest Network", equation 3).

Over a history's tokens it is the largest part of DIN's arithmetic and, written as plain operations, nearly all memory
traffic: some twenty tensors the size of its input a step. Here forward and backward walk over the rows in pieces that
stay in a CPU's cache and keep nothing but the input.

Shapes: N rows or tokens, C channels.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from trainer.modules.normalization import BatchStatistics, pieces


class Dice(BatchStatistics):
    """``f(s) = p(s) * s + (1 - p(s)) * alpha * s`` with ``p(s) = sigmoid((s - E[s]) / sqrt(Var[s] + eps))``, the mean and
    variance those of the batch in training, their moving averages in evaluation."""

    def __init__(self, channels: int, *, eps: float = 1e-8, momentum: float = 0.01) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.alpha = nn.Parameter(torch.zeros(channels))

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Tensor:
        """``inputs`` [N, C]; rows where ``valid`` [N] is not positive stay out of the statistics -> [N, C]."""
        with torch.autocast(inputs.device.type, enabled=False):
            mean, variance = self.statistics(inputs, valid)  # [C], [C]
            return _Gate.apply(inputs, mean, torch.rsqrt(variance + self.eps), self.alpha)


class _Gate(torch.autograd.Function):
    """(s [N, C], mean, scale, alpha, each [C]) -> ``s * (alpha + (1 - alpha) * p)``, ``p = sigmoid((s - mean) * scale)``."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, mean: Tensor, scale: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, mean, scale, alpha)
        result = torch.empty_like(inputs)
        for rows in pieces(inputs):
            s = inputs[rows].float()
            p = ((s - mean).mul_(scale)).sigmoid_()
            result[rows] = p.mul_(1 - alpha).add_(alpha).mul_(s)
        return result

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs, mean, scale, alpha = ctx.saved_tensors
        result = torch.empty_like(inputs)
        of_mean, of_scale, of_alpha = mean.new_zeros(3, len(mean))
        for rows in pieces(inputs):
            s, g = inputs[rows].float(), gradient[rows].float()
            centred = s - mean
            p = (centred * scale).sigmoid_()
            gs = g * s
            of_alpha += (gs * (1 - p)).sum(0)
            slope = (p * (1 - p)).mul_(gs).mul_(1 - alpha)  # d loss / d ((s - mean) * scale)
            of_mean -= slope.sum(0)
            of_scale += (slope * centred).sum(0)
            result[rows] = p.mul_(1 - alpha).add_(alpha).mul_(g).add_(slope.mul_(scale))
        return result, of_mean * scale, of_scale, of_alpha
