"""What all models over pooled lookups have in common: tables, their lookup, and a head over it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from data_loaders.batch import Batch
from data_loaders.schema import Layout, Schema
from trainer.modules.embeddings import PooledGroups, bag_configs, build_embedding_bags
from trainer.modules.head import Head


class PooledModel(nn.Module):
    """``head(dense, pooled, weights)`` over one vector for every feature of ``layout``. The head is built by the caller, on the
    CPU and before the tables, which lie on ``device``."""

    def __init__(self, layout: Layout, tables: list[EmbeddingBagConfig], head: Head, device: torch.device) -> None:
        super().__init__()
        self.layout = layout
        self.head = head
        self.embedding_bags = build_embedding_bags(tables, device)

    def forward(self, batch: Batch) -> Tensor:
        pooled = self.embedding_bags(batch.sparse)
        return self.head(batch.dense, pooled, batch.weights)  # [B]


def pooled_lookup(
    schema: Schema, deep: Sequence[str], wide: Sequence[str] = ()
) -> tuple[list[EmbeddingBagConfig], PooledGroups]:
    """The tables of the features ``deep`` and of the linear weights of ``wide``, and what puts their columns in this order.
    Raises ``ValueError`` for a table name that TorchRec cannot hold."""
    tables = bag_configs(schema, deep, wide)
    return tables, PooledGroups(tables, deep, wide)
