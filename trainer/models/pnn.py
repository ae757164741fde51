"""IPNN and OPNN (Qu et al., 2016, "Product-based Neural Networks for User Response Prediction", section III).

``logit = MLP(relu(W_z z + W_p p + b))``: ``z`` is all fields beside each other, ``p`` their products: for IPNN the inner products
of all pairs (not factorised into rank 1, as in the authors' own program), for OPNN the outer product of their sum.

Shapes: B rows of this rank, F fields (sparse features, sequences and numbers), D embedding_dim, H units of the first layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.batch import Batch
from data_loaders.errors import UserError
from data_loaders.schema import Layout, Schema, one_of
from trainer.models import FeatureAxes
from trainer.models.inputs import field_dim, field_names, pairs
from trainer.modules.embeddings import DEFAULT_INIT_STD, PooledGroups, bag_configs, build_embedding_bags
from trainer.modules.head import Head
from trainer.modules.interactions import InnerProduct, OuterProduct
from trainer.modules.mlp import MLP, check_units
from trainer.modules.normalization import build_normalization, normalize

PRODUCTS = ("inner", "outer")


class PNN(nn.Module):
    """``product``: inner (IPNN) or outer (OPNN); ``hidden_units``: of the product layer and the layers after it;
    ``normalization``, ``dropout``: after each.

    Raises ``UserError`` where the schema has no sparse feature, only one field for inner products, or tables that differ
    in ``embedding_dim``, or for hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        product: str = "inner",
        hidden_units: list[int] = [300, 300, 300],
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        super().__init__()
        check_units(hidden_units, "model.hidden_units")
        one_of(product, PRODUCTS, "model.product")
        self.layout: Layout = schema.layout()
        dim = field_dim(schema, "pnn")
        if product == "inner" and len(field_names(schema)) < 2:
            raise UserError(
                "schema.features has one feature: model pnn with model.product=inner multiplies two or more"
            )
        configs = bag_configs(schema, self.layout.pooled)
        self.head = PNNHead(configs, self.layout, len(schema.dense), dim, product, hidden_units, normalization, dropout)
        self.embedding_bags = build_embedding_bags(configs, device)

    def forward(self, batch: Batch) -> Tensor:
        pooled = self.embedding_bags(batch.sparse)
        return self.head(batch.dense, pooled, batch.weights)  # [B]

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        """A column of OPNN's products belongs to all fields, which are summed."""
        dim, names = field_dim(schema, "pnn"), field_names(schema)
        axes: FeatureAxes = {
            "head.linear.weight": (1, [(key, dim) for key in names]),
            "head.products.inner.weight": (1, pairs([(key,) for key in names])),
        }
        return axes | ({"head.number_vectors": (0, [(name, 1) for name in schema.dense])} if schema.dense else {})


class PNNHead(Head):
    def __init__(
        self,
        configs: list[EmbeddingBagConfig],
        layout: Layout,
        num_dense: int,
        dim: int,
        product: str,
        hidden_units: list[int],
        normalization: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.groups = PooledGroups(configs, layout.pooled)
        self.number_vectors = nn.Parameter(torch.empty(num_dense, dim)) if num_dense else None
        if self.number_vectors is not None:
            nn.init.normal_(self.number_vectors, std=DEFAULT_INIT_STD)
        num_fields = len(layout.pooled) + num_dense
        self.product = InnerProduct() if product == "inner" else OuterProduct()
        num_products = num_fields * (num_fields - 1) // 2 if product == "inner" else dim * dim
        self.linear = nn.Linear(num_fields * dim, hidden_units[0])
        # By name, since the columns of the two kinds belong to different features.
        self.products = nn.ModuleDict({product: nn.Linear(num_products, hidden_units[0], bias=False)})
        self.deep = MLP(hidden_units[0], hidden_units[1:], normalization=normalization, dropout=dropout, out_dim=1)
        self.normalization = build_normalization(normalization, hidden_units[0])
        self.dropout = nn.Dropout(dropout)

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        embedded, _ = self.groups(pooled)
        fields = embedded.unflatten(1, (-1, self.dim))  # [B, F, D]
        if self.number_vectors is not None:
            fields = torch.cat((fields, dense.unsqueeze(2) * self.number_vectors), dim=1)
        (products,) = self.products.values()
        hidden = self.linear(fields.flatten(1)) + products(self.product(fields))  # [B, H]
        hidden = normalize(self.normalization, hidden, weights)
        return self.deep(self.dropout(functional.relu(hidden)), valid=weights).squeeze(1)


Model = PNN
