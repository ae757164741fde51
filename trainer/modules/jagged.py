"""Sums, softmax and expansion over the histories of a batch: sample b owns tokens offsets[b]:offsets[b + 1].

Shapes: B samples, T tokens of all of them, D channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional


class Segments(NamedTuple):
    """Which tokens belong to which sample: ``offsets`` [B + 1] and, the other way round, ``sample`` [T] int64; ``tokens``
    [T] counts them."""

    offsets: Tensor
    sample: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, offsets: Tensor, num_tokens: int) -> "Segments":
        """``num_tokens`` is a tensor's length, known on the host: nothing waits for a GPU."""
        tokens = torch.arange(num_tokens, device=offsets.device, dtype=offsets.dtype)
        return cls(offsets, torch.bucketize(tokens, offsets[1:], right=True), tokens)


def from_the_end(segments: Segments) -> Tensor:
    """How many tokens of its sample come after each token: [T]."""
    return segments.offsets[1:].index_select(0, segments.sample) - 1 - segments.tokens


def segment_softmax(scores: Tensor, segments: Segments) -> Tensor:
    """Softmax of ``scores`` [T] over each sample's own tokens: [T] float32."""
    return _SegmentSoftmax.apply(scores.float(), *segments)


def segment_sum(values: Tensor, segments: Segments) -> Tensor:
    """Sums over each sample's tokens, in float32: ``values`` [T, D] -> [B, D]; zeros where there are none.

    Unlike ``index_add`` it adds in a fixed order on a GPU too: a resumed run can repeat itself bit for bit."""
    return _SegmentSum.apply(values.float(), *segments)


def segment_mean(values: Tensor, segments: Segments) -> Tensor:
    """As ``segment_sum``, divided by the number of tokens."""
    return segment_sum(values, segments) / segments.offsets.diff().clamp(min=1).unsqueeze(1)


def weighted_sum(weights: Tensor, values: Tensor, segments: Segments) -> Tensor:
    """``segment_sum`` of ``weights`` [T] times ``values`` [T, D], in float32: [B, D]."""
    return _WeightedSum.apply(weights.float(), values.float(), *segments)


def expand(values: Tensor, segments: Segments) -> Tensor:
    """Each sample's row for each of its tokens: ``values`` [B, D] -> [T, D]. The adjoint of ``segment_sum``."""
    return _Expand.apply(values, *segments)


def sum_rows(values: Tensor, segments: Segments, weights: Tensor | None = None) -> Tensor:
    """``segment_sum`` of ``values`` [T, D] float32, each times its weight, without a gradient."""
    if not values.numel():
        return values.new_zeros(segments.offsets.shape[0] - 1, values.shape[1])
    # A bag over consecutive rows is the fastest segment sum on a CPU: 2 ms for [100000, 64]; segment_reduce takes 7.
    return functional.embedding_bag(
        segments.tokens,
        values.contiguous(),
        segments.offsets,
        mode="sum",
        include_last_offset=True,
        per_sample_weights=weights,
    )


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, *segments: Tensor) -> Tensor:
        ctx.save_for_backward(*segments)
        return sum_rows(values, Segments(*segments))

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.index_select(0, Segments(*ctx.saved_tensors).sample), None, None, None


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, *segments: Tensor) -> Tensor:
        ctx.save_for_backward(*segments)
        return values.index_select(0, Segments(*segments).sample)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return sum_rows(gradient.float(), Segments(*ctx.saved_tensors)).to(gradient.dtype), None, None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, weights: Tensor, values: Tensor, *segments: Tensor) -> Tensor:
        ctx.save_for_backward(weights, values, *segments)
        return sum_rows(values, Segments(*segments), weights)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, values, *segments = ctx.saved_tensors
        gradients = gradient.index_select(0, Segments(*segments).sample)  # [T, D]
        of_weights = (gradients * values).sum(1)
        return of_weights, gradients.mul_(weights.unsqueeze(1)), None, None, None


class _SegmentSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, scores: Tensor, *segments: Tensor) -> Tensor:
        offsets, sample, _ = segments
        largest = scores.new_full((offsets.shape[0] - 1,), -torch.inf).scatter_reduce_(0, sample, scores, "amax")  # [B]
        exponents = (scores - largest.index_select(0, sample)).exp_()  # in (0, 1], with a 1 in every sample
        weights = exponents.div_(_sum_of_own(exponents, Segments(*segments)))
        ctx.save_for_backward(weights, *segments)
        return weights

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, *segments = ctx.saved_tensors
        return (gradient - _sum_of_own(gradient * weights, Segments(*segments))).mul_(weights), None, None, None


def _sum_of_own(values: Tensor, segments: Segments) -> Tensor:
    """The sum of ``values`` [T] over the sample that each token belongs to: [T]."""
    return sum_rows(values.unsqueeze(1), segments).squeeze(1).index_select(0, segments.sample)
