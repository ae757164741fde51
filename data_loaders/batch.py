"""One training batch of one rank, as the pipeline moves it.

Shapes: B rows of this rank (equal on all ranks), D dense features.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass(frozen=True)
class Cursor:
    """Where in the data a global batch ends: after ``step`` global batches of epoch ``epoch``. ``rows`` came with this
    one over all ranks, padding left out; ``local_rows`` of them on this rank, the first of its batch."""

    epoch: int
    step: int
    rows: int
    local_rows: int


@dataclass
class Batch(Pipelineable):
    """``dense`` float32 [B, D]; ``sparse`` and ``sequence`` int64 ids, one key a feature; ``labels`` and ``weights``
    float32 [B]. Padding rows have weight 0 and no ids. ``normalizer`` float32 [] is the global number of rows over the
    number of ranks: ``sum(weights * loss) / normalizer``, averaged over ranks, is the mean loss of the global batch."""

    dense: Tensor
    sparse: KeyedJaggedTensor
    sequence: KeyedJaggedTensor | None
    labels: Tensor
    weights: Tensor
    normalizer: Tensor
    cursor: Cursor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in self._movable()}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        return replace(self, **{name: getattr(self, name).pin_memory() for name in self._movable()})

    def record_stream(self, stream: torch.Stream) -> None:
        for name in self._movable():
            getattr(self, name).record_stream(stream)

    def _movable(self) -> tuple[str, ...]:
        names = ("dense", "sparse", "sequence", "labels", "weights", "normalizer")
        return tuple(name for name in names if getattr(self, name) is not None)
