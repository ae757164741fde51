"""AutoInt (Song et al., 2019, "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks", eq. 3-9).

``logit = w . [all fields after the attention layers] + b``: in each layer every field looks at all others, by several heads.
With ``hidden_units`` a network over the embeddings is added to it (the paper's AutoInt+). A number is the field
``value * vector``.

Shapes: B rows of this rank, F fields, D embedding_dim.
"""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.schema import Schema
from trainer.models import FeatureAxes
from trainer.models.inputs import field_axes, field_dim, field_names
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.fields import FieldLogit, Fields
from trainer.modules.head import Head
from trainer.modules.interactions import FieldAttention
from trainer.modules.mlp import MLP, aligned, check_least, check_units


class AutoInt(PooledModel):
    """``attention_layers``, with ``heads`` of ``head_width`` each; ``hidden_units`` ([]: none), ``normalization``, ``dropout``:
    of the network beside them.

    Raises ``UserError`` where the schema has no sparse feature or its tables differ in ``embedding_dim``, or for
    hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        attention_layers: int = 3,
        heads: int = 2,
        head_width: int = 32,
        hidden_units: list[int] = [],
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        for key, value in (("attention_layers", attention_layers), ("heads", heads), ("head_width", head_width)):
            check_least(value, 1, f"model.{key}")
        if hidden_units:
            check_units(hidden_units, "model.hidden_units")
        layout, dim, count = schema.layout(), field_dim(schema, "autoint"), len(field_names(schema))
        tables, groups = pooled_lookup(schema, layout.pooled)
        widths = [dim, *[heads * head_width] * attention_layers]
        head = AutoIntHead(
            Fields(groups, len(schema.dense), dim),
            nn.Sequential(*(FieldAttention(width, heads, head_width) for width in widths[:-1])),
            FieldLogit(count, widths[-1]),
            MLP(count * dim, hidden_units, normalization=normalization, dropout=dropout, out_dim=1)
            if hidden_units
            else None,
        )
        super().__init__(layout, tables, head, device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        names = field_names(schema)
        deep = [(name, field_dim(schema, "autoint")) for name in names]
        ones = [(name, 1) for name in names]
        return {"head.deep.layers.0.weight": (1, deep), "head.output.weight": (0, ones), **field_axes(schema)}


class AutoIntHead(Head):
    def __init__(self, fields: Fields, attention: nn.Sequential, output: FieldLogit, deep: MLP | None) -> None:
        super().__init__()
        self.fields, self.attention, self.output, self.deep = fields, attention, output, deep

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        fields, _ = self.fields(dense, pooled)
        logits = self.output(self.attention(fields))
        return logits if self.deep is None else logits + self.deep(aligned(fields.flatten(1)), valid=weights).squeeze(1)


Model = AutoInt
