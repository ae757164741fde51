"""xDeepFM (Lian et al., 2018, "xDeepFM: Combining Explicit and Implicit Feature Interactions for Recommender Systems", eq. 6-12).

``logit = <w, x> + w_cin . CIN(v_1, …, v_F) + MLP(v_1, …, v_F)``: the compressed interaction network multiplies fields entry by
entry, a degree more in each layer. A number is the field ``value * vector``; a sequence is one field, pooled.

Shapes: B rows of this rank, F fields, D embedding_dim.
"""

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.errors import UserError
from data_loaders.schema import Schema
from trainer.models import FeatureAxes
from trainer.models.inputs import field_axes, field_dim, field_names, first_order
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.embeddings import WideLookup
from trainer.modules.fields import Fields
from trainer.modules.head import Head
from trainer.modules.interactions import CompressedInteractions
from trainer.modules.mlp import MLP, LogitLinear, aligned, check_units

MOST_LAYERS = 16


class XDeepFM(PooledModel):
    """``cross_units``: feature maps of each layer of the CIN, all of which go into the logit; ``hidden_units``,
    ``normalization``, ``dropout``: of the network. First-order weights as for deepfm.

    Raises ``UserError`` where the schema has no sparse feature or its tables differ in ``embedding_dim``, or for
    hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        cross_units: list[int] = [64, 64],
        hidden_units: list[int] = [400, 400],
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        check_units(cross_units, "model.cross_units")
        if len(cross_units) > MOST_LAYERS:
            raise UserError(f"model.cross_units has {len(cross_units)} layers: give at most {MOST_LAYERS}")
        check_units(hidden_units, "model.hidden_units")
        layout, dim, count = schema.layout(), field_dim(schema, "xdeepfm"), len(field_names(schema))
        tables, groups = pooled_lookup(schema, layout.pooled, first_order(schema))
        head = XDeepFMHead(
            Fields(groups, len(schema.dense), dim),
            LogitLinear(len(schema.dense)) if schema.dense else None,
            CompressedInteractions(count, cross_units),
            LogitLinear(sum(cross_units)),
            MLP(count * dim, hidden_units, normalization=normalization, dropout=dropout, out_dim=1),
        )
        super().__init__(layout, tables, head, device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        """The later layers of the CIN, as many as there may be, have features on their last axis alone."""
        dim, names = field_dim(schema, "xdeepfm"), field_names(schema)
        ones = [(name, 1) for name in names]
        return {
            "head.deep.layers.0.weight": (1, [(name, dim) for name in names]),
            "head.cross.weights.0": ((1, 2), ones),
            **{f"head.cross.weights.{layer}": (2, ones) for layer in range(1, MOST_LAYERS)},
            "head.linear.weight": (1, [(name, 1) for name in schema.dense]),
            **field_axes(schema),
        }


class XDeepFMHead(Head):
    """``linear``: over the numbers; None where there are none."""

    def __init__(
        self,
        fields: Fields,
        linear: LogitLinear | None,
        cross: CompressedInteractions,
        cross_output: LogitLinear,
        deep: MLP,
    ) -> None:
        super().__init__()
        self.fields, self.wide, self.linear = fields, WideLookup(), linear
        self.cross, self.cross_output, self.deep = cross, cross_output, deep

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        fields, rows = self.fields(dense, pooled)  # [B, F, D]
        first = self.wide(rows).sum(1)
        if self.linear is not None:
            first = first + self.linear(dense)
        deep = self.deep(aligned(fields.flatten(1)), valid=weights).squeeze(1)
        return first + self.cross_output(self.cross(fields)) + deep


Model = XDeepFM
