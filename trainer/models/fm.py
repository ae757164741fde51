"""FM (Rendle, 2010, "Factorization Machines", equation 1).

``logit = w_0 + <w, x> + sum over i < j of <v_i, v_j> x_i x_j``. A number is the field ``value * vector``; a bag or sequence
is one field, pooled, as in DeepFM, of which this is the part without the network.

Shapes: B rows of this rank, F fields (sparse features, sequences and numbers), D embedding_dim.
"""

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.batch import Batch
from data_loaders.schema import Layout, Schema
from trainer.models import FeatureAxes
from trainer.models.inputs import field_dim, first_order
from trainer.modules.embeddings import DEFAULT_INIT_STD, PooledGroups, WideLookup, bag_configs, build_embedding_bags
from trainer.modules.head import Head
from trainer.modules.interactions import FactorizationMachine
from trainer.modules.mlp import DenseFields


class FM(nn.Module):
    """First-order weights belong to every number and sparse feature, and to the sequences with ``wide: true``.

    Raises ``UserError`` where the schema has no sparse feature or its tables differ in ``embedding_dim``."""

    def __init__(self, schema: Schema, *, device: torch.device) -> None:
        super().__init__()
        self.layout: Layout = schema.layout()
        dim, deep, wide = field_dim(schema, "fm"), list(self.layout.pooled), first_order(schema)
        configs = bag_configs(schema, deep, wide)
        self.head = FMHead(configs, deep, wide, len(schema.dense), dim)
        self.embedding_bags = build_embedding_bags(configs, device)

    def forward(self, batch: Batch) -> Tensor:
        pooled = self.embedding_bags(batch.sparse)
        return self.head(batch.dense, pooled)  # [B]

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        numbers = [(name, 1) for name in schema.dense]
        return {f"head.dense_fields.{name}": (0, numbers) for name in ("weights", "vectors")} if numbers else {}


class FMHead(Head):
    def __init__(
        self, configs: list[EmbeddingBagConfig], deep: list[str], wide: list[str], num_dense: int, dim: int
    ) -> None:
        super().__init__()
        self.dim = dim
        self.groups = PooledGroups(configs, deep, wide)
        self.wide = WideLookup()
        self.dense_fields = DenseFields(num_dense, dim, init_std=DEFAULT_INIT_STD) if num_dense else None
        self.factorization_machine = FactorizationMachine()
        self.bias = nn.Parameter(torch.zeros(()))

    def logits(self, dense: Tensor, pooled: KeyedTensor) -> Tensor:
        embedded, rows = self.groups(pooled)
        first_order = self.wide(rows).sum(1) + self.bias  # [B]
        fields = embedded.unflatten(1, (-1, self.dim))  # [B, F, D]
        if self.dense_fields is not None:
            linear, numbers = self.dense_fields(dense)
            first_order, fields = first_order + linear, torch.cat((fields, numbers), dim=1)
        return first_order + self.factorization_machine(fields)


Model = FM
