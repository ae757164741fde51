"""Target attention over histories (DIN; Zhou et al., KDD 2018).

T tokens are the events of all histories of the batch, one after the other; D is the width of an event.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from trainer.modules import execution
from trainer.modules.attention_kernels import ACTIVATIONS, Parameters, Unit, alpha_of, attend
from trainer.modules.jagged import Segments, expand, from_the_end, segment_softmax, sum_rows, weighted_sum
from trainer.modules.mlp import MLP, activate, build_activation, check_units
from trainer.modules.normalization import Rows
from trainer.modules.requests import RequestJagged
from trainer.modules.tokens import TokenLinear, fill


class TargetAttention(nn.Module):
    """User interest as seen from the candidate: ``sum over events of a(event, candidate) * event``
    (Zhou et al., 2018, "Deep Interest Network", equation 2 and figure 2), on jagged tokens.

    ``a`` is an MLP over [q, k, q - k, q * k] with one output. Its first layer is split,
    ``W [q, k, q-k, q*k] = (Wq + Wd) q + (Wk - Wd) k + Wp (q*k)``: the candidate's term is computed once a sample and
    two products of width D remain for a token instead of one of width 4D.

    Weights are not normalised (section 4.3: their sum expresses the intensity of the interest) unless ``softmax``.

    ``positions``: so many distances from the end of the history (0: the last event) are distinguished, each by a vector
    that is added to the first layer's output and begins as 0; older events share the last one. This is an embedding of
    the distance among the inputs of ``a``, multiplied by its part of the first layer once and for all. None: the order
    of events is not looked at, as in the paper.

    ``cosine``: ``a`` also sees the cosine of q and k, which is 1 where both are the same ids and has no scale: it
    distinguishes ids that training has never touched, whose products are too small to be seen beside those of trained rows.
    ``intensity``: a learned vector v, at first ones, is added to every event, ``sum of a * (k + v)``: the sum of the
    weights gets a direction of its own, while alone it can be read only along the events themselves.
    Raises ``UserError`` (``model.attention_units``, ``model.activation``).
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
        self.compiled = execution.current().compiled and isinstance(self.activation, ACTIVATIONS)

    def forward(self, query: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
        """``query`` [B, D], ``tokens`` [T, D], ``offsets`` [B + 1] -> [B, D] float32; zeros for an empty history."""
        if self.compiled and tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            return attend(self._unit(), query, tokens, offsets, self._weights())
        segments = Segments.of(offsets, tokens.shape[0])
        weights = self.scores(query, tokens, segments)  # [T]
        if self.softmax:
            weights = segment_softmax(weights, segments)
        return weighted_sum(weights, tokens if self.intensity is None else tokens + self.intensity, segments)  # [B, D]

    def of_requests(self, query: Tensor, tokens: Tensor, history: RequestJagged) -> Tensor:
        """As ``forward`` gives in evaluation, where all rows of a request share its history: ``query`` [N, D], ``tokens`` [T, D]
        of the R requests, placed by ``history`` -> [N, D] float32."""
        found = torch.zeros_like(query)
        weight, per_token = self._per_token(tokens)
        events = tokens if self.intensity is None else tokens + self.intensity
        for rows, own in history.of_requests():
            if own.start < own.stop:
                scores = self._shared_scores(query[rows], tokens[own], weight[own], per_token[own])  # [n, L]
                found[rows] = (scores.softmax(1) if self.softmax else scores) @ events[own]
        return found

    def _per_token(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer as a function of q alone, for each token: ``W [q, k, q - k, q * k] + bias = A q + c`` with
        A = Wq + Wd + Wp diag(k) [T, C, D] and c = (Wk - Wd) k + bias [T, C]."""
        for_query, for_token, for_difference, for_product = self.first.weight.chunk(4, dim=1)
        weight = torch.addcmul(for_query + for_difference, for_product, tokens.unsqueeze(1))
        return weight, functional.linear(tokens, for_token - for_difference, self.first.bias)

    def _shared_scores(self, query: Tensor, tokens: Tensor, weight: Tensor, per_token: Tensor) -> Tensor:
        """``a(token, query)`` of each pair: ``query`` [n, D], and L tokens' ``_per_token`` -> [n, L]."""
        count = len(tokens)
        if self.positions is not None:
            distance = torch.arange(count - 1, -1, -1).clamp(max=self.positions.shape[0] - 1)
            per_token = per_token + self.positions[distance]
        hidden = torch.addmm(per_token.flatten(), query, weight.flatten(0, 1).t()).view(
            -1, weight.shape[1]
        )  # [n * L, C]
        if self.cosine is not None:
            cosines = functional.cosine_similarity(query.unsqueeze(1), tokens, dim=2)  # [n, L]
            hidden = hidden + self.cosine(cosines.view(-1, 1))
        every = Rows(hidden, None)
        return self.rest(activate(self.activation, hidden, every), every).view(-1, count)

    def _unit(self) -> Unit:
        return Unit((self.activation, *self.rest.activations), self.softmax, product_type("cpu"))

    def _weights(self) -> Parameters:
        layers = (self.first, *self.rest.layers)
        activations = (self.activation, *self.rest.activations)
        return Parameters(
            first_weight=self.first.weight,
            first_bias=self.first.bias,
            output_weight=self.rest.output.weight,
            output_bias=self.rest.output.bias,
            positions=self.positions,
            cosine=None if self.cosine is None else self.cosine.weight,
            intensity=self.intensity,
            alphas=tuple(alpha_of(each, layer.out_features) for each, layer in zip(activations, layers, strict=True)),
            weights=tuple(layer.weight for layer in self.rest.layers),
            biases=tuple(layer.bias for layer in self.rest.layers),
        )

    def scores(self, query: Tensor, tokens: Tensor, segments: Segments) -> Tensor:
        """``a(token, query of its sample)`` for every token: [T] float32."""
        hidden = first_layer(query, tokens, self.first.weight, self.first.bias, segments)  # [T, C]
        if self.cosine is not None:
            cosines = functional.cosine_similarity(expand(query, segments), tokens, dim=1)  # [T]
            hidden = hidden + self.cosine(cosines.unsqueeze(1))
        if self.positions is not None:
            distance = from_the_end(segments).clamp(max=self.positions.shape[0] - 1)  # [T]
            hidden = hidden + functional.embedding(distance, self.positions).to(hidden.dtype)
        every = Rows(hidden, None)
        return self.rest(activate(self.activation, hidden, every), every).squeeze(1)


def first_layer(query: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, segments: Segments) -> Tensor:
    """``W [q, k, q - k, q * k] + bias`` of ``query`` [B, D], ``tokens`` [T, D], ``weight`` [C, 4D] -> [T, C], in autocast's
    type."""
    device = tokens.device.type
    dtype = product_type(device)
    with torch.autocast(device, enabled=False):
        return _FirstLayer.apply(query.float(), tokens.float(), weight, bias, dtype, *segments)


def product_type(device: str) -> torch.dtype:
    """Autocast's."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


class _FirstLayer(torch.autograd.Function):
    """``(Wq + Wd) q + bias`` once a sample, in float32, plus ``[Wk - Wd, Wp] [k, q * k]`` for each token, in ``dtype``."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        dtype: torch.dtype,
        *segments: Tensor,
    ) -> Tensor:
        sample = Segments(*segments).sample
        of_query, of_pair = _split(weight, dtype)  # [C, D], [C, 2D]
        queries = query.index_select(0, sample)  # [T, D]
        pairs = fill(_beside(tokens, queries * tokens, dtype))  # [T, 2D], or some rows more
        ctx.save_for_backward(query, tokens, queries, pairs, of_query, of_pair, *segments)
        hidden = (pairs @ of_pair.t())[: tokens.shape[0]]
        return hidden.add_(torch.addmm(bias, query, of_query.t()).to(dtype).index_select(0, sample))

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, tokens, queries, pairs, of_query, of_pair, *offsets = ctx.saved_tensors
        segments = Segments(*offsets)
        by_sample = sum_rows(gradient.float(), segments)  # [B, C]
        gradient = fill(gradient)
        for_tokens, for_products = (gradient @ of_pair)[: tokens.shape[0]].chunk(2, dim=1)  # each [T, D]
        for_query = sum_rows(for_products * tokens, segments).addmm_(by_sample, of_query)
        weight_of_query = by_sample.t() @ query  # [C, D]
        weight_of_token, weight_of_product = (gradient.t() @ pairs).float().chunk(2, dim=1)
        weight = (weight_of_query, weight_of_token, weight_of_query - weight_of_token, weight_of_product)
        return (
            for_query,
            torch.addcmul(for_tokens, for_products, queries),
            torch.cat(weight, dim=1),
            by_sample.sum(0),
            *(None,) * (1 + len(segments)),
        )


def _split(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``weight`` [C, 4D] of [q, k, q - k, q * k] as what q [C, D] and what [k, q * k] [C, 2D] are multiplied by."""
    for_query, for_token, for_difference, for_product = weight.chunk(4, dim=1)
    return for_query + for_difference, _beside(for_token - for_difference, for_product, dtype)


def _beside(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``[left, right]`` [N, 2D] of [N, D] each."""
    return torch.cat((left, right), dim=1, out=left.new_empty(left.shape[0], 2 * left.shape[1], dtype=dtype))
