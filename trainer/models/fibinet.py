"""FiBiNET (Huang et al., 2019, "FiBiNET: Combining Feature Importance and Bilinear Feature Interaction for Click-Through Rate
Prediction", section 3).

``logit = <w, x> + MLP([p, q])``: ``p`` are the bilinear products ``(v_i W) * v_j`` of all pairs of fields, ``q`` those of the
fields weighted by their importance (SENET). A number is the field ``value * vector``; a sequence is one field, pooled.

Shapes: B rows of this rank, F fields, D embedding_dim, P pairs.
"""

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.errors import UserError
from data_loaders.schema import Schema, one_of
from trainer.models import FeatureAxes
from trainer.models.inputs import field_axes, field_dim, field_names, first_order, pairs
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.embeddings import WideLookup
from trainer.modules.fields import Fields
from trainer.modules.head import Head
from trainer.modules.interactions import BilinearProduct, SqueezeExcitation
from trainer.modules.mlp import MLP, LogitLinear, aligned, check_least, check_units

BILINEAR = ("all", "each", "interaction")


class FiBiNET(PooledModel):
    """``bilinear``: matrices of the products, one for all pairs (all), one for each left field (each) or one for each pair
    (interaction); ``reduction``: how many times fewer units SENET squeezes the fields into; ``hidden_units``, ``normalization``,
    ``dropout``: of the network.

    Raises ``UserError`` where the schema has no sparse feature, only one field, or tables that differ in ``embedding_dim``, or
    for hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        bilinear: str = "interaction",
        reduction: int = 3,
        hidden_units: list[int] = [400, 400, 400],
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        one_of(bilinear, BILINEAR, "model.bilinear")
        check_least(reduction, 1, "model.reduction")
        check_units(hidden_units, "model.hidden_units")
        layout, dim, count = schema.layout(), field_dim(schema, "fibinet"), len(field_names(schema))
        if count < 2:
            raise UserError("schema.features has one feature: model fibinet multiplies two or more")
        tables, groups = pooled_lookup(schema, layout.pooled, first_order(schema))
        head = FiBiNETHead(
            Fields(groups, len(schema.dense), dim),
            LogitLinear(len(schema.dense)) if schema.dense else None,
            by_name(schema),
            SqueezeExcitation(count, reduction),
            BilinearProduct(count, dim, bilinear),
            BilinearProduct(count, dim, bilinear),
            MLP(count * (count - 1) * dim, hidden_units, normalization=normalization, dropout=dropout, out_dim=1),
        )
        super().__init__(layout, tables, head, device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        dim, names = field_dim(schema, "fibinet"), sorted(field_names(schema))
        products = [(owners, dim) for owners, _ in pairs([(name,) for name in names])]
        ones = [(name, 1) for name in names]
        return {
            "head.network.layers.0.weight": (1, [*products, *products]),
            "head.importance.squeeze.weight": (1, ones),
            "head.importance.excite.weight": (0, ones),
            "head.linear.weight": (1, [(name, 1) for name in schema.dense]),
            **field_axes(schema),
        }


def by_name(schema: Schema) -> list[int]:
    """Which field comes at each place in the order of names: a product's left and right do not change with the schema's."""
    names = field_names(schema)
    return sorted(range(len(names)), key=lambda place: names[place])


class FiBiNETHead(Head):
    """``linear``: over the numbers; None where there are none. ``order``: of the fields, see ``by_name``."""

    def __init__(
        self,
        fields: Fields,
        linear: LogitLinear | None,
        order: list[int],
        importance: SqueezeExcitation,
        product: BilinearProduct,
        weighted_product: BilinearProduct,
        network: MLP,
    ) -> None:
        super().__init__()
        self.fields, self.wide, self.linear, self.order = fields, WideLookup(), linear, order
        self.importance, self.product, self.weighted_product = importance, product, weighted_product
        self.network = network

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        fields, rows = self.fields(dense, pooled)
        first = self.wide(rows).sum(1)
        if self.linear is not None:
            first = first + self.linear(dense)
        fields = torch.stack([fields[:, place] for place in self.order], dim=1)  # [B, F, D]
        products = (self.product(fields), self.weighted_product(self.importance(fields)))  # [B, P, D] each
        return first + self.network(aligned(*(part.flatten(1) for part in products)), valid=weights).squeeze(1)


Model = FiBiNET
