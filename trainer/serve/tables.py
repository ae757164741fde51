"""Tables read where they lie, in mapped files, and the lookups over them that stand in for TorchRec's in a model.

A row is stored as fp32, fp16, or int8 with a scale and an offset of its own (FBGEMM's fused layout: ``dim`` bytes, then two
fp32); it is float32 wherever it is computed with. Of a wide table's rows ``[w, z, n, g]`` only w is stored, as the others
are its optimizer's.

Shapes: R requests, N rows to score, D embedding_dim, T ids of one feature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import fbgemm_gpu  # noqa: F401  registers torch.ops.fbgemm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from trainer.modules.embeddings import WIDE_DIM, WIDE_WEIGHT_SLOT
from trainer.modules.requests import RequestJagged

KEY = "rows"  # of the one tensor in a table's file
SCALE_BYTES = 8  # scale and offset of an int8 row


def stored(rows: Tensor, form: str, *, wide: bool) -> Tensor:
    """``rows`` [n, D] fp32 or fp16 as they are stored: ``form`` fp32, fp16 or int8. A single weight gains nothing from int8:
    it is fp16 then."""
    if wide:
        rows, form = rows[:, WIDE_WEIGHT_SLOT : WIDE_WEIGHT_SLOT + 1], "fp16" if form == "int8" else form
    if form == "int8":
        return torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(rows.float().contiguous())
    return rows.to({"fp32": torch.float32, "fp16": torch.float16}[form]).contiguous()


class MappedTable:
    """``table(ids [T]) -> [T, D]`` float32, of ``rows`` as ``stored`` made them."""

    def __init__(self, rows: Tensor, *, wide: bool) -> None:
        self.rows, self.wide = rows, wide

    @property
    def nbytes(self) -> int:
        return self.rows.numel() * self.rows.element_size()

    def __call__(self, ids: Tensor) -> Tensor:
        found = self.rows.index_select(0, ids)
        if found.dtype == torch.uint8:
            found = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(found)
        found = found.float()
        return functional.pad(found, (WIDE_WEIGHT_SLOT, WIDE_DIM - 1 - WIDE_WEIGHT_SLOT)) if self.wide else found


@dataclass(frozen=True)
class RequestIds:
    """Ids of N rows that belong to R requests: ``contexts`` has the features that all rows of a request share, one row a
    request, ``candidates`` the others, one row each; ``request`` [N] is the request of each row."""

    contexts: KeyedJaggedTensor | None
    candidates: KeyedJaggedTensor | None
    request: Tensor

    def __getitem__(self, key: str) -> tuple[JaggedTensor, bool]:
        """A feature's ids, and whether they are a context's."""
        shared = self.candidates is None or key not in self.candidates.keys()  # noqa: SIM118  it is no dict
        return (self.contexts if shared else self.candidates)[key], shared


class MappedBags(nn.Module):
    """What an ``EmbeddingBagCollection`` of the same tables computes: a pooled vector a feature and row."""

    def __init__(self, collection: EmbeddingBagCollection, tables: Mapping[str, MappedTable]) -> None:
        super().__init__()
        configs = collection.embedding_bag_configs()
        self._names = [name for names in get_embedding_names_by_table(configs) for name in names]
        self._widths = [config.embedding_dim for config in configs for _ in config.feature_names]
        self._lookups = [
            (feature, tables[config.name], config.pooling == PoolingType.MEAN)
            for config in configs
            for feature in config.feature_names
        ]

    def forward(self, features: RequestIds) -> KeyedTensor:
        vectors = []
        for feature, table, mean in self._lookups:
            ids, shared = features[feature]
            pooled = pool(table(ids.values()), ids, mean=mean)
            vectors.append(pooled.index_select(0, features.request) if shared else pooled)
        return KeyedTensor(self._names, self._widths, torch.cat(vectors, dim=1))


class MappedEmbeddings(nn.Module):
    """What an ``EmbeddingCollection`` of the same tables computes: a vector an id."""

    def __init__(self, collection: EmbeddingCollection, tables: Mapping[str, MappedTable]) -> None:
        super().__init__()
        self._lookups = [
            (feature, tables[config.name])
            for config in collection.embedding_configs()
            for feature in config.feature_names
        ]

    def forward(self, features: RequestIds) -> dict[str, JaggedTensor]:
        found = {}
        for feature, table in self._lookups:
            ids, shared = features[feature]
            vectors = table(ids.values())
            found[feature] = (
                RequestJagged(vectors, ids.lengths(), features.request)
                if shared
                else JaggedTensor(values=vectors, lengths=ids.lengths(), offsets=ids.offsets())
            )
        return found


def pool(vectors: Tensor, ids: JaggedTensor, *, mean: bool) -> Tensor:
    """Sum or mean of each row's vectors: ``vectors`` [T, D] -> [rows, D]; zeros where there are none."""
    lengths = ids.lengths()
    if (weights := ids.weights_or_none()) is not None:
        vectors = vectors * weights.unsqueeze(1)
    if len(vectors) == len(lengths) and bool((lengths == 1).all()):
        return vectors
    positions = torch.arange(len(vectors))
    summed = functional.embedding_bag(positions, vectors, ids.offsets(), mode="sum", include_last_offset=True)
    return summed * (1 / lengths.clamp(min=1).to(summed.dtype)).unsqueeze(1) if mean else summed


def replace_lookups(model: nn.Module, tables: Mapping[str, MappedTable]) -> None:
    """In place: every collection of tables in ``model`` reads from ``tables``."""
    kinds: Sequence[tuple[type, type]] = (
        (EmbeddingBagCollection, MappedBags),
        (EmbeddingCollection, MappedEmbeddings),
    )
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            for kind, mapped in kinds:
                if isinstance(child, kind):
                    parent.add_module(name, mapped(child, tables))
