"""Embedding & MLP, the base model of DIN (Zhou et al., 2018, "Deep Interest Network", section 4.2 and figure 2, left).

``logit = MLP(numbers, pooled features, pooled histories)``: DIN with a history pooled by its table's ``pooling`` (mean or sum)
in place of attention; the candidate is one of the features beside it. Inputs and activations are DIN's.

Shapes: B rows of this rank, D summed width of the embedded features.
"""

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.batch import Batch
from data_loaders.schema import Layout, Schema
from trainer.models import FeatureAxes
from trainer.models.inputs import concatenated, total_width
from trainer.modules.embeddings import PooledGroups, bag_configs, build_embedding_bags
from trainer.modules.head import Head
from trainer.modules.mlp import MLP, check_units


class EmbeddingMLP(nn.Module):
    """``hidden_units``, ``activation`` (dice, prelu, relu, tanh), ``normalization``, ``dropout``: of the network.

    Raises ``UserError`` where the schema has no sparse feature, or for hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        hidden_units: list[int] = [256, 128],
        activation: str = "dice",
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        super().__init__()
        check_units(hidden_units, "model.hidden_units")
        self.layout: Layout = schema.layout()
        in_dim = total_width(concatenated(schema, "embedding_mlp"))
        configs = bag_configs(schema, self.layout.pooled)
        self.head = EmbeddingMLPHead(
            configs, list(self.layout.pooled), in_dim, hidden_units, activation, normalization, dropout
        )
        self.embedding_bags = build_embedding_bags(configs, device)

    def forward(self, batch: Batch) -> Tensor:
        pooled = self.embedding_bags(batch.sparse)
        return self.head(batch.dense, pooled, batch.weights)  # [B]

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        return {"head.deep.layers.0.weight": (1, concatenated(schema, "embedding_mlp"))}


class EmbeddingMLPHead(Head):
    def __init__(
        self,
        configs: list[EmbeddingBagConfig],
        features: list[str],
        in_dim: int,
        hidden_units: list[int],
        activation: str,
        normalization: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.groups = PooledGroups(configs, features)
        self.deep = MLP(
            in_dim, hidden_units, activation=activation, normalization=normalization, dropout=dropout, out_dim=1
        )

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        embedded, _ = self.groups(pooled)  # [B, D]
        return self.deep(torch.cat((dense, embedded), dim=1), valid=weights).squeeze(1)


Model = EmbeddingMLP
