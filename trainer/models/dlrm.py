"""DLRM (Naumov et al., 2019, "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
section 2).

``logit = top MLP(z, <v_i, v_j> of all pairs of z and the embeddings)``, ``z = bottom MLP(numbers)``. Without numbers there is no
``z``.

Shapes: B rows of this rank, F vectors (z, sparse features, sequences), D embedding_dim.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.errors import UserError
from data_loaders.schema import Schema
from trainer.models import FeatureAxes
from trainer.models.inputs import field_dim, pairs
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.embeddings import PooledGroups
from trainer.modules.head import Head
from trainer.modules.interactions import InnerProduct
from trainer.modules.mlp import MLP, aligned, check_units


class DLRM(PooledModel):
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
        check_units(bottom_units, "model.bottom_units")
        check_units(hidden_units, "model.hidden_units")
        layout, dim, has_numbers = schema.layout(), field_dim(schema, "dlrm"), bool(schema.dense)
        vectors = len(layout.pooled) + has_numbers
        if vectors < 2:
            raise UserError("schema.features has one feature: model dlrm multiplies two or more vectors")
        tables, groups = pooled_lookup(schema, layout.pooled)
        in_dim = vectors * (vectors - 1) // 2 + dim * has_numbers
        head = DLRMHead(
            groups,
            MLP(len(schema.dense), bottom_units, out_dim=dim) if has_numbers else None,
            MLP(in_dim, hidden_units, normalization=normalization, dropout=dropout, out_dim=1),
            dim,
        )
        super().__init__(layout, tables, head, device)

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
    def __init__(self, groups: PooledGroups, bottom: MLP | None, top: MLP, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.groups, self.bottom, self.product, self.top = groups, bottom, InnerProduct(), top

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        embedded, _ = self.groups(pooled)
        vectors = embedded.unflatten(1, (-1, self.dim))  # [B, F, D]
        if self.bottom is None:
            return self.top(self.product(vectors), valid=weights).squeeze(1)
        numbers = functional.relu(self.bottom(dense))  # [B, D]
        vectors = torch.cat((numbers.unsqueeze(1), vectors), dim=1)
        return self.top(aligned(numbers, self.product(vectors)), valid=weights).squeeze(1)


Model = DLRM
