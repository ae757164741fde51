"""Interests from histories whose order matters: BST's transformer, DIEN's two recurrent layers. Tokens in, interests out.

Shapes: B samples, T tokens (events) of all of them, L steps of the longest history, D width of an event.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from trainer.modules.interactions import normal
from trainer.modules.jagged import Segments, expand, from_the_end, segment_softmax, weighted_sum


class Transformer(nn.Module):
    """A transformer block over a history and, as its last item, the candidate, whose output is the interest (Chen et al.,
    2019, "Behavior Sequence Transformer", section 2.2). Each item has a learned vector for its distance from the candidate
    added to it, up to ``positions``. Only the candidate's output is read, so the others' attention need not be computed: time
    and memory grow with T, and nothing is padded."""

    def __init__(self, dim: int, positions: int, heads: int, units: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.positions = normal(positions + 1, dim, fan_in=dim)
        self.query, self.key, self.value = (normal(dim, dim, fan_in=dim) for _ in range(3))
        self.output = normal(dim, dim, fan_in=dim)
        self.first, self.first_bias = normal(units, dim, fan_in=dim), nn.Parameter(torch.zeros(units))
        self.second, self.second_bias = normal(dim, units, fan_in=units), nn.Parameter(torch.zeros(dim))
        self.gains, self.biases = nn.Parameter(torch.ones(2, dim)), nn.Parameter(torch.zeros(2, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, candidate: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
        """[B, D], [T, D], [B + 1] -> [B, D] float32."""
        segments = Segments.of(offsets, tokens.shape[0])
        distance = (from_the_end(segments) + 1).clamp(max=self.positions.shape[0] - 1)
        tokens = tokens + functional.embedding(distance, self.positions)
        candidate = candidate + self.positions[0]
        hidden = self._norm(0, candidate + self.dropout(self._attended(candidate, tokens, segments)))
        inner = functional.leaky_relu(functional.linear(hidden, self.first, self.first_bias))
        return self._norm(1, hidden + self.dropout(functional.linear(inner, self.second, self.second_bias)))

    def _norm(self, place: int, values: Tensor) -> Tensor:
        return functional.layer_norm(values.float(), values.shape[1:], self.gains[place], self.biases[place])

    def _attended(self, candidate: Tensor, tokens: Tensor, segments: Segments) -> Tensor:
        """Heads beside each other, times ``output``: [B, D]."""
        together, places = with_candidate(candidate, tokens, segments)
        queries = functional.linear(candidate, self.query).chunk(self.heads, dim=1)
        keys = functional.linear(together, self.key).chunk(self.heads, dim=1)
        values = functional.linear(together, self.value).chunk(self.heads, dim=1)
        found = []
        for query, key, value in zip(queries, keys, values, strict=True):
            scores = (expand(query.float(), places) * key.float()).sum(1) / math.sqrt(key.shape[1])
            found.append(weighted_sum(segment_softmax(scores, places), value, places))
        return functional.linear(torch.cat(found, dim=1), self.output)


def with_candidate(candidate: Tensor, tokens: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
    """Each sample's tokens, then its candidate: [T + B, D]."""
    count, samples = tokens.shape[0], torch.arange(candidate.shape[0], device=tokens.device)
    offsets = segments.offsets + torch.arange(candidate.shape[0] + 1, device=tokens.device)
    places = torch.cat((segments.tokens + segments.sample, segments.offsets[1:] + samples))
    both = torch.cat((tokens, candidate))
    return torch.zeros_like(both).index_copy(0, places, both), Segments.of(offsets, count + candidate.shape[0])


class Recurrent(nn.Module):
    """A GRU layer (``u``, ``r``, ``h~`` along the first axis of its weights):
    ``h_t = (1 - a_t u_t) h_{t-1} + a_t u_t h~_t``, with an attention ``a`` AUGRU, with ones a GRU (Zhou et al., 2019, "Deep
    Interest Evolution Network", equations 2 to 5 and 15, 16)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inputs, self.hidden = normal(3, dim, dim, fan_in=dim), normal(3, dim, dim, fan_in=dim)
        self.bias = nn.Parameter(torch.zeros(3, dim))

    def forward(self, tokens: Tensor, attention: Tensor, steps: "Steps") -> Tensor:
        """[T, D], [T] -> h after each step, [B, L, D] float32; past a history's end as at its end."""
        projected = steps.padded(functional.linear(tokens, self.inputs.flatten(0, 1), self.bias.flatten()).float())
        gates, state = (
            steps.padded(attention.float().unsqueeze(1)),
            projected.new_zeros(len(projected), tokens.shape[1]),
        )
        weight, states = self.hidden.flatten(0, 1), []
        for step in range(steps.length):
            update, reset, new = projected[:, step].chunk(3, dim=1)
            of_update, of_reset, of_new = functional.linear(state, weight).float().chunk(3, dim=1)
            update = gates[:, step] * torch.sigmoid(update + of_update)
            candidate = torch.tanh(new + torch.sigmoid(reset + of_reset) * of_new)
            state = torch.lerp(state, candidate, update)
            states.append(state)
        return torch.stack(states, dim=1)


class Steps:
    """Histories as steps. ``length``: of the longest one, where the host knows it without waiting, or else ``most``."""

    def __init__(self, segments: Segments, most: int) -> None:
        offsets = segments.offsets
        known = offsets.device.type == "cpu" and not torch.compiler.is_compiling()
        self.length = max(1, int(offsets.diff().max())) if known else most
        self.samples = offsets.shape[0] - 1
        start = offsets.index_select(0, segments.sample)
        self.places = segments.sample * self.length + segments.tokens - start  # [T]

    def padded(self, values: Tensor) -> Tensor:
        """[T, C] -> [B, L, C], zeros past a history's end."""
        padded = values.new_zeros(self.samples * self.length, values.shape[1])
        return padded.index_copy(0, self.places, values).unflatten(0, (self.samples, self.length))

    def tokens(self, padded: Tensor) -> Tensor:
        """[B, L, C] -> [T, C]."""
        return padded.flatten(0, 1).index_select(0, self.places)


class InterestEvolution(nn.Module):
    """DIEN's interest (Zhou et al., 2019, section 4): a GRU extracts an interest at each event, an AUGRU follows how those that
    matter to the candidate evolve, ``a_t = softmax of h_t W e_a``. ``most``: events of a history at most.

    ``extracted``: for the auxiliary loss, where it is listened to: (h [T, D], events [T, D], their segments)."""

    def __init__(self, dim: int, most: int) -> None:
        super().__init__()
        self.most, self.keep = most, False
        self.extracted: tuple[Tensor, Tensor, Segments] | None = None
        self.extractor, self.evolution = Recurrent(dim), Recurrent(dim)
        self.weight = normal(dim, dim, fan_in=dim)

    def listen(self, keep: bool) -> None:
        self.keep, self.extracted = keep, None

    def take(self) -> tuple[Tensor, Tensor, Segments]:
        """What was extracted last, once: no graph is kept alive."""
        found, self.extracted = self.extracted, None
        assert found is not None
        return found

    def forward(self, candidate: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
        """[B, D], [T, D], [B + 1] -> [B, D] float32; zeros for an empty history."""
        segments = Segments.of(offsets, tokens.shape[0])
        steps = Steps(segments, self.most)
        interests = steps.tokens(self.extractor(tokens, tokens.new_ones(tokens.shape[0]), steps))  # [T, D]
        self.extracted = (interests, tokens, segments) if self.keep else None
        queries = expand(functional.linear(candidate, self.weight).float(), segments)  # [T, D]
        attention = segment_softmax((interests * queries).sum(1), segments)
        return self.evolution(interests, attention, steps)[:, -1]


def auxiliary_loss(interests: Tensor, tokens: Tensor, segments: Segments) -> Tensor:
    """Whether ``<h_t, e>`` tells the next event from another one: the mean of ``-log s(<h_t, e_{t+1}>) - log(1 - s(<h_t, n_t>))``
    over all steps but each history's last (Zhou et al., 2019, equation 6). ``n_t`` is the event half a batch further: of another
    history, and the same whenever the same batch is seen."""
    if tokens.shape[0] == 0:
        return tokens.sum() + interests.sum()
    counts = (from_the_end(segments) > 0).float()  # [T]
    following, other = tokens.roll(-1, 0), tokens.roll(-(tokens.shape[0] // 2) - 1, 0)
    right = functional.softplus(-(interests * following).sum(1))
    wrong = functional.softplus((interests * other).sum(1))
    return ((right + wrong) * counts).sum() / counts.sum().clamp(min=1)


class AddedLoss(torch.autograd.Function):
    """The logits as they are, while backward also reaches ``loss`` [], as if it were added to the rank's own."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones_like(ctx.saved_tensors[0])
