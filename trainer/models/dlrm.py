"""DLRM (Naumov et al., 2019, "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
section 2).

``logit = top MLP(z, <v_i, v_j> of all pairs of z and the embeddings)``, ``z = bottom MLP(numbers)``. Without numbers there is no
``z``.

Shapes: B rows of this rank, F vectors (z, sparse features, sequences), D embedding_dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.batch import Batch
from data_loaders.errors import UserError
from data_loaders.schema import Layout, Schema
from trainer.models import FeatureAxes
from trainer.models.inputs import field_dim, pairs
from trainer.modules.embeddings import PooledGroups, bag_configs, build_embedding_bags
from trainer.modules.head import Head
from trainer.modules.interactions import InnerProduct
from trainer.modules.mlp import MLP, check_units


class DLRM(nn.Module):
    """``bottom_units``: of the network over the numbers, before its last layer, which is as wide as the embeddings;
    ``hidden_units``, ``normalization``, ``dropout``: of the top network.

    Raises ``UserError`` where the schema has no sparse feature, only one vector, or tables that differ in
    ``embedding_dim``, or for hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        bottom_units: list[int] = [512, 256],
        hidden_units: list[int] = [1024, 1024, 512, 256],
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        super().__init__()
        check_units(bottom_units, "model.bottom_units")
        check_units(hidden_units, "model.hidden_units")
        self.layout: Layout = schema.layout()
        dim = field_dim(schema, "dlrm")
        if len(self.layout.pooled) + bool(schema.dense) < 2:
            raise UserError("schema.features has one feature: model dlrm multiplies two or more vectors")
        configs = bag_configs(schema, self.layout.pooled)
        self.head = DLRMHead(
            configs, self.layout, len(schema.dense), dim, bottom_units, hidden_units, normalization, dropout
        )
        self.embedding_bags = build_embedding_bags(configs, device)

    def forward(self, batch: Batch) -> Tensor:
        pooled = self.embedding_bags(batch.sparse)
        return self.head(batch.dense, pooled, batch.weights)  # [B]

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        """``z`` is made of all numbers and counts as none's."""
        fields: list[tuple[str, ...]] = [(key,) for key in schema.layout().pooled]
        if not schema.dense:
            return {"head.top.layers.0.weight": (1, pairs(fields))}
        return {
            "head.bottom.layers.0.weight": (1, [(name, 1) for name in schema.dense]),
            "head.top.layers.0.weight": (1, [((), field_dim(schema, "dlrm")), *pairs([(), *fields])]),
        }


class DLRMHead(Head):
    def __init__(
        self,
        configs: list[EmbeddingBagConfig],
        layout: Layout,
        num_dense: int,
        dim: int,
        bottom_units: list[int],
        hidden_units: list[int],
        normalization: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.groups = PooledGroups(configs, layout.pooled)
        self.bottom = MLP(num_dense, bottom_units, out_dim=dim) if num_dense else None
        self.product = InnerProduct()
        vectors = len(layout.pooled) + bool(num_dense)
        self.top = MLP(
            vectors * (vectors - 1) // 2 + dim * bool(num_dense),
            hidden_units,
            normalization=normalization,
            dropout=dropout,
            out_dim=1,
        )

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        embedded, _ = self.groups(pooled)
        vectors = embedded.unflatten(1, (-1, self.dim))  # [B, F, D]
        if self.bottom is None:
            return self.top(self.product(vectors), valid=weights).squeeze(1)
        numbers = functional.relu(self.bottom(dense))  # [B, D]
        vectors = torch.cat((numbers.unsqueeze(1), vectors), dim=1)
        return self.top(torch.cat((numbers, self.product(vectors)), dim=1), valid=weights).squeeze(1)


Model = DLRM
