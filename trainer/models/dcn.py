"""DCN (Wang et al., 2017, "Deep & Cross Network for Ad Click Predictions", equations 1 to 5).

``logit = w . [cross network(x_0), deep network(x_0)] + b`` over ``x_0``, all numbers and embeddings beside each other.

Shapes: B rows of this rank, I width of x_0.
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
from trainer.modules.interactions import CrossNetwork
from trainer.modules.mlp import MLP, LogitLinear, aligned, check_least, check_units


class DCN(PooledModel):
    """``cross_layers``: of the cross network (0: the deep network alone); ``hidden_units``, ``normalization``, ``dropout``: of
    the deep one.

    Raises ``UserError`` where the schema has no sparse feature, or for hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        cross_layers: int = 6,
        hidden_units: list[int] = [1024, 1024],
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        check_units(hidden_units, "model.hidden_units")
        check_least(cross_layers, 0, "model.cross_layers")
        layout, in_dim = schema.layout(), total_width(concatenated(schema, "dcn"))
        tables, groups = pooled_lookup(schema, layout.pooled)
        head = DCNHead(
            groups,
            CrossNetwork(in_dim, cross_layers) if cross_layers else None,
            LogitLinear(in_dim) if cross_layers else None,
            MLP(in_dim, hidden_units, normalization=normalization, dropout=dropout, out_dim=1),
        )
        super().__init__(layout, tables, head, device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        names = ("deep.layers.0.weight", "cross.weights", "cross.biases", "cross_output.weight")
        return {f"head.{name}": (1, concatenated(schema, "dcn")) for name in names}


class DCNHead(Head):
    """``cross`` and its output layer are None in a model without cross layers."""

    def __init__(
        self, groups: PooledGroups, cross: CrossNetwork | None, cross_output: LogitLinear | None, deep: MLP
    ) -> None:
        super().__init__()
        self.groups, self.cross, self.cross_output, self.deep = groups, cross, cross_output, deep

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        embedded, _ = self.groups(pooled)
        inputs = torch.cat((dense, embedded), dim=1)  # [B, I]
        deep = self.deep(aligned(inputs), valid=weights).squeeze(1)  # [B]
        return deep if self.cross is None else deep + self.cross_output(self.cross(inputs))


Model = DCN
