"""Embedding & MLP, the base model of DIN (Zhou et al., 2018, "Deep Interest Network", section 4.2 and figure 2, left).

``logit = MLP(numbers, pooled features, pooled histories)``: DIN with a history pooled by its table's ``pooling`` (mean or sum)
in place of attention; the candidate is one of the features beside it. Inputs and activations are DIN's.

Shapes: B rows of this rank, D summed width of the embedded features.
"""

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.schema import Schema
from trainer.models import FeatureAxes
from trainer.models.inputs import concatenated, total_width
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.embeddings import PooledGroups
from trainer.modules.head import Head
from trainer.modules.mlp import MLP, aligned, check_units


class EmbeddingMLP(PooledModel):
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
        check_units(hidden_units, "model.hidden_units")
        layout, in_dim = schema.layout(), total_width(concatenated(schema, "embedding_mlp"))
        tables, groups = pooled_lookup(schema, layout.pooled)
        network = MLP(
            in_dim, hidden_units, activation=activation, normalization=normalization, dropout=dropout, out_dim=1
        )
        super().__init__(layout, tables, EmbeddingMLPHead(groups, network), device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        return {"head.deep.layers.0.weight": (1, concatenated(schema, "embedding_mlp"))}


class EmbeddingMLPHead(Head):
    def __init__(self, groups: PooledGroups, deep: MLP) -> None:
        super().__init__()
        self.groups, self.deep = groups, deep

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        embedded, _ = self.groups(pooled)  # [B, D]
        return self.deep(aligned(dense, embedded), valid=weights).squeeze(1)


Model = EmbeddingMLP
