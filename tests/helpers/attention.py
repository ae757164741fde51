"""DIN's attention unit as its paper writes it, for tests: equation 2 in float64, by autograd."""

import copy

import torch
from torch import Tensor, nn

from trainer.modules.attention import TargetAttention
from trainer.modules.dice import Dice


def reference(
    unit: TargetAttention, query: Tensor, tokens: Tensor, offsets: Tensor, upstream: Tensor
) -> dict[str, Tensor]:
    """The output [B, D] under ``upstream`` [B, D], and the gradients of query, tokens and all parameters, in float64."""
    unit = copy.deepcopy(unit).double()
    query, tokens = (leaf.detach().double().requires_grad_() for leaf in (query, tokens))
    output = _attend(unit, query, tokens, offsets)
    output.backward(upstream.double())
    found = {"output": output.detach(), "query": query.grad, "tokens": tokens.grad}
    return found | {name: parameter.grad for name, parameter in unit.named_parameters()}


def computed(
    unit: TargetAttention, query: Tensor, tokens: Tensor, offsets: Tensor, upstream: Tensor
) -> dict[str, Tensor]:
    """The same by the unit itself."""
    query, tokens = (leaf.detach().clone().requires_grad_() for leaf in (query, tokens))
    unit.zero_grad()
    output = unit(query, tokens, offsets)
    output.backward(upstream)
    found = {"output": output.detach(), "query": query.grad, "tokens": tokens.grad}
    return found | {name: parameter.grad.clone() for name, parameter in unit.named_parameters()}


def _attend(unit: TargetAttention, query: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    lengths = offsets.diff()
    sample = torch.arange(len(query)).repeat_interleave(lengths)
    queries = query[sample]
    hidden = unit.first(torch.cat((queries, tokens, queries - tokens, queries * tokens), dim=1))
    if unit.positions is not None:
        distance = offsets[1:][sample] - 1 - torch.arange(len(tokens))
        hidden = hidden + unit.positions[distance.clamp(max=len(unit.positions) - 1)]
    if unit.cosine is not None:
        norms = queries.norm(dim=1).clamp(min=1e-8) * tokens.norm(dim=1).clamp(min=1e-8)
        hidden = hidden + torch.outer((queries * tokens).sum(1) / norms, unit.cosine.weight[:, 0])
    hidden = _activated(unit.activation, hidden)
    for layer, activation in zip(unit.rest.layers, unit.rest.activations, strict=True):
        hidden = _activated(activation, nn.functional.linear(hidden, layer.weight, layer.bias))
    scores = unit.rest.output(hidden).squeeze(1)
    values = tokens if unit.intensity is None else tokens + unit.intensity
    interests = [
        _pooled(unit.softmax, *pair) for pair in zip(scores.split(lengths.tolist()), values.split(lengths.tolist()))
    ]
    return torch.stack(interests)


def _pooled(softmax: bool, scores: Tensor, values: Tensor) -> Tensor:
    return ((scores.softmax(0) if softmax else scores).unsqueeze(1) * values).sum(0)


def _activated(activation: nn.Module, values: Tensor) -> Tensor:
    """Equation 3 for Dice, with the statistics of these rows in training."""
    if not isinstance(activation, Dice):
        return activation(values)
    mean, variance = activation.moving_mean, activation.moving_variance
    if activation.training and len(values):
        mean, variance = values.mean(0), values.var(0, correction=0)
    p = torch.sigmoid((values - mean) / torch.sqrt(variance + activation.eps))
    return p * values + (1 - p) * activation.alpha * values
