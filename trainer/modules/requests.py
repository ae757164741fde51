"""Histories that all candidates of a request share, when a model is served.

Shapes: R requests, N rows to score, L events of one request's history, T events of all, D width of an event.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional
from torchrec.sparse.jagged_tensor import JaggedTensor


class RequestJagged(JaggedTensor):
    """Vectors of a history that all rows of a request share: ``values()`` and ``offsets()`` are, as a model expects them, of
    N rows, made when they are asked for; ``shared`` [T, D] and ``shared_offsets`` [R + 1] are of R requests."""

    def __init__(self, shared: Tensor, lengths: Tensor, request: Tensor) -> None:
        self.shared, self.request = shared, request
        self.shared_offsets = functional.pad(lengths.cumsum(0), (1, 0))
        self._expanded: Tensor | None = None
        super().__init__(values=shared[:0], lengths=lengths.index_select(0, request))

    def values(self) -> Tensor:
        if self._expanded is None:
            self._expanded = self.shared.index_select(0, self._positions())
        return self._expanded

    def of_requests(self) -> Iterator[tuple[Tensor, slice]]:
        """For each request that has rows: their numbers, ascending, and its events' place in ``shared``."""
        rows = torch.argsort(self.request, stable=True)
        counts = torch.bincount(self.request, minlength=len(self.shared_offsets) - 1).tolist()
        offsets = self.shared_offsets.tolist()
        for own, begin, end in zip(rows.split(counts), offsets, offsets[1:]):
            if len(own):
                yield own, slice(begin, end)

    def _positions(self) -> Tensor:
        """For each token of the N rows its place in ``shared``."""
        lengths = self.lengths()
        total = int(lengths.sum())
        # A row's first token in ``shared``, less its first among all rows'.
        begin = self.shared_offsets[:-1].index_select(0, self.request) - (lengths.cumsum(0) - lengths)
        return torch.arange(total) + torch.repeat_interleave(begin, lengths, output_size=total)
