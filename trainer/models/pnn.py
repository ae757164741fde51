"""IPNN and OPNN (Qu et al., 2016, "Product-based Neural Networks for User Response Prediction", section III).

``logit = MLP(relu(W_z z + W_p p + b))``: ``z`` is all fields beside each other, ``p`` their products: for IPNN the inner products
of all pairs (not factorised into rank 1, as in the authors' own program), for OPNN the outer product of their sum.

Shapes: B rows of this rank, F fields (sparse features, sequences and numbers), D embedding_dim, H units of the first layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.errors import UserError
from data_loaders.schema import Schema, one_of
from trainer.models import FeatureAxes
from trainer.models.inputs import field_dim, field_names, pairs
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.embeddings import DEFAULT_INIT_STD, PooledGroups
from trainer.modules.head import Head
from trainer.modules.interactions import InnerProduct, OuterProduct
from trainer.modules.mlp import MLP, check_units
from trainer.modules.normalization import build_normalization, normalize

PRODUCTS = ("inner", "outer")


class PNN(PooledModel):
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
        check_units(hidden_units, "model.hidden_units")
        one_of(product, PRODUCTS, "model.product")
        layout, dim, num_fields = schema.layout(), field_dim(schema, "pnn"), len(field_names(schema))
        if product == "inner" and num_fields < 2:
            raise UserError(
                "schema.features has one feature: model pnn with model.product=inner multiplies two or more"
            )
        tables, groups = pooled_lookup(schema, layout.pooled)
        width, num_products = hidden_units[0], num_fields * (num_fields - 1) // 2 if product == "inner" else dim * dim
        head = PNNHead(
            groups,
            number_vectors(len(schema.dense), dim),
            InnerProduct() if product == "inner" else OuterProduct(),
            nn.Linear(num_fields * dim, width),
            # By name, since the columns of the two kinds belong to different features.
            nn.ModuleDict({product: nn.Linear(num_products, width, bias=False)}),
            MLP(width, hidden_units[1:], normalization=normalization, dropout=dropout, out_dim=1),
            build_normalization(normalization, width),
            nn.Dropout(dropout),
            dim,
        )
        super().__init__(layout, tables, head, device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        """A column of OPNN's products belongs to all fields, which are summed."""
        dim, names = field_dim(schema, "pnn"), field_names(schema)
        axes: FeatureAxes = {
            "head.linear.weight": (1, [(key, dim) for key in names]),
            "head.products.inner.weight": (1, pairs([(key,) for key in names])),
        }
        return axes | ({"head.number_vectors": (0, [(name, 1) for name in schema.dense])} if schema.dense else {})


def number_vectors(num_dense: int, dim: int) -> nn.Parameter | None:
    return nn.Parameter(nn.init.normal_(torch.empty(num_dense, dim), std=DEFAULT_INIT_STD)) if num_dense else None


class PNNHead(Head):
    def __init__(
        self,
        groups: PooledGroups,
        number_vectors: nn.Parameter | None,
        product: InnerProduct | OuterProduct,
        linear: nn.Linear,
        products: nn.ModuleDict,
        deep: MLP,
        normalization: nn.Module,
        dropout: nn.Dropout,
        dim: int,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.groups, self.number_vectors, self.product, self.linear = groups, number_vectors, product, linear
        self.products, self.deep, self.normalization, self.dropout = products, deep, normalization, dropout

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
