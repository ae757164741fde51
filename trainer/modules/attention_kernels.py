"""DIN's attention unit by compiled kernels (``trainer/kernels/attention.cpp``) on a CPU: ``TargetAttention`` in PyTorch says
what it computes, and is what this is tested against.

Written as PyTorch's operations, most of a step of DIN is memory traffic over the tokens. Here a hidden layer is written once by a
product, once by its activation, and read once more in the backward pass.

Shapes: B samples, T tokens, D width of an event, C channels of a layer. Gradients have their tensors' names with ``of_``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from trainer import kernels
from trainer.modules.dice import Dice
from trainer.modules.tokens import filled_up

ACTIVATIONS = (nn.ReLU, nn.PReLU, Dice)


class Unit(NamedTuple):
    """What is not differentiated: the activation of each hidden layer, whether weights sum to 1, and the type of the matrix
    products."""

    activations: tuple[nn.Module, ...]
    softmax: bool
    dtype: torch.dtype


class Parameters(NamedTuple):
    """``first_weight`` [C, 4D] with ``first_bias`` [C]; ``output_weight`` [1, C] with ``output_bias`` [1]; ``positions`` [P, C],
    ``cosine`` [C, 1], ``intensity`` [D]. Of the activations ``alphas`` [C]; of the hidden layers after the first one ``weights``
    [C, C'] and ``biases`` [C]."""

    first_weight: Tensor
    first_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    positions: Tensor | None
    cosine: Tensor | None
    intensity: Tensor | None
    alphas: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def flat(self) -> tuple[Tensor | None, ...]:
        return (*self[:7], *self.alphas, *self.weights, *self.biases)

    @classmethod
    def of(cls, flat: tuple[Any, ...], layers: int) -> "Parameters":
        alphas, rest = flat[7 : 7 + layers], flat[7 + layers :]
        return cls._make((*flat[:7], alphas, rest[: layers - 1], rest[layers - 1 :]))


def attend(unit: Unit, query: Tensor, tokens: Tensor, offsets: Tensor, parameters: Parameters) -> Tensor:
    """``query`` [B, D], ``tokens`` [T, D], ``offsets`` [B + 1] -> [B, D] float32, as ``TargetAttention.forward``."""
    with torch.autocast("cpu", enabled=False):
        inputs = query.float().contiguous(), tokens.float().contiguous(), offsets.long().contiguous()
        return _Attend.apply(unit, *inputs, *parameters.flat())


def alpha_of(activation: nn.Module, channels: int) -> Tensor:
    """What an activation multiplies values far below zero by, [C]."""
    if isinstance(activation, Dice):
        return activation.alpha
    return activation.weight if isinstance(activation, nn.PReLU) else torch.zeros(channels)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, unit: Unit, query: Tensor, tokens: Tensor, offsets: Tensor, *flat: Tensor | None
    ) -> Tensor:
        ctx.run = _Pass(unit, query, tokens, offsets, Parameters.of(flat, len(unit.activations)))
        return ctx.run.forward()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            of_query, of_tokens, of_parameters = ctx.run.backward(gradient.float().contiguous())
        return (None, of_query, of_tokens, None, *of_parameters.flat())


class _Layer(NamedTuple):
    """A hidden layer [T, C] before its activation: PReLU with ``alpha`` [C], or Dice with ``mean`` and ``scale`` [C], too;
    ``count`` []: of the tokens, of all ranks, that these are the statistics of."""

    hidden: Tensor
    alpha: Tensor
    mean: Tensor | None = None
    scale: Tensor | None = None
    count: Tensor | None = None


class _Pass:
    """A forward and its backward pass."""

    def __init__(self, unit: Unit, query: Tensor, tokens: Tensor, offsets: Tensor, parameters: Parameters) -> None:
        found = kernels.library()
        assert found is not None
        self.kernels, self.unit, self.parameters = found, unit, parameters
        self.query, self.tokens, self.offsets = query, tokens, offsets
        self.samples, self.length, self.width = query.shape[0], tokens.shape[0], query.shape[1]
        self.bf16 = unit.dtype == torch.bfloat16
        self.by_sample = (self.samples, offsets)  # how kernels that go sample by sample begin their arguments
        for_query, for_token, for_difference, for_product = parameters.first_weight.chunk(4, dim=1)
        self.for_query = for_query + for_difference  # [C, D]
        self.for_pair = torch.cat((for_token - for_difference, for_product), dim=1).to(unit.dtype)  # [C, 2D]
        self.weights = [weight.to(unit.dtype) for weight in parameters.weights]

    def forward(self) -> Tensor:
        self.layers, self.inputs = [self._first()], list[Tensor]()  # inputs: of the layers after the first one
        for weight, bias in zip(self.weights, self.parameters.biases, strict=True):
            self.inputs.append(self._activated(self.layers[-1]))
            self.layers.append(self._next(torch.addmm(bias.to(self.unit.dtype), self.inputs[-1], weight.t())))
        return self._pooled(self._scores(self.layers[-1]))

    def _first(self) -> _Layer:
        self.cosine: tuple[Tensor | None, ...] = (
            None,
            None,
            None,
        )  # cosines [T], lengths of tokens [T], of queries [B]
        if self.parameters.cosine is not None:
            self.cosine = self._floats(self.length), self._floats(self.length), self._floats(self.samples)
        self.pairs = self._rows(2 * self.width)
        self.kernels.attention_pairs(
            *self.by_sample, self.width, self.tokens, self.query, self.bf16, self.pairs, *self.cosine
        )
        hidden = self.pairs @ self.for_pair.t()
        of_query = torch.addmm(self.parameters.first_bias, self.query, self.for_query.t())  # [B, C]
        shift, sums = self._shift(0, hidden)
        self.kernels.attention_hidden(
            *self.by_sample,
            hidden.shape[1],
            self.bf16,
            hidden,
            of_query,
            self.cosine[0],
            _flat(self.parameters.cosine),
            self.parameters.positions,
            self._num_positions(),
            shift,
            sums if sums is None else sums[1:],
        )
        return self._layer(0, hidden, sums)

    def _next(self, hidden: Tensor) -> _Layer:
        index = len(self.layers)
        shift, sums = self._shift(index, hidden)
        if sums is not None:
            self.kernels.attention_moments(self.length, hidden.shape[1], self.bf16, hidden, shift, sums[1:])
        return self._layer(index, hidden, sums)

    def _shift(self, index: int, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What Dice's statistics are taken around, and a place for them, where they are to be taken."""
        activation = self.unit.activations[index]
        if not isinstance(activation, Dice) or not activation.training:
            return None, None
        return activation.moving_mean, torch.full((1 + 2 * hidden.shape[1],), float(self.length))

    def _layer(self, index: int, hidden: Tensor, sums: Tensor | None) -> _Layer:
        activation, alpha = self.unit.activations[index], self.parameters.alphas[index]
        if not isinstance(activation, Dice):
            return _Layer(hidden, alpha)
        statistics = activation.moving_statistics() if sums is None else activation.statistics_of(sums)
        return _Layer(hidden, alpha, *statistics)

    def _activated(self, layer: _Layer) -> Tensor:
        output = self._rows(layer.hidden.shape[1])
        self.kernels.attention_activate(*self._of(layer), output)
        return output

    def _scores(self, layer: _Layer) -> Tensor:
        scores = self._floats(self.length)
        weight, bias = _flat(self.parameters.output_weight), self.parameters.output_bias
        self.kernels.attention_score(*self._of(layer), weight, bias, scores)
        return scores

    def _pooled(self, scores: Tensor) -> Tensor:
        self.shares, self.totals, output = (
            self._floats(self.length),
            self._floats(self.samples),
            torch.empty_like(self.query),
        )
        self.kernels.attention_pool(
            *self.by_sample,
            self.width,
            self.unit.softmax,
            scores,
            self.tokens,
            self.parameters.intensity,
            self.shares,
            output,
            self.totals,
        )
        return output

    def backward(self, gradient: Tensor) -> tuple[Tensor, Tensor, Parameters]:
        of_scores, of_tokens = self._pool_back(gradient)
        of_alphas, of_weights, of_biases = list[Tensor](), list[Tensor](), list[Tensor]()
        current = self._rows(self.layers[-1].hidden.shape[1])
        sums = self._activate_back(-1, current, of_scores, _flat(self.parameters.output_weight))
        of_output = sums[3].unsqueeze(0)
        for index in reversed(range(len(self.weights))):
            of_alphas.insert(0, sums[0])
            of_biases.insert(0, self._through(index + 1, current, sums))
            of_weights.insert(0, (current.t() @ self.inputs[index]).float())
            current = current @ self.weights[index]
            sums = self._activate_back(index, current)
        of_query, first = self._first_back(current, sums, of_tokens)
        of_intensity = None if self.parameters.intensity is None else self.totals @ gradient
        found = Parameters(
            first_weight=first.weight,
            first_bias=first.bias,
            output_weight=of_output,
            output_bias=of_scores.sum().unsqueeze(0),
            positions=first.positions,
            cosine=first.cosine,
            intensity=of_intensity,
            alphas=(sums[0], *of_alphas),
            weights=tuple(of_weights),
            biases=tuple(of_biases),
        )
        return of_query, of_tokens, found

    def _pool_back(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        of_scores, of_tokens = self._floats(self.length), torch.empty_like(self.tokens)
        self.kernels.attention_pool_back(
            *self.by_sample,
            self.width,
            self.unit.softmax,
            gradient,
            self.tokens,
            self.parameters.intensity,
            self.shares,
            of_scores,
            of_tokens,
        )
        return of_scores, of_tokens

    def _activate_back(
        self, index: int, gradient: Tensor, of_scores: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Sums [4, C]: see the kernel. ``gradient`` becomes that of the layer before its activation."""
        sums = self._floats(4, gradient.shape[1])
        self.kernels.attention_activate_back(*self._of(self.layers[index]), of_scores, weight, gradient, sums)
        return sums

    def _through(self, index: int, gradient: Tensor, sums: Tensor) -> Tensor:
        """Adds to ``gradient`` of a layer what goes through its statistics. Returns the gradient of the bias."""
        layer, of_bias = self.layers[index], self._floats(gradient.shape[1])
        terms = self._statistics_back(index, sums)
        self.kernels.attention_through(self.length, len(of_bias), self.bf16, layer.hidden, *terms, gradient, of_bias)
        return of_bias

    def _statistics_back(self, index: int, sums: Tensor) -> tuple[Tensor | None, ...]:
        """``mean``, ``constant`` and ``slope`` such that ``constant + slope (s - mean)`` is what goes through the statistics:
        ``-scale (sum dz + z sum (dz z)) / count``, the sums over the tokens of all ranks."""
        layer, activation = self.layers[index], self.unit.activations[index]
        if layer.count is None:
            return None, None, None
        assert layer.scale is not None and isinstance(activation, Dice)
        moved = sums[1:3].clone()
        if activation.all_reduce is not None:
            activation.all_reduce(moved)
        constant, slope = moved.mul_(-layer.scale / layer.count)
        return layer.mean, constant, slope * layer.scale

    def _first_back(self, gradient: Tensor, sums: Tensor, of_tokens: Tensor) -> "tuple[Tensor, _First]":
        """The gradient of the queries, and those of the first layer's parameters; adds to ``of_tokens``."""
        channels, parameters = gradient.shape[1], self.parameters
        of_hidden = self._floats(self.samples, channels)
        of_cosines = None if parameters.cosine is None else self._floats(self.length)
        of_cosine = None if parameters.cosine is None else self._floats(channels)
        of_positions = None if parameters.positions is None else torch.zeros_like(parameters.positions)
        self.kernels.attention_hidden_back(
            *self.by_sample,
            channels,
            self.bf16,
            self.layers[0].hidden,
            *self._statistics_back(0, sums),
            gradient,
            self.cosine[0],
            _flat(parameters.cosine),
            self._num_positions(),
            of_hidden,
            of_cosines,
            of_cosine,
            of_positions,
        )
        of_query = self._pairs_back(gradient @ self.for_pair, of_cosines, of_tokens).addmm_(of_hidden, self.for_query)
        by_query = of_hidden.t() @ self.query  # [C, D]
        by_token, by_product = (gradient.t() @ self.pairs).float().chunk(2, dim=1)
        weight = torch.cat((by_query, by_token, by_query - by_token, by_product), dim=1)
        column = None if of_cosine is None else of_cosine.unsqueeze(1)
        return of_query, _First(weight, of_hidden.sum(0), of_positions, column)

    def _pairs_back(self, of_pairs: Tensor, of_cosines: Tensor | None, of_tokens: Tensor) -> Tensor:
        of_query = torch.empty_like(self.query)
        self.kernels.attention_pairs_back(
            *self.by_sample,
            self.width,
            self.tokens,
            self.query,
            self.bf16,
            of_pairs,
            *self.cosine,
            of_cosines,
            of_query,
            of_tokens,
        )
        return of_query

    def _of(self, layer: _Layer) -> tuple[Any, ...]:
        """How kernels that go layer by layer begin their arguments."""
        return self.length, layer.hidden.shape[1], self.bf16, layer.hidden, layer.mean, layer.scale, layer.alpha

    def _num_positions(self) -> int:
        return 0 if self.parameters.positions is None else self.parameters.positions.shape[0]

    def _floats(self, *shape: int) -> Tensor:
        return self.query.new_empty(*shape)

    def _rows(self, width: int) -> Tensor:
        """For T rows and, where products need more of them, rows of zeros: [T or more, width]."""
        rows = filled_up(self.length) if self.bf16 else self.length
        made = torch.empty(rows, width, dtype=self.unit.dtype)
        made[self.length :].zero_()
        return made


class _First(NamedTuple):
    """Gradients of the first layer."""

    weight: Tensor
    bias: Tensor
    positions: Tensor | None
    cosine: Tensor | None


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.flatten()
