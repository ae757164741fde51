"""Sums, softmax and expansion over the histories of a batch: sample b owns tokens offsets[b]:offsets[b + 1]."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional


class Segments(NamedTuple):
    """Which tokens belong to which sample: ``offsets`` [B + 1] and, the other way round, ``sample`` [T] int64."""

    offsets: Tensor
    sample: Tensor

    @classmethod
    def of(cls, offsets: Tensor, num_tokens: int) -> "Segments":
        """``num_tokens`` is a tensor's length, known on the host: nothing waits for a GPU."""
        samples = torch.arange(len(offsets) - 1, device=offsets.device)
        return cls(offsets, torch.repeat_interleave(samples, offsets.diff(), output_size=num_tokens))


def from_the_end(segments: Segments) -> Tensor:
    """How many tokens of its sample come after each token: [T] int64."""
    tokens = torch.arange(len(segments.sample), device=segments.sample.device)
    return segments.offsets[1:].index_select(0, segments.sample) - 1 - tokens


def segment_softmax(scores: Tensor, segments: Segments) -> Tensor:
    """Softmax of ``scores`` [T] over each sample's own tokens: [T] float32."""
    scores = scores.float()
    largest = scores.new_full((len(segments.offsets) - 1,), -torch.inf)
    largest = largest.scatter_reduce(0, segments.sample, scores.detach(), "amax")  # [B]
    exponents = (scores - largest[segments.sample]).exp().unsqueeze(1)  # [T, 1] in (0, 1], with a 1 in every sample
    return (exponents / expand(segment_sum(exponents, segments), segments)).squeeze(1)


def segment_sum(values: Tensor, segments: Segments) -> Tensor:
    """Sums over each sample's tokens, in float32: ``values`` [T, D] -> [B, D]; zeros where there are none.

    Unlike ``index_add`` it adds in a fixed order on a GPU too: a resumed run can repeat itself bit for bit."""
    return _SegmentSum.apply(values.float(), *segments)


def segment_mean(values: Tensor, segments: Segments) -> Tensor:
    """As ``segment_sum``, divided by the number of tokens."""
    return segment_sum(values, segments) / segments.offsets.diff().clamp(min=1).unsqueeze(1)


def expand(values: Tensor, segments: Segments) -> Tensor:
    """Each sample's row for each of its tokens: ``values`` [B, D] -> [T, D]. The adjoint of ``segment_sum``."""
    return _Expand.apply(values, *segments)


def _sum_rows(values: Tensor, offsets: Tensor) -> Tensor:
    if not len(values):
        return values.new_zeros(len(offsets) - 1, values.shape[1])
    # A bag over consecutive rows is the fastest segment sum on a CPU: 2 ms for [100000, 64]; segment_reduce takes 7.
    rows = torch.arange(len(values), device=values.device, dtype=offsets.dtype)
    return functional.embedding_bag(rows, values.contiguous(), offsets, mode="sum", include_last_offset=True)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, offsets: Tensor, sample: Tensor) -> Tensor:
        ctx.save_for_backward(sample)
        return _sum_rows(values, offsets)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (sample,) = ctx.saved_tensors
        return gradient.index_select(0, sample), None, None


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, offsets: Tensor, sample: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        return values.index_select(0, sample)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return _sum_rows(gradient.float(), offsets).to(gradient.dtype), None, None
