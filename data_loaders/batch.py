"""One training batch of one rank, as the pipeline moves it.

Shapes: B rows of this rank (equal on all ranks), D dense features.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass(frozen=True)
class Cursor:
    """Where in the data a global batch ends: after ``step`` global batches of epoch ``epoch``. ``rows`` came with this
    one over all ranks, padding left out; ``local_rows`` of them on this rank, the first of its batch.

    ``dropped`` bool [local_rows]: rows that a policy of the schema left out; None where there are none. ``origin`` int64
    [local_rows], where the loader records it: the rows' numbers in the manifest, counted over all files in order."""

    epoch: int
    step: int
    rows: int
    local_rows: int
    dropped: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)
    origin: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)


@dataclass
class Batch(Pipelineable):
    """``dense`` float32 [B, D]; ``sparse`` and ``sequence`` ids, one key a feature, int32 where no table has more rows than that
    counts, else int64; ``weighted``: ids with a weight each (``Layout.weighted``); ``labels`` and ``weights``
    float32 [B]. Padding and dropped rows have weight 0 and no ids. ``normalizer`` float32 []: its mean over ranks is the
    number of rows that count in the global batch over the number of ranks, so that ``sum(weights * loss)`` over that
    mean, averaged over ranks, is the mean loss of the global batch. It is that mean on every rank, unless the schema may
    drop rows: then it is this rank's own number of rows. It stays on the host: a factor that no kernel has to compute.
    ``group_ids`` int64 [B, G]: of G columns (``data_loaders.group_ids``), where the loader has ``group_by``; 0 in padding."""

    dense: Tensor
    sparse: KeyedJaggedTensor
    sequence: KeyedJaggedTensor | None
    labels: Tensor
    weights: Tensor
    normalizer: Tensor
    cursor: Cursor
    group_ids: Tensor | None = None
    weighted: KeyedJaggedTensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in self._movable()}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        pinned = {name: getattr(self, name).pin_memory() for name in (*self._movable(), "normalizer")}
        return replace(self, **pinned)

    def record_stream(self, stream: torch.Stream) -> None:
        for name in self._movable():
            getattr(self, name).record_stream(stream)

    def _movable(self) -> tuple[str, ...]:
        names = ("dense", "sparse", "weighted", "sequence", "labels", "weights", "group_ids")
        return tuple(name for name in names if getattr(self, name) is not None)
