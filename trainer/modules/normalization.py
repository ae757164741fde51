"""Statistics of activations over the rows of the global batch, for batch normalisation and Dice, and normalisation itself.

Rows of weight 0 (padding, rows left out) stay out of the statistics.

Shapes: N rows or tokens, C channels.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from data_loaders.schema import one_of
from trainer.modules import execution
from trainer.modules.execution import SumOverRanks


class Rows:
    """Which rows of a batch count in its statistics: all, or those where ``valid`` [N] is positive. What follows from that is
    computed when it is first asked for, once for all layers of a network."""

    def __init__(self, like: Tensor, valid: Tensor | None) -> None:
        self.num_rows, self.device, self.valid = like.shape[0], like.device, valid

    @classmethod
    def of(cls, like: Tensor, valid: "Tensor | Rows | None") -> "Rows":
        return valid if isinstance(valid, Rows) else cls(like, valid)

    @cached_property
    def mask(self) -> Tensor | None:
        """[N, 1], or None: all count."""
        return None if self.valid is None else (self.valid > 0).unsqueeze(1)

    @cached_property
    def count(self) -> Tensor:
        """How many there are: [] float32."""
        if self.mask is None:
            return torch.full((), float(self.num_rows), device=self.device)
        return self.mask.sum(dtype=torch.float32)

    @cached_property
    def some(self) -> Tensor | float:
        """1, or 0 where there are none: [] where only the device knows."""
        return float(self.num_rows > 0) if self.mask is None else self.count.clamp(max=1)

    @cached_property
    def share(self) -> Tensor:
        """``share_of`` their own number."""
        if self.mask is None:
            return torch.full((), 1 / max(self.num_rows, 1), device=self.device)
        return self.share_of(self.count)

    def share_of(self, count: Tensor) -> Tensor:
        """What each row counts in a mean over ``count`` [] rows: [], or [N, 1] with zeros where it does not."""
        seen = count.clamp(min=1)
        return seen.reciprocal() if self.mask is None else self.mask / seen


class BatchStatistics(nn.Module):
    """Mean and variance of the batch in training, their moving averages in evaluation (the plain average of the first
    1 / momentum batches, so that a short run is not held to the initial values).

    With a sum over ranks (``Execution``) the statistics are those of the global batch. It sums a flat float32 tensor in place,
    once a training forward ([2C + 1]: count, sums, sums of squares, of values shifted by the moving mean, which keeps float32
    accurate) and once a backward ([2, C]). Every rank must then call it equally often, so one without any rows does too.
    """

    def __init__(self, channels: int, *, eps: float, momentum: float) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("moving_mean", torch.zeros(channels))
        self.register_buffer("moving_variance", torch.ones(channels))
        self.register_buffer("batches", torch.zeros(()))
        self.all_reduce = execution.current().all_reduce

    def moving_normalized(self, inputs: Tensor) -> Tensor:
        """``inputs`` [N, C] normalised by the moving averages -> [N, C] float32."""
        mean, scale = self.moving_statistics()
        return (inputs - mean) * scale

    def moving_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and scale, [C] each."""
        return self.moving_mean, torch.rsqrt(self.moving_variance + self.eps)

    @torch.no_grad()
    def statistics_of(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and scale, [C] each, of the rows of all ranks, and how many they are, [], from this rank's ``sums`` [2C + 1]:
        its rows, and the sums of their values, shifted by the moving mean, and of the squares. Tracks them."""
        mean, variance, count = self._over_ranks(sums)
        self._track(mean, self.tracked_variance(variance, lambda: count), count.clamp(max=1))
        return mean, (variance + self.eps).rsqrt_(), count.clamp(min=1)

    @torch.no_grad()
    def normalized(self, inputs: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """``z = (x - E[x]) * scale``, ``scale = 1 / sqrt(Var[x] + eps)``, of ``inputs`` [N, C] by the global batch:
        z [N, C] float32, scale [C], and the share of each row in the mean and the variance, [] or [N, 1]."""
        some, share = rows.some, rows.share
        mean, centred, variance = _moments(inputs, share)
        if self.all_reduce is not None:
            count, offset = rows.count, mean - self.moving_mean
            sums = torch.cat((count.reshape(1), count * offset, count * (variance + offset.square())))
            mean, variance, count = self._over_ranks(sums)
            centred, some, share = inputs - mean, count.clamp(max=1), rows.share_of(count)
            self._track(mean, self.tracked_variance(variance, lambda: count), some)
        else:
            self._track(mean, self.tracked_variance(variance, lambda: rows.count), some)
        scale = (variance + self.eps).rsqrt_()
        return centred.mul_(scale), scale, share

    def _over_ranks(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [C], variance [C] and count [] of all ranks' rows together from ``sums`` [2C + 1] of this rank's."""
        if self.all_reduce is not None:
            self.all_reduce(sums)
        count, (total, squares) = sums[0], sums[1:].chunk(2)
        seen = count.clamp(min=1)
        offset = total / seen
        return self.moving_mean + offset, (squares / seen - offset.square()).clamp(min=0), count

    def tracked_variance(self, variance: Tensor, count: Callable[[], Tensor]) -> Tensor:
        """What the moving average takes for the variance [C] of a batch of ``count()`` [] rows."""
        return variance

    def _track(self, mean: Tensor, variance: Tensor, some: Tensor | float) -> None:
        """``some``: 0 for a batch without rows, which says nothing."""
        if isinstance(some, float) and not some:
            return
        self.batches += some
        seen = self.batches.clamp(1, 1 / self.momentum)
        rate = (seen.reciprocal_() if isinstance(some, float) else some / seen).expand_as(mean)
        torch._foreach_lerp_([self.moving_mean, self.moving_variance], [mean, variance], [rate, rate])


def _moments(inputs: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], values less the mean [N, C] and variance [C] of ``inputs`` [N, C], in float32."""
    values = inputs.float()
    if share.dim() == 0 and len(values):
        variance, mean = torch.var_mean(values, 0, correction=0)
        return mean, values - mean, variance
    mean = _weighted_sum(values, share)
    centred = values - mean
    return mean, centred, _weighted_sum(centred.square(), share)


def _weighted_sum(values: Tensor, share: Tensor) -> Tensor:
    """As a product with a vector, which is one operation."""
    return share.T.mm(values).squeeze(0) if share.dim() else values.sum(0) * share


def through_statistics(gradient: Tensor, normalized: Tensor, sums: Tensor, share: Tensor) -> Tensor:
    """Of z = ``normalized`` [N, C] with ``gradient`` dz: ``dz - share (sum dz + z sum (dz z))``, which times scale is the
    gradient of x. ``sums`` [2, C]: ``sum dz`` and ``sum (dz z)`` over the rows of all ranks."""
    through = torch.addcmul(sums[0], normalized, sums[1]).mul_(share)
    return torch.sub(gradient, through, out=through)


class _Normalize(torch.autograd.Function):
    """(x [N, C], and ``BatchStatistics.normalized`` of it) -> z [N, C]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        inputs: Tensor,
        normalized: Tensor,
        scale: Tensor,
        share: Tensor,
        all_reduce: SumOverRanks | None,
    ) -> Tensor:
        ctx.save_for_backward(normalized, scale, share)
        ctx.dtype, ctx.all_reduce = inputs.dtype, all_reduce
        return normalized.view_as(normalized)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        normalized, scale, share = ctx.saved_tensors
        sums = torch.stack((gradient, gradient * normalized)).sum(1)
        if ctx.all_reduce is not None:
            ctx.all_reduce(sums)
        found = through_statistics(gradient, normalized, sums, share).mul_(scale)
        return found.to(ctx.dtype), None, None, None, None


class BatchNorm(BatchStatistics):
    """Batch normalisation (Ioffe and Szegedy, 2015, algorithms 1 and 2): ``weight (x - E[x]) / sqrt(Var[x] + eps) + bias``.

    As ``torch.nn.BatchNorm1d`` on the rows of all ranks that count: biased variance in training, the unbiased one for
    evaluation. ``momentum`` is PyTorch's.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, inputs: Tensor, valid: Tensor | Rows | None = None) -> Tensor:
        """``inputs`` [N, C], ``valid`` [N] -> [N, C] float32."""
        with torch.autocast(inputs.device.type, enabled=False):
            if not self.training:
                return torch.addcmul(self.bias, self.moving_normalized(inputs), self.weight)
            found = self.normalized(inputs, Rows.of(inputs, valid))
            return torch.addcmul(self.bias, _Normalize.apply(inputs, *found, self.all_reduce), self.weight)

    def tracked_variance(self, variance: Tensor, count: Callable[[], Tensor]) -> Tensor:
        rows = count()
        return variance * (rows / (rows - 1).clamp(min=1))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al., 2016, equation 4) of each row, in float32 under autocast, too."""

    def forward(self, inputs: Tensor, valid: Tensor | Rows | None = None) -> Tensor:
        """``inputs`` [N, C] -> [N, C] float32. ``valid`` is of no concern to a row."""
        with torch.autocast(inputs.device.type, enabled=False):
            return super().forward(inputs.float())


NORMALIZATIONS = ("none", "batch", "layer")


def build_normalization(name: str, channels: int) -> nn.Module:
    one_of(name, NORMALIZATIONS, "model.normalization")
    if name == "batch":
        return BatchNorm(channels)
    return LayerNorm(channels) if name == "layer" else nn.Identity()


def normalize(normalization: nn.Module, inputs: Tensor, valid: Tensor | Rows | None) -> Tensor:
    return inputs if isinstance(normalization, nn.Identity) else normalization(inputs, valid)
