"""The multilayer perceptron and its parts, and the layers of dense fields: tensors in, tensors out.

Shapes: B rows of this rank, F fields, N rows or tokens, C channels.

Under autocast the matrix products are in its type; statistics, softmax, sums and logits are in float32.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from data_loaders.errors import UserError
from data_loaders.schema import one_of
from trainer.modules.constants import constant
from trainer.modules.dice import Dice
from trainer.modules.normalization import Rows, build_normalization, normalize

ALIGNMENT = 16  # columns
ACTIVATIONS = ("relu", "prelu", "dice", "tanh")


class MLP(nn.Module):
    """Linear layers, each followed by normalisation (none, batch or layer), an activation and dropout, then a linear
    output layer of ``out_dim`` units. A layer before batch normalisation has no bias of its own: it would cancel.
    ``linear``: the hidden layers' type.

    Raises ``UserError`` (``model.activation``, ``model.normalization``, ``model.dropout``) for values out of range.
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
            raise UserError(f"model.dropout is {dropout}: give the share of units to drop, at least 0 and below 1")
        dims = (in_dim, *hidden_units)
        self.layers = nn.ModuleList(linear(*pair, bias=normalization != "batch") for pair in pairwise(dims))
        self.normalizations = nn.ModuleList(build_normalization(normalization, dim) for dim in hidden_units)
        self.activations = nn.ModuleList(build_activation(activation, dim) for dim in hidden_units)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(dims[-1], out_dim)
        self.plain = bool(hidden_units) and (activation, normalization, linear) == ("relu", "none", nn.Linear)

    def forward(self, inputs: Tensor, valid: Tensor | Rows | None = None, *, first: Tensor | None = None) -> Tensor:
        """``inputs`` [N, in_dim], or wider by columns of zeros (``aligned``), ``valid`` [N] (which rows count in statistics;
        None: all) -> [N, out_dim] float32, the output layer also under autocast. ``first`` [C, width of the inputs]: used in
        place of the first layer's own weight."""
        if first is None and self.layers and inputs.shape[1] > self.layers[0].in_features:
            first = aligned(self.layers[0].weight)
        hidden = self._hidden(inputs, valid, first)  # [N, C]
        # Few operations, and bf16 would leave 3 digits of a logit: whole groups of rows would tie in a ranking.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.output(hidden.float())

    def _hidden(self, inputs: Tensor, valid: Tensor | Rows | None, first: Tensor | None) -> Tensor:
        if self.plain and not (self.training and self.dropout.p):
            weights = [self.layers[0].weight if first is None else first, *(layer.weight for layer in self.layers[1:])]
            biases = [layer.bias for layer in self.layers]
            return _ReLULayers.apply(in_autocast(inputs), *weights, *biases)
        hidden, valid = inputs, Rows.of(inputs, valid)
        for layer, normalization, activation in zip(self.layers, self.normalizations, self.activations, strict=True):
            hidden = layer(hidden) if first is None else functional.linear(hidden, first, layer.bias)  # [N, C]
            hidden = self.dropout(activate(activation, normalize(normalization, hidden, valid), valid))
            first = None
        return hidden


class _ReLULayers(torch.autograd.Function):
    """(inputs [N, I], weights of all layers, then their biases) -> [N, C of the last]. Products are of the inputs' type; the
    gradients of weights and biases come as float32 from where they are added up, and none is cast."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = halves(cast(parameters, inputs.dtype))
        hidden = [inputs]
        for weight, bias in zip(weights, biases, strict=True):
            hidden.append(torch.addmm(bias, hidden[-1], weight.t()).relu_())
        ctx.save_for_backward(*hidden, *weights)
        return hidden[-1]

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, ...]:
        inputs, *saved = ctx.saved_tensors
        outputs, weights = halves(saved)
        of_weights, of_biases = [], []
        for layer in reversed(range(len(weights))):
            gradient = torch.ops.aten.threshold_backward(gradient, outputs[layer], 0)
            of_biases.append(gradient.sum(0, dtype=torch.float32))
            of_weights.append(product(gradient.t(), outputs[layer - 1] if layer else inputs))
            gradient = gradient @ weights[layer]
        return gradient, *reversed(of_weights), *reversed(of_biases)


def halves(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """To ``dtype``; on a GPU, where a launch costs more than a copy of weights, all at once."""
    if tensors[0].device.type == "cpu" or dtype == tensors[0].dtype:
        return [tensor.to(dtype) for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(dtype)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def product(left: Tensor, right: Tensor) -> Tensor:
    """float32, also of matrices in bf16, whose product is rounded once less where the library can leave it so."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def in_autocast(tensor: Tensor) -> Tensor:
    """As autocast has it for a product."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def aligned(*parts: Tensor, on_gpu: bool = False) -> Tensor:
    """``parts`` [N, …] beside each other, and columns of zeros up to a multiple of ``ALIGNMENT``: of an inner dimension that is
    none, MKL's products for the backward pass take 1.3 to 1.7 times as long. ``on_gpu``: there too, for its matrix units."""
    missing = -sum(part.shape[1] for part in parts) % ALIGNMENT
    if missing and (on_gpu or not parts[0].is_cuda):
        parts = (*parts, constant(0.0, parts[0]).expand(parts[0].shape[0], missing))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def check_units(units: Sequence[int], where: str) -> None:
    """Raises ``UserError`` unless ``units`` are the widths of one hidden layer or more."""
    if not units or min(units) < 1:
        raise UserError(f"{where} is {list(units)}: give the width of each hidden layer, at least one, each positive")


def check_least(value: int, least: int, where: str) -> None:
    """Raises ``UserError`` for a count below ``least``."""
    if value < least:
        raise UserError(f"{where} is {value}: it must be at least {least}")


def build_activation(name: str, channels: int) -> nn.Module:
    one_of(name, ACTIVATIONS, "model.activation")
    if name == "dice":
        return Dice(channels)
    if name == "prelu":
        return nn.PReLU(channels)
    return nn.Tanh() if name == "tanh" else nn.ReLU()


def activate(activation: nn.Module, inputs: Tensor, valid: Tensor | Rows | None) -> Tensor:
    return activation(inputs, valid) if isinstance(activation, Dice) else activation(inputs)


class LogitLinear(nn.Linear):
    """A summand of the logits without a bias of its own: ``[N, in_dim] -> [N]`` in float32, also under autocast."""

    def __init__(self, in_dim: int) -> None:
        super().__init__(in_dim, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            return super().forward(inputs.float()).squeeze(1)


class DenseFields(nn.Module):
    """Numbers beside embedded ids: a number x has the first-order term ``w * x`` and, as a field, the vector ``x * v`` (Guo
    et al., 2017, section 2: a continuous field is represented by its value)."""

    def __init__(self, num_features: int, dim: int, *, init_std: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_features))
        self.vectors = nn.Parameter(torch.empty(num_features, dim))
        nn.init.normal_(self.vectors, std=init_std)

    def folded(self, weight: Tensor) -> Tensor:
        """A layer's ``weight`` [C, F * D] for the fields -> [C, F] for the numbers themselves: ``W (x v) = x (W v)``, a product
        of width F in place of one of width F D."""
        return (weight.unflatten(1, self.vectors.shape) * self.vectors).sum(2)
