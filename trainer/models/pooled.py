"""What all models over pooled lookups have in common: tables, their lookup, and a head over it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.batch import Batch
from data_loaders.schema import Layout, Schema
from trainer.modules.embeddings import (
    JoinedColumns,
    PooledGroups,
    bag_configs,
    build_embedding_bags,
    build_weighted_bags,
    projections,
)
from trainer.modules.head import Head


class PooledModel(nn.Module):
    """``head(dense, pooled, weights)`` over one vector for every feature of ``layout``. The head is built by the caller, on the
    CPU and before the tables, which lie on ``device``."""

    def __init__(self, layout: Layout, tables: list[EmbeddingBagConfig], head: Head, device: torch.device) -> None:
        super().__init__()
        self.layout = layout
        self.head = head
        self.embedding_bags, self.weighted_bags = build_pooled(tables, layout, device)
        self.join = JoinedColumns()

    def forward(self, batch: Batch) -> Tensor:
        pooled = look_up_pooled(self.embedding_bags, self.weighted_bags, self.join, batch)
        return self.head(batch.dense, pooled, batch.weights)  # [B]


def build_pooled(
    tables: list[EmbeddingBagConfig], layout: Layout, device: torch.device
) -> tuple[EmbeddingBagCollection | None, EmbeddingBagCollection | None]:
    """The tables of ids without and with weights (``Layout.weighted``), each None where there are none."""
    weighted = [config for config in tables if config.feature_names[0] in layout.weighted]
    plain = [config for config in tables if config.feature_names[0] not in layout.weighted]
    return (
        build_embedding_bags(plain, device) if plain else None,
        build_weighted_bags(weighted, device) if weighted else None,
    )


def look_up_pooled(
    plain: EmbeddingBagCollection | None, weighted: EmbeddingBagCollection | None, join: JoinedColumns, batch: Batch
) -> KeyedTensor | None:
    """One vector for every pooled feature; None without tables. It is read as a part of a model's ``forward``."""
    if weighted is None:
        return plain(batch.sparse) if plain is not None else None
    if plain is None:
        return weighted(batch.weighted)
    return join(plain(batch.sparse), weighted(batch.weighted))


def pooled_lookup(
    schema: Schema, deep: Sequence[str], wide: Sequence[str] = ()
) -> tuple[list[EmbeddingBagConfig], PooledGroups]:
    """The tables of the features ``deep`` and of the linear weights of ``wide``, and what puts their columns in this order.
    Raises ``ValueError`` for a table name that TorchRec cannot hold."""
    tables = bag_configs(schema, deep, wide)
    return tables, PooledGroups(tables, deep, wide, projections(schema, deep))
