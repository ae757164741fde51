"""The multilayer perceptron and its parts, and the layers of dense fields: tensors in, tensors out.

Shapes: B rows of this rank, F fields, N rows or tokens, C channels.

Under autocast the matrix products are in its type; statistics, softmax, sums and logits are in float32.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_loaders.errors import UserError
from data_loaders.schema import one_of
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

    def forward(self, inputs: Tensor, valid: Tensor | Rows | None = None, *, first: Tensor | None = None) -> Tensor:
        """``inputs`` [N, in_dim], or wider by columns of zeros (``aligned``), ``valid`` [N] (which rows count in statistics;
        None: all) -> [N, out_dim] float32, the output layer also under autocast. ``first`` [C, width of the inputs]: used in
        place of the first layer's own weight."""
        if first is None and self.layers and inputs.shape[1] > self.layers[0].in_features:
            first = aligned(self.layers[0].weight)
        hidden, valid = inputs, Rows.of(inputs, valid)
        for layer, normalization, activation in zip(self.layers, self.normalizations, self.activations, strict=True):
            hidden = layer(hidden) if first is None else functional.linear(hidden, first, layer.bias)  # [N, C]
            hidden = self.dropout(activate(activation, normalize(normalization, hidden, valid), valid))
            first = None
        # Few operations, and bf16 would leave 3 digits of a logit: whole groups of rows would tie in a ranking.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.output(hidden.float())


def aligned(*parts: Tensor) -> Tensor:
    """``parts`` [N, …] beside each other, and columns of zeros up to a multiple of ``ALIGNMENT``: of an inner dimension that is
    none, MKL's products for the backward pass take 1.3 to 1.7 times as long, and a GPU's matrix units are left aside."""
    width = sum(part.shape[1] for part in parts)
    if missing := -width % ALIGNMENT:
        parts = (*parts, parts[0].new_zeros(()).expand(len(parts[0]), missing))
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
