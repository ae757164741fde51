"""WuKong (Zhang et al., 2024, "Wukong: Towards a Scaling Law for Large-Scale Recommendation", section 3).

Layers of ``X' = LN([FMB(X), LCB(X)] + X)``: the factorization machine block makes new vectors of all products ``X X^T Y`` by a
network, the linear compression block is ``W X``. The logit is a network over the last layer's vectors. ``Y`` is learned, the
same for every row (the paper's makes it of the row, too). A number is the field ``value * vector``.

Shapes: B rows of this rank, F vectors of a layer, D embedding_dim.
"""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.schema import Schema
from trainer.models import FeatureAxes
from trainer.models.inputs import field_axes, field_dim, field_names
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.fields import Fields
from trainer.modules.head import Head
from trainer.modules.interactions import WukongLayer
from trainer.modules.mlp import MLP, check_least, check_units


class WuKong(PooledModel):
    """``layers``, each of ``product_vectors`` from the factorization machine block, whose products are of ``rank`` columns and
    whose network is of ``block_units``, and ``linear_vectors`` from the linear block; ``hidden_units``, ``normalization``,
    ``dropout``: of the network behind them.

    Raises ``UserError`` where the schema has no sparse feature or its tables differ in ``embedding_dim``, or for
    hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        layers: int = 3,
        product_vectors: int = 16,
        linear_vectors: int = 16,
        rank: int = 24,
        block_units: list[int] = [256],
        hidden_units: list[int] = [256, 128],
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        counts = {"layers": layers, "product_vectors": product_vectors, "linear_vectors": linear_vectors, "rank": rank}
        for key, value in counts.items():
            check_least(value, 1, f"model.{key}")
        check_units(block_units, "model.block_units")
        check_units(hidden_units, "model.hidden_units")
        layout, dim = schema.layout(), field_dim(schema, "wukong")
        tables, groups = pooled_lookup(schema, layout.pooled)
        vectors = product_vectors + linear_vectors
        sizes = [len(field_names(schema)), *[vectors] * (layers - 1)]
        head = WuKongHead(
            Fields(groups, len(schema.dense), dim),
            nn.Sequential(
                *(WukongLayer(count, dim, product_vectors, linear_vectors, rank, block_units) for count in sizes)
            ),
            MLP(vectors * dim, hidden_units, normalization=normalization, dropout=dropout, out_dim=1),
        )
        super().__init__(layout, tables, head, device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        """The first layer's vectors are features; ``X X^T Y`` has a row of ``rank`` numbers for each of them."""
        ones = [(name, 1) for name in field_names(schema)]
        first = {"projection": 0, "gain": 0, "bias": 0, "linear": 1, "residual": 1, "first": 1}
        axes: FeatureAxes = {f"head.layers.0.{name}": (axis, ones) for name, axis in first.items()}
        return axes | field_axes(schema)


class WuKongHead(Head):
    def __init__(self, fields: Fields, layers: nn.Sequential, output: MLP) -> None:
        super().__init__()
        self.fields, self.layers, self.output = fields, layers, output

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        fields, _ = self.fields(dense, pooled)
        return self.output(self.layers(fields).flatten(1), valid=weights).squeeze(1)


Model = WuKong
