"""Wide & Deep (Cheng et al., 2016, "Wide & Deep Learning for Recommender Systems", equation 3).

``logit = w_wide . [x, crosses] + w_deep . a(embeddings, numbers) + b``: a linear model over sparse features and their
cross products beside a ReLU network over the embeddings of all features.

Shapes: B rows of this rank, F linear features, D summed width of the embedded features.
"""

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.batch import Batch
from data_loaders.schema import Layout, Schema
from trainer.embeddings import PooledGroups, WideLookup, bag_configs, build_embedding_bags
from trainer.models import FeatureAxes
from trainer.modules import MLP, Head, check_units


class WideDeep(nn.Module):
    """``hidden_units``, ``dropout``: of the deep part. The linear part uses the schema's ``wide`` features and crosses.

    Raises ``ValueError`` where the schema has no sparse feature, or for hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        hidden_units: list[int] = [1024, 512, 256],
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        super().__init__()
        check_units(hidden_units, "model.hidden_units")
        self.layout: Layout = schema.layout(crosses=True)
        deep = [key for key in self.layout.pooled if key in schema.features]
        wide = [key for key in self.layout.pooled if key in schema.wide]
        if not deep:
            raise ValueError("schema.features has no sparse feature or sequence: model wide_deep needs at least one")
        configs = bag_configs(schema, deep, wide)
        in_dim = len(schema.dense) + sum(schema.dim(schema.features[key].table) for key in deep)
        self.head = WideDeepHead(configs, deep, wide, in_dim, hidden_units, dropout)
        self.embedding_bags = build_embedding_bags(configs, device)

    def forward(self, batch: Batch) -> Tensor:
        pooled = self.embedding_bags(batch.sparse)
        return self.head(batch.dense, pooled)  # [B]

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        embedded = [(key, schema.dim(schema.features[key].table)) for key in schema.layout().pooled]
        return {"head.deep.layers.0.weight": (1, [*((name, 1) for name in schema.dense), *embedded])}


class WideDeepHead(Head):
    def __init__(
        self,
        configs: list[EmbeddingBagConfig],
        deep: list[str],
        wide: list[str],
        in_dim: int,
        hidden_units: list[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.groups = PooledGroups(configs, deep, wide)
        self.wide = WideLookup()
        self.deep = MLP(in_dim, hidden_units, dropout=dropout, out_dim=1)

    def logits(self, dense: Tensor, pooled: KeyedTensor) -> Tensor:
        embedded, rows = self.groups(pooled)  # [B, D], [B, 4F]
        deep = self.deep(torch.cat((dense, embedded), dim=1)).squeeze(1)  # [B]
        return self.wide(rows).sum(1) + deep


Model = WideDeep
