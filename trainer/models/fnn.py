"""FNN (Zhang, Du and Wang, 2016, "Deep Learning over Multi-field Categorical Data", section 3.1, equations 1 to 6).

``logit = MLP(w_1 x_1, v_1 x_1, …, w_F x_F, v_F x_F)``: a network over each field's linear weight and vector, which begin as
those of a trained factorization machine and are trained on. They are those of model fm:

    model=fnn warm_start=<run of model fm> warm_start.skip=['dense/model.head.deep.*'] warm_start.drop=[dense/model.head.bias]

(The paper's w_0, an input that is constant, is left to the biases.)

Shapes: B rows of this rank, F fields (sparse features, sequences and numbers), D embedding_dim, L fields with a linear
weight, N numbers, H units of the first layer.
"""

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.schema import Schema
from trainer.models import FeatureAxes
from trainer.models.inputs import dense_field_axes, dense_fields, field_dim, field_names, first_order
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.embeddings import PooledGroups, WideLookup
from trainer.modules.head import Head
from trainer.modules.mlp import MLP, DenseFields, aligned, check_units


class FNN(PooledModel):
    """``hidden_units``, ``activation`` (tanh in the paper; relu, prelu, dice), ``normalization``, ``dropout``: of the network.

    Raises ``UserError`` where the schema has no sparse feature or its tables differ in ``embedding_dim``, or for
    hyperparameters out of range."""

    initialised_by = ("fm",)

    def __init__(
        self,
        schema: Schema,
        *,
        hidden_units: list[int] = [200, 300, 100],
        activation: str = "tanh",
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        check_units(hidden_units, "model.hidden_units")
        layout, dim, wide = schema.layout(), field_dim(schema, "fnn"), first_order(schema)
        tables, groups = pooled_lookup(schema, layout.pooled, wide)
        in_dim = len(wide) + len(schema.dense) + len(field_names(schema)) * dim
        head = FNNHead(
            groups,
            dense_fields(schema, dim),
            MLP(in_dim, hidden_units, activation=activation, normalization=normalization, dropout=dropout, out_dim=1),
        )
        super().__init__(layout, tables, head, device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        dim = field_dim(schema, "fnn")
        linear = [(key, 1) for key in (*first_order(schema), *schema.dense)]
        vectors = [(key, dim) for key in field_names(schema)]
        axes: FeatureAxes = {"head.deep.layers.0.weight": (1, [*linear, *vectors])}
        return axes | dense_field_axes(schema)


class FNNHead(Head):
    def __init__(self, groups: PooledGroups, dense_fields: DenseFields | None, deep: MLP) -> None:
        super().__init__()
        self.groups, self.wide, self.dense_fields, self.deep = groups, WideLookup(), dense_fields, deep

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        vectors, rows = self.groups(pooled)  # [B, (F - N) D], [B, 4 (L - N)]
        linear = self.wide(rows)  # [B, L - N]
        if (numbers := self.dense_fields) is None:
            return self.deep(aligned(linear, vectors), valid=weights).squeeze(1)
        widths = (linear.shape[1], dense.shape[1], vectors.shape[1], numbers.vectors.numel())
        of_linear, of_weights, of_vectors, of_fields = self.deep.layers[0].weight.split(widths, dim=1)
        of_numbers = torch.addcmul(
            numbers.folded(of_fields), of_weights, numbers.weights
        )  # [H, N], of the numbers themselves
        first = aligned(of_linear, of_vectors, of_numbers)
        return self.deep(aligned(linear, vectors, dense), valid=weights, first=first).squeeze(1)


Model = FNN
