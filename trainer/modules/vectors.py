"""Vectors of the data, such as images and texts, as dense inputs: normalised and projected, or as they are.

Shapes: B rows of this rank, N numbers, K entries of a vector, P what they are projected to.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_loaders.schema import Schema


class DenseVectors(nn.Module):
    """``Batch.dense`` [B, N + ΣK] to the inputs that ``Schema.dense`` names, [B, N + ΣP]. A projection is linear, without a
    bias, and in float32. ``projections`` has one for each feature with ``project``."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        features = {name: schema.features[name] for name in schema.vectors}
        self.widths = [len(schema.numbers), *(feature.dim for feature in features.values())]
        self.names = [module_name(name) for name in features]
        self.normalized = [feature.normalize == "l2" for feature in features.values()]
        self.projections = nn.ModuleDict(
            {
                module_name(name): nn.Linear(feature.dim, feature.project, bias=False)
                for name, feature in features.items()
                if feature.project
            }
        )

    def forward(self, dense: Tensor) -> Tensor:
        numbers, *vectors = dense.split(self.widths, dim=1)  # [B, N], [B, K] each
        with torch.autocast(dense.device.type, enabled=False):
            made = [self._made(*each) for each in zip(self.names, self.normalized, vectors)]
        return torch.cat((numbers, *made), dim=1)

    def _made(self, name: str, normalized: bool, vector: Tensor) -> Tensor:
        vector = functional.normalize(vector, dim=1) if normalized else vector
        return self.projections[name](vector) if name in self.projections else vector


def module_name(feature: str) -> str:
    """A module's name holds no '.', and none that a ModuleDict has itself; percent-encoded like the names of wide tables."""
    return "of_" + feature.replace("%", "%25").replace(".", "%2E")
