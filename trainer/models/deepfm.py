"""DeepFM (Guo et al., 2017, "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", eq. 1-4).

``logit = <w, x> + sum over i < j of <v_i, v_j> + MLP(v_1, …, v_F)``: the factorization machine and the network share
the embeddings. A number is the field ``value * vector``; a sequence is one field, pooled.

Shapes: B rows of this rank, F fields (sparse features, sequences and numbers), D embedding_dim.
"""

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.batch import Batch
from data_loaders.schema import Layout, Schema
from trainer.models import FeatureAxes
from trainer.models.inputs import field_dim, field_names, first_order
from trainer.modules.embeddings import DEFAULT_INIT_STD, PooledGroups, WideLookup, bag_configs, build_embedding_bags
from trainer.modules.head import Head
from trainer.modules.interactions import FactorizationMachine
from trainer.modules.mlp import MLP, DenseFields, check_units


class DeepFM(nn.Module):
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
        super().__init__()
        check_units(hidden_units, "model.hidden_units")
        self.layout: Layout = schema.layout()
        deep = list(self.layout.pooled)
        wide = first_order(schema)
        dim = field_dim(schema, "deepfm")
        configs = bag_configs(schema, deep, wide)
        self.head = DeepFMHead(configs, deep, wide, len(schema.dense), dim, hidden_units, normalization, dropout)
        self.embedding_bags = build_embedding_bags(configs, device)

    def forward(self, batch: Batch) -> Tensor:
        pooled = self.embedding_bags(batch.sparse)
        return self.head(batch.dense, pooled, batch.weights)  # [B]

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        dim = field_dim(schema, "deepfm")
        axes: FeatureAxes = {"head.deep.layers.0.weight": (1, [(key, dim) for key in field_names(schema)])}
        if schema.dense:
            numbers = [(name, 1) for name in schema.dense]
            axes |= {f"head.dense_fields.{name}": (0, numbers) for name in ("weights", "vectors")}
        return axes


class DeepFMHead(Head):
    def __init__(
        self,
        configs: list[EmbeddingBagConfig],
        deep: list[str],
        wide: list[str],
        num_dense: int,
        dim: int,
        hidden_units: list[int],
        normalization: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.groups = PooledGroups(configs, deep, wide)
        self.wide = WideLookup()
        self.dense_fields = DenseFields(num_dense, dim, init_std=DEFAULT_INIT_STD) if num_dense else None
        self.factorization_machine = FactorizationMachine()
        self.deep = MLP(
            (len(deep) + num_dense) * dim, hidden_units, normalization=normalization, dropout=dropout, out_dim=1
        )

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        embedded, rows = self.groups(pooled)
        first_order = self.wide(rows).sum(1)  # [B]
        fields = embedded.unflatten(1, (-1, self.dim))  # [B, F, D]
        if self.dense_fields is not None:
            linear, numbers = self.dense_fields(dense)
            first_order, fields = first_order + linear, torch.cat((fields, numbers), dim=1)
        deep = self.deep(fields.flatten(1), valid=weights).squeeze(1)  # [B]
        return first_order + self.factorization_machine(fields) + deep


Model = DeepFM
