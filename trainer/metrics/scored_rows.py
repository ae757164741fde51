"""Rows with their logits, as metrics add them up: one batch, or several at once.

To add a batch to metrics takes a GPU some forty small kernels, whatever its size; so training keeps the batches of
``AT_ONCE`` steps and adds them together.

Shapes: B rows of a batch, n batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_LOGIT = 1e30  # keeps an infinite logit's log loss a (huge) number instead of NaN
AT_ONCE = 16  # batches


@dataclass(frozen=True)
class ScoredRows:
    """``logits``, ``labels`` and ``weights`` float64 [n B], the logits of rows that do not count 0; ``sums`` [6] of each
    batch, over its rows that count: weighted log loss, weights, weighted predictions, weighted labels, rows, NaN logits."""

    logits: Tensor
    labels: Tensor
    weights: Tensor
    sums: tuple[Tensor, ...]


@torch.no_grad()
def scored(logits: Sequence[Tensor], labels: Sequence[Tensor], weights: Sequence[Tensor]) -> ScoredRows:
    """Of n batches, whose tensors are [B] and of any floating type."""
    x, y, w = torch.cat(list(logits)), torch.cat(list(labels)).double(), torch.cat(list(weights))  # [n B]
    assert x.dim() == 1 and x.shape == y.shape == w.shape, (x.shape, w.shape)
    counted = w > 0
    nan = x.isnan() & counted
    x = x.double().masked_fill(nan | ~counted, 0.0).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    w = w.double()
    loss = x.clamp(min=0) - x * y + torch.log1p(torch.exp(-x.abs()))  # -y·log(p) - (1-y)·log(1-p)
    terms = torch.stack((loss * w, w, torch.sigmoid(x) * w, y * w, counted.double(), nan.double()))  # [6, n B]
    return ScoredRows(x, y, w, terms.view(len(terms), len(logits), -1).sum(2).unbind(1))


class CollectedRows:
    """Batches kept until ``flush``, or until there are ``AT_ONCE``: then each of ``add`` gets them.

    The last batch kept is not among those that a further one makes it add: what came before it is known to be good
    (``trainer.runtime.step_guard``)."""

    def __init__(self, *add: Callable[[ScoredRows], None]) -> None:
        self._add, self._kept = add, list[tuple[Tensor, Tensor, Tensor]]()

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """A batch, [B] each."""
        if self._kept and (len(self._kept) == AT_ONCE or self._kept[0][0].shape != logits.shape):
            self.flush()
        self._kept.append((logits, labels, weights))

    def flush(self) -> None:
        if not self._kept:
            return
        rows = scored(*zip(*self._kept, strict=True))
        for add in self._add:
            add(rows)
        self.clear()

    def clear(self) -> None:
        """Forgets them."""
        self._kept = []
