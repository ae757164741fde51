"""Wide & Deep (Cheng et al., 2016, "Wide & Deep Learning for Recommender Systems", equation 3).

``logit = w_wide . [x, crosses] + w_deep . a(embeddings, numbers) + b``: a linear model over sparse features and their
cross products beside a ReLU network over the embeddings of all features.

Shapes: B rows of this rank, F linear features, D summed width of the embedded features.
"""

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.schema import Schema
from trainer.models import FeatureAxes
from trainer.models.inputs import concatenated, total_width
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.embeddings import PooledGroups, WideLookup
from trainer.modules.head import Head
from trainer.modules.mlp import MLP, aligned, check_units


class WideDeep(PooledModel):
    """``hidden_units``, ``normalization``, ``dropout``: of the deep part. The linear part uses the schema's ``wide``
    features and crosses.

    Raises ``UserError`` where the schema has no sparse feature, or for hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        hidden_units: list[int] = [1024, 512, 256],
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        check_units(hidden_units, "model.hidden_units")
        layout, in_dim = schema.layout(crosses=True), total_width(concatenated(schema, "wide_deep"))
        deep = [key for key in layout.pooled if key in schema.features]
        wide = [key for key in layout.pooled if key in schema.wide]
        tables, groups = pooled_lookup(schema, deep, wide)
        network = MLP(in_dim, hidden_units, normalization=normalization, dropout=dropout, out_dim=1)
        super().__init__(layout, tables, WideDeepHead(groups, network), device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        return {"head.deep.layers.0.weight": (1, concatenated(schema, "wide_deep"))}


class WideDeepHead(Head):
    def __init__(self, groups: PooledGroups, deep: MLP) -> None:
        super().__init__()
        self.groups, self.wide, self.deep = groups, WideLookup(), deep

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        embedded, rows = self.groups(pooled)  # [B, D], [B, 4F]
        deep = self.deep(aligned(dense, embedded), valid=weights).squeeze(1)  # [B]
        return self.wide(rows).sum(1) + deep


Model = WideDeep
