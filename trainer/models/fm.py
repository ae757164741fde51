"""FM (Rendle, 2010, "Factorization Machines", equation 1).

``logit = w_0 + <w, x> + sum over i < j of <v_i, v_j> x_i x_j``. A number is the field ``value * vector``; a bag or sequence
is one field, pooled, as in DeepFM, of which this is the part without the network.

Shapes: B rows of this rank, F fields (sparse features, sequences and numbers), D embedding_dim, N numbers.
"""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.schema import Schema
from trainer.models import FeatureAxes
from trainer.models.inputs import dense_field_axes, dense_fields, field_dim, first_order
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.embeddings import PooledGroups, WideLookup
from trainer.modules.head import Head
from trainer.modules.interactions import FactorizationMachine
from trainer.modules.mlp import DenseFields


class FM(PooledModel):
    """First-order weights belong to every number and sparse feature, and to the sequences with ``wide: true``.

    Raises ``UserError`` where the schema has no sparse feature or its tables differ in ``embedding_dim``."""

    def __init__(self, schema: Schema, *, device: torch.device) -> None:
        layout, dim = schema.layout(), field_dim(schema, "fm")
        tables, groups = pooled_lookup(schema, layout.pooled, first_order(schema))
        super().__init__(layout, tables, FMHead(groups, dense_fields(schema, dim), dim), device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        return dense_field_axes(schema)


class FMHead(Head):
    def __init__(self, groups: PooledGroups, dense_fields: DenseFields | None, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.groups, self.wide, self.dense_fields = groups, WideLookup(), dense_fields
        self.factorization_machine = FactorizationMachine()
        self.bias = nn.Parameter(torch.zeros(()))

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        embedded, rows = self.groups(pooled)
        linear, fields = self.wide(rows).sum(1) + self.bias, embedded.unflatten(1, (-1, self.dim))  # [B], [B, F - N, D]
        if (numbers := self.dense_fields) is None:
            return self.factorization_machine(linear, fields)
        return self.factorization_machine(linear, fields, dense, numbers.weights, numbers.vectors)


Model = FM
