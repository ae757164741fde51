"""Dice, the data adaptive activation of DIN (Zhou et al., 2018, "Deep Interest Network", equation 3).

Over a history's tokens it is the largest part of DIN's arithmetic and, written as plain operations, nearly all memory
traffic: some twenty tensors the size of its input a step. Here forward and backward walk over the rows in pieces that
stay in a CPU's cache and keep nothing but the input.

Shapes: N rows or tokens, C channels.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

PIECE = 2048  # rows; with 64 channels half a MB of float32


def identity(tensor: Tensor) -> Tensor:
    return tensor


class Dice(nn.Module):
    """``f(s) = p(s) * s + (1 - p(s)) * alpha * s`` with ``p(s) = sigmoid((s - E[s]) / sqrt(Var[s] + eps))``.

    Training uses the mean and variance of the batch, evaluation their moving averages (the plain average of the first
    1 / momentum batches, so that a short run is not held to the initial values).

    ``all_reduce`` is called once a forward with a flat float32 tensor [2C + 1] (count, sums, sums of squares, of values
    shifted by the moving mean, which keeps float32 accurate). A differentiable sum over ranks in its place makes the
    statistics those of the global batch. Every rank must then call it equally often, so one without any rows does too.
    """

    def __init__(self, channels: int, *, eps: float = 1e-8, momentum: float = 0.01) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.register_buffer("moving_mean", torch.zeros(channels))
        self.register_buffer("moving_variance", torch.ones(channels))
        self.register_buffer("batches", torch.zeros(()))
        self.all_reduce: Callable[[Tensor], Tensor] = identity

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Tensor:
        """``inputs`` [N, C]; rows where ``valid`` [N] is not positive stay out of the statistics -> [N, C]."""
        with torch.autocast(inputs.device.type, enabled=False):
            if self.training:
                mean, variance = self._batch_statistics(inputs, valid)  # [C], [C]
            else:
                mean, variance = self.moving_mean, self.moving_variance
            return _Gate.apply(inputs, mean, torch.rsqrt(variance + self.eps), self.alpha)

    def _batch_statistics(self, inputs: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        shift = self.moving_mean.clone()
        mask = None if valid is None else (valid > 0).to(shift.dtype)  # [N]
        sums = self.all_reduce(_Moments.apply(inputs, shift, mask))
        count, total, squares = sums.split((1, len(shift), len(shift)))
        seen = count.clamp(min=1)
        offset = total / seen
        mean, variance = shift + offset, (squares / seen - offset.square()).clamp(min=0)
        self._track(mean.detach(), variance.detach(), count.detach())
        return mean, variance

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        some = (count > 0).to(mean.dtype)  # [1]: a batch without rows says nothing
        self.batches += some.squeeze()
        rate = some * (1 / self.batches.clamp(min=1)).clamp(min=self.momentum)
        self.moving_mean.lerp_(mean, rate.expand_as(mean))
        self.moving_variance.lerp_(variance, rate.expand_as(variance))


class _Moments(torch.autograd.Function):
    """(inputs [N, C], shift [C], mask [N] or None) -> [2C + 1]: the count, ``sum x`` and ``sum x^2`` of x = inputs - shift
    over the rows that the mask leaves."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, shift: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, shift, mask)
        sums = shift.new_zeros(2, len(shift))
        for rows in _pieces(inputs):
            x = _masked(inputs[rows].float() - shift, mask, rows)
            sums[0] += x.sum(0)
            sums[1] += x.square_().sum(0)
        count = mask.sum() if mask is not None else shift.new_tensor(float(len(inputs)))
        return torch.cat((count.reshape(1), sums.flatten()))

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        inputs, shift, mask = ctx.saved_tensors
        _, of_total, of_squares = gradient.split((1, len(shift), len(shift)))
        result = torch.empty_like(inputs)
        for rows in _pieces(inputs):
            x = inputs[rows].float() - shift
            result[rows] = _masked(x.mul_(2 * of_squares).add_(of_total), mask, rows)
        return result, None, None


class _Gate(torch.autograd.Function):
    """(s [N, C], mean, scale, alpha, each [C]) -> ``s * (alpha + (1 - alpha) * p)``, ``p = sigmoid((s - mean) * scale)``."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, mean: Tensor, scale: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, mean, scale, alpha)
        result = torch.empty_like(inputs)
        for rows in _pieces(inputs):
            s = inputs[rows].float()
            p = ((s - mean).mul_(scale)).sigmoid_()
            result[rows] = p.mul_(1 - alpha).add_(alpha).mul_(s)
        return result

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs, mean, scale, alpha = ctx.saved_tensors
        result = torch.empty_like(inputs)
        of_mean, of_scale, of_alpha = mean.new_zeros(3, len(mean))
        for rows in _pieces(inputs):
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


def _pieces(rows: Tensor) -> Iterator[slice]:
    """Slices over the rows; one for all on a GPU, where a launch costs more than memory."""
    step = PIECE if rows.device.type == "cpu" else max(len(rows), 1)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _masked(values: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
    return values if mask is None else values.mul_(mask[rows].unsqueeze(1))
