"""Building blocks of the models: tensors in, tensors out.

Shapes: B rows of this rank, F fields, D embedding_dim (of an event: summed over its attributes), N rows or tokens,
C channels, T tokens (events of all histories of the batch, one after the other; sample b owns tokens
offsets[b]:offsets[b + 1]).

Under autocast the matrix products are in its type; statistics, softmax, sums and logits are in float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from data_loaders.schema import one_of
from trainer.batch_statistics import BatchNorm, LayerNorm
from trainer.dice import Dice

ACTIVATIONS = ("relu", "prelu", "dice", "tanh")
NORMALIZATIONS = ("none", "batch", "layer")


class Head(nn.Module, ABC):
    """All that a model computes after its lookups, as one module: the training pipeline does not look inside.

    Subclasses implement ``logits(dense, *others) -> [B]``. ``set_autocast`` chooses the type of its matrix products,
    which changes no parameter and no name; lookups, logits and loss stay float32.
    """

    autocast_dtype: torch.dtype | None = None

    def forward(self, dense: Tensor, *others: object) -> Tensor:
        enabled = self.autocast_dtype is not None
        with torch.autocast(dense.device.type, dtype=self.autocast_dtype, enabled=enabled):
            return self.logits(dense, *others).float()  # [B]

    @abstractmethod
    def logits(self, dense: Tensor, *others: object) -> Tensor: ...


def set_autocast(module: nn.Module, dtype: torch.dtype | None) -> None:
    """The type of the matrix products of every ``Head`` in ``module``, e.g. ``torch.bfloat16``; None: float32."""
    for child in module.modules():
        if isinstance(child, Head):
            child.autocast_dtype = dtype


class MLP(nn.Module):
    """Linear layers, each followed by normalisation (none, batch or layer), an activation and dropout, then a linear
    output layer of ``out_dim`` units. A layer before batch normalisation has no bias of its own: it would cancel.
    ``linear``: the hidden layers' type.

    Raises ``ValueError`` (``model.activation``, ``model.normalization``, ``model.dropout``) for values out of range.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_units: Sequence[int],
        *,
        activation: str = "relu",
        normalization: str = "none",
        dropout: float = 0.0,
        out_dim: int,
        linear: type[nn.Linear] = nn.Linear,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout is {dropout}: give the share of units to drop, at least 0 and below 1")
        dims = (in_dim, *hidden_units)
        self.layers = nn.ModuleList(linear(*pair, bias=normalization != "batch") for pair in pairwise(dims))
        self.normalizations = nn.ModuleList(build_normalization(normalization, dim) for dim in hidden_units)
        self.activations = nn.ModuleList(build_activation(activation, dim) for dim in hidden_units)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(dims[-1], out_dim)

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Tensor:
        """``inputs`` [N, in_dim], ``valid`` [N] (which rows count in statistics; None: all) -> [N, out_dim]
        float32, the output layer also under autocast."""
        hidden = inputs
        for layer, normalization, activation in zip(self.layers, self.normalizations, self.activations, strict=True):
            hidden = normalize(normalization, layer(hidden), valid)  # [N, C]
            hidden = self.dropout(activate(activation, hidden, valid))
        # Few operations, and bf16 would leave 3 digits of a logit: whole groups of rows would tie in a ranking.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.output(hidden.float())


def check_units(units: Sequence[int], where: str) -> None:
    """Raises ``ValueError`` unless ``units`` are the widths of one hidden layer or more."""
    if not units or min(units) < 1:
        raise ValueError(f"{where} is {list(units)}: give the width of each hidden layer, at least one, each positive")


def check_least(value: int, least: int, where: str) -> None:
    """Raises ``ValueError`` for a count below ``least``."""
    if value < least:
        raise ValueError(f"{where} is {value}: it must be at least {least}")


def build_activation(name: str, channels: int) -> nn.Module:
    one_of(name, ACTIVATIONS, "model.activation")
    if name == "dice":
        return Dice(channels)
    if name == "prelu":
        return nn.PReLU(channels)
    return nn.Tanh() if name == "tanh" else nn.ReLU()


def build_normalization(name: str, channels: int) -> nn.Module:
    one_of(name, NORMALIZATIONS, "model.normalization")
    if name == "batch":
        return BatchNorm(channels)
    return LayerNorm(channels) if name == "layer" else nn.Identity()


def normalize(normalization: nn.Module, inputs: Tensor, valid: Tensor | None) -> Tensor:
    return inputs if isinstance(normalization, nn.Identity) else normalization(inputs, valid)


def activate(activation: nn.Module, inputs: Tensor, valid: Tensor | None) -> Tensor:
    return activation(inputs, valid) if isinstance(activation, Dice) else activation(inputs)


class LogitLinear(nn.Linear):
    """A summand of the logits without a bias of its own: ``[N, in_dim] -> [N]`` in float32, also under autocast."""

    def __init__(self, in_dim: int) -> None:
        super().__init__(in_dim, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            return super().forward(inputs.float()).squeeze(1)


class FactorizationMachine(nn.Module):
    """Second-order interactions, ``sum over i < j of <v_i, v_j>`` (Rendle, 2010, lemma 3.1):
    ``0.5 * ((sum of v)^2 - sum of v^2)`` summed over D."""

    def forward(self, fields: Tensor) -> Tensor:
        """``fields`` [B, F, D] -> [B] float32."""
        fields = fields.float()
        square_of_sum = fields.sum(1).square().sum(1)  # [B]
        sum_of_squares = fields.square().sum((1, 2))  # [B]
        return 0.5 * (square_of_sum - sum_of_squares)


class DenseFields(nn.Module):
    """Numbers beside embedded ids in a factorization machine: a number x has the first-order term ``w * x`` and, as a
    field, the vector ``x * v`` (Guo et al., 2017, section 2: a continuous field is represented by its value)."""

    def __init__(self, num_features: int, dim: int, *, init_std: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_features))
        self.vectors = nn.Parameter(torch.empty(num_features, dim))
        nn.init.normal_(self.vectors, std=init_std)

    def forward(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        """``dense`` [B, F] -> first-order sum [B], fields [B, F, D]."""
        return (dense * self.weights).sum(1), dense.unsqueeze(2) * self.vectors


class TargetAttention(nn.Module):
    """User interest as seen from the candidate: ``sum over events of a(event, candidate) * event``
    (Zhou et al., 2018, "Deep Interest Network", equation 2 and figure 2), on jagged tokens.

    ``a`` is an MLP over [q, k, q - k, q * k] with one output. Its first layer is split,
    ``W [q, k, q-k, q*k] = (Wq + Wd) q + (Wk - Wd) k + Wp (q*k)``: the candidate's term is computed once a sample and
    two products of width D remain for a token instead of one of width 4D.

    Weights are not normalised (section 4.3: their sum expresses the intensity of the interest) unless ``softmax``.

    ``positions``: so many distances from the end of the history (0: the last event) are told apart, each by a vector
    that is added to the first layer's output and begins as 0; older events share the last one. This is an embedding of
    the distance among the inputs of ``a``, multiplied by its part of the first layer once and for all. None: the order
    of events is not looked at, as in the paper.

    ``cosine``: ``a`` also sees the cosine of q and k, which is 1 where both are the same ids and has no scale: it tells
    ids apart that training has never touched, whose products are too small to be seen beside those of trained rows.
    ``intensity``: a learned vector v, at first ones, is added to every event, ``sum of a * (k + v)``: the sum of the
    weights gets a direction of its own, while alone it can be read only along the events themselves.
    Raises ``ValueError`` (``model.attention_units``, ``model.activation``).
    """

    def __init__(
        self,
        dim: int,
        hidden_units: Sequence[int],
        *,
        activation: str,
        softmax: bool = False,
        positions: int | None = None,
        cosine: bool = False,
        intensity: bool = False,
    ) -> None:
        super().__init__()
        check_units(hidden_units, "model.attention_units")
        self.softmax = softmax
        self.first = nn.Linear(4 * dim, hidden_units[0])
        self.activation = build_activation(activation, hidden_units[0])
        self.rest = MLP(hidden_units[0], hidden_units[1:], activation=activation, out_dim=1, linear=TokenLinear)
        self.positions = nn.Parameter(torch.zeros(positions, hidden_units[0])) if positions is not None else None
        self.cosine = TokenLinear(1, hidden_units[0], bias=False) if cosine else None
        self.intensity = nn.Parameter(torch.ones(dim)) if intensity else None

    def forward(self, query: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
        """``query`` [B, D], ``tokens`` [T, D], ``offsets`` [B + 1] -> [B, D] float32; zeros for an empty history."""
        segments = Segments.of(offsets, len(tokens))
        weights = self.scores(query, tokens, segments)  # [T]
        if self.softmax:
            weights = segment_softmax(weights, segments)
        values = tokens.float() if self.intensity is None else tokens.float() + self.intensity
        return segment_sum(weights.unsqueeze(1) * values, segments)  # [B, D]

    def scores(self, query: Tensor, tokens: Tensor, segments: "Segments") -> Tensor:
        """``a(token, query of its sample)`` for every token: [T] float32."""
        for_query, for_token, for_difference, for_product = self.first.weight.chunk(4, dim=1)  # each [C, D]
        of_query = functional.linear(query, for_query + for_difference, self.first.bias)  # [B, C]
        hidden = token_linear(tokens, for_token - for_difference) + expand(of_query, segments)  # [T, C]
        queries = expand(query, segments)  # [T, D]
        hidden = hidden + token_linear(queries * tokens, for_product)
        if self.cosine is not None:
            hidden = hidden + self.cosine(functional.cosine_similarity(queries, tokens, dim=1).unsqueeze(1))
        if self.positions is not None:
            distance = from_the_end(segments).clamp(max=len(self.positions) - 1)  # [T]
            hidden = hidden + functional.embedding(distance, self.positions).to(hidden.dtype)
        return self.rest(activate(self.activation, hidden, None)).squeeze(1)


class TokenLinear(nn.Linear):
    """``nn.Linear`` over tokens: see ``token_linear``."""

    def forward(self, inputs: Tensor) -> Tensor:
        return token_linear(inputs, self.weight, self.bias)


def token_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear`` of ``inputs`` [T, D] for a T that is another in each batch -> [T, C].

    For a bf16 product on a CPU oneDNN compiles a kernel for each shape that it meets, and keeps the last 1024 of them. With
    T as it comes that was a third of DIN's time and gigabytes of memory, so T is filled up to one of few numbers."""
    if inputs.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return functional.linear(inputs, weight, bias)
    filled = functional.pad(inputs, (0, 0, 0, filled_up(len(inputs)) - len(inputs)))
    return functional.linear(filled, weight, bias)[: len(inputs)]


def filled_up(num_tokens: int) -> int:
    """``num_tokens`` rounded up: one of 16 numbers from a power of two to the next, so at most a sixteenth more; and a
    multiple of 64."""
    step = max(64, 1 << max(num_tokens.bit_length() - 5, 0))
    return -(-num_tokens // step) * step


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
