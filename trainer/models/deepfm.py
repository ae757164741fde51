"""DeepFM (Guo et al., 2017, "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", eq. 1-4).

``logit = <w, x> + sum over i < j of <v_i, v_j> + MLP(v_1, …, v_F)``: the factorization machine and the network share
the embeddings. A number is the field ``value * vector``; a sequence is one field, pooled.

Shapes: B rows of this rank, F fields (sparse features, sequences and numbers), D embedding_dim, L fields with a linear
weight, N numbers.
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
from trainer.modules.interactions import FactorizationMachine
from trainer.modules.mlp import MLP, DenseFields, aligned, check_units


class DeepFM(PooledModel):
    """``hidden_units``, ``normalization``, ``dropout``: of the network. First-order weights belong to every number and
    sparse feature, and to the sequences with ``wide: true``.

    Raises ``UserError`` where the schema has no sparse feature or its tables differ in ``embedding_dim``, or for
    hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        hidden_units: list[int] = [384, 384, 384],
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        check_units(hidden_units, "model.hidden_units")
        layout, dim = schema.layout(), field_dim(schema, "deepfm")
        tables, groups = pooled_lookup(schema, layout.pooled, first_order(schema))
        in_dim = len(field_names(schema)) * dim
        head = DeepFMHead(
            groups,
            dense_fields(schema, dim),
            MLP(in_dim, hidden_units, normalization=normalization, dropout=dropout, out_dim=1),
            dim,
        )
        super().__init__(layout, tables, head, device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        dim = field_dim(schema, "deepfm")
        axes: FeatureAxes = {"head.deep.layers.0.weight": (1, [(key, dim) for key in field_names(schema)])}
        return axes | dense_field_axes(schema)


class DeepFMHead(Head):
    def __init__(self, groups: PooledGroups, dense_fields: DenseFields | None, deep: MLP, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.groups, self.wide, self.dense_fields = groups, WideLookup(), dense_fields
        self.factorization_machine = FactorizationMachine()
        self.deep = deep

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        embedded, rows = self.groups(pooled)  # [B, (F - N) D], [B, 4 (L - N)]
        linear, fields = self.wide(rows).sum(1), embedded.unflatten(1, (-1, self.dim))
        if (numbers := self.dense_fields) is None:
            deep = self.deep(aligned(embedded), valid=weights)  # [B, 1]
            return self.factorization_machine(linear, fields) + deep.squeeze(1)
        of_ids, of_numbers = self.deep.layers[0].weight.split((embedded.shape[1], numbers.vectors.numel()), dim=1)
        first = aligned(of_ids, numbers.folded(of_numbers), on_gpu=True)  # for numbers in place of their fields
        deep = self.deep(aligned(embedded, dense, on_gpu=True), valid=weights, first=first)
        return self.factorization_machine(linear, fields, dense, numbers.weights, numbers.vectors) + deep.squeeze(1)


Model = DeepFM
