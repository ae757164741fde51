"""Statistics of activations over the rows of the global batch, for batch normalisation and Dice, and normalisation itself.

Rows of weight 0 (padding, rows left out) stay out of the statistics. Forward and backward of the sums walk over the rows in
pieces that stay in a CPU's cache and keep nothing but the input.

Shapes: N rows or tokens, C channels.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from data_loaders.schema import one_of

PIECE = 2048  # rows; with 64 channels half a MB of float32


def identity(tensor: Tensor) -> Tensor:
    return tensor


class BatchStatistics(nn.Module):
    """Mean and variance of the batch in training, their moving averages in evaluation (the plain average of the first
    1 / momentum batches, so that a short run is not held to the initial values).

    ``all_reduce`` is called once a training forward with a flat float32 tensor [2C + 1] (count, sums, sums of squares, of
    values shifted by the moving mean, which keeps float32 accurate). With a differentiable sum over ranks (``reduce_by``) the
    statistics are those of the global batch. Every rank must then call it equally often, so one without any rows does too.
    """

    def __init__(self, channels: int, *, eps: float, momentum: float) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("moving_mean", torch.zeros(channels))
        self.register_buffer("moving_variance", torch.ones(channels))
        self.register_buffer("batches", torch.zeros(()))
        self.all_reduce: Callable[[Tensor], Tensor] = identity

    def reduce_by(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        self.all_reduce = all_reduce

    def statistics(self, inputs: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance, [C] each, to normalise ``inputs`` [N, C] by; rows where ``valid`` [N] is not positive stay
        out of them."""
        if not self.training:
            return self.moving_mean, self.moving_variance
        shift = self.moving_mean.clone()
        mask = None if valid is None else (valid > 0).to(shift.dtype)  # [N]
        sums = self.all_reduce(_Moments.apply(inputs, shift, mask))
        count, total, squares = sums.split((1, len(shift), len(shift)))
        seen = count.clamp(min=1)
        offset = total / seen
        mean, variance = shift + offset, (squares / seen - offset.square()).clamp(min=0)
        self._track(mean.detach(), self.tracked_variance(variance.detach(), count.detach()), count.detach())
        return mean, variance

    def tracked_variance(self, variance: Tensor, count: Tensor) -> Tensor:
        """What the moving average takes for the variance [C] of a batch of ``count`` [1] rows."""
        return variance

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        some = (count > 0).to(mean.dtype)  # [1]: a batch without rows says nothing
        self.batches += some.squeeze()
        rate = some * (1 / self.batches.clamp(min=1)).clamp(min=self.momentum)
        self.moving_mean.lerp_(mean, rate.expand_as(mean))
        self.moving_variance.lerp_(variance, rate.expand_as(variance))


class BatchNorm(BatchStatistics):
    """Batch normalisation (Ioffe and Szegedy, 2015, algorithms 1 and 2): ``weight (x - E[x]) / sqrt(Var[x] + eps) + bias``.

    As ``torch.nn.BatchNorm1d`` on the rows of all ranks that count: biased variance in training, the unbiased one for
    evaluation. ``momentum`` is PyTorch's.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Tensor:
        """``inputs`` [N, C], ``valid`` [N] -> [N, C] float32."""
        with torch.autocast(inputs.device.type, enabled=False):
            inputs = inputs.float()
            mean, variance = self.statistics(inputs, valid)
            return (inputs - mean) * (torch.rsqrt(variance + self.eps) * self.weight) + self.bias

    def tracked_variance(self, variance: Tensor, count: Tensor) -> Tensor:
        return variance * (count / (count - 1).clamp(min=1))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al., 2016, equation 4) of each row, in float32 under autocast, too."""

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Tensor:
        """``inputs`` [N, C] -> [N, C] float32. ``valid`` is of no concern to a row."""
        with torch.autocast(inputs.device.type, enabled=False):
            return super().forward(inputs.float())


class _Moments(torch.autograd.Function):
    """(inputs [N, C], shift [C], mask [N] or None) -> [2C + 1]: the count, ``sum x`` and ``sum x^2`` of x = inputs - shift
    over the rows that the mask leaves."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, shift: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, shift, mask)
        sums = shift.new_zeros(2, len(shift))
        for rows in pieces(inputs):
            x = _masked(inputs[rows].float() - shift, mask, rows)
            sums[0] += x.sum(0)
            sums[1] += x.square_().sum(0)
        count = mask.sum() if mask is not None else shift.new_full((), len(inputs))
        return torch.cat((count.reshape(1), sums.flatten()))

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        inputs, shift, mask = ctx.saved_tensors
        _, of_total, of_squares = gradient.split((1, len(shift), len(shift)))
        result = torch.empty_like(inputs)
        for rows in pieces(inputs):
            x = inputs[rows].float() - shift
            result[rows] = _masked(x.mul_(2 * of_squares).add_(of_total), mask, rows)
        return result, None, None


def pieces(rows: Tensor) -> Iterator[slice]:
    """Slices over the rows; one for all on a GPU, where a launch costs more than memory."""
    step = PIECE if rows.device.type == "cpu" else max(len(rows), 1)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _masked(values: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
    return values if mask is None else values.mul_(mask[rows].unsqueeze(1))


NORMALIZATIONS = ("none", "batch", "layer")


def build_normalization(name: str, channels: int) -> nn.Module:
    one_of(name, NORMALIZATIONS, "model.normalization")
    if name == "batch":
        return BatchNorm(channels)
    return LayerNorm(channels) if name == "layer" else nn.Identity()


def normalize(normalization: nn.Module, inputs: Tensor, valid: Tensor | None) -> Tensor:
    return inputs if isinstance(normalization, nn.Identity) else normalization(inputs, valid)
