"""Target attention over histories (DIN; Zhou et al., KDD 2018).

T tokens are the events of all histories of the batch, one after the other; D is the width of an event.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.modules.jagged import Segments, expand, from_the_end, segment_softmax, segment_sum
from trainer.modules.mlp import MLP, activate, build_activation, check_units


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
