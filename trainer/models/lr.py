"""Logistic regression (as in McMahan et al., 2013, "Ad Click Prediction: a View from the Trenches", section 3).

``logit = w . [x, crosses, numbers] + b``: the wide part of Wide & Deep alone, with weights for numbers, too. It reads the
schema's ``wide`` features and crosses, and no other column of ids.

Shapes: B rows of this rank, F linear features, N numbers.
"""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.errors import UserError
from data_loaders.schema import Schema
from trainer.models import FeatureAxes
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.embeddings import PooledGroups, WideLookup
from trainer.modules.head import Head


class LogisticRegression(PooledModel):
    """Raises ``UserError`` where the schema has neither a wide feature nor a cross."""

    def __init__(self, schema: Schema, *, device: torch.device) -> None:
        if not schema.wide:
            raise UserError(
                "schema has no feature for a linear model: set wide: true on a sparse feature or a sequence, or choose "
                "another model than lr"
            )
        wide = [key for key in schema.layout(crosses=True).pooled if key in schema.wide]
        tables, groups = pooled_lookup(schema, [], wide)
        super().__init__(
            schema.layout(crosses=True).only(wide), tables, LogisticRegressionHead(groups, len(schema.dense)), device
        )

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        return {"head.numbers": (0, [(name, 1) for name in schema.dense])} if schema.dense else {}


class LogisticRegressionHead(Head):
    def __init__(self, groups: PooledGroups, num_dense: int) -> None:
        super().__init__()
        self.groups, self.wide = groups, WideLookup()
        self.numbers = nn.Parameter(torch.zeros(num_dense)) if num_dense else None
        self.bias = nn.Parameter(torch.zeros(()))

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        _, rows = self.groups(pooled)  # [B, 4F]
        linear = self.wide(rows).sum(1) + self.bias  # [B]
        return linear if self.numbers is None else linear + (dense * self.numbers).sum(1)


Model = LogisticRegression
