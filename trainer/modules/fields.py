"""Fields: one vector of the same width for every pooled feature and every number, as models over fields read them.

Shapes: B rows of this rank, F fields (pooled features, then numbers), D embedding_dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedTensor

from trainer.modules.embeddings import DEFAULT_INIT_STD, PooledGroups


class Fields(nn.Module):
    """Embeddings of ids, and for a number ``value * vector``; ``vectors`` is None without numbers."""

    def __init__(self, groups: PooledGroups, num_numbers: int, dim: int) -> None:
        super().__init__()
        self.groups, self.dim = groups, dim
        start = nn.init.normal_(torch.empty(num_numbers, dim), std=DEFAULT_INIT_STD)
        self.vectors = nn.Parameter(start) if num_numbers else None

    def forward(self, dense: Tensor, pooled: KeyedTensor) -> tuple[Tensor, Tensor]:
        """-> the fields [B, F, D] and the rows of linear weights [B, 4L] (``WideLookup``)."""
        embedded, rows = self.groups(pooled)
        fields = embedded.unflatten(1, (-1, self.dim))
        if self.vectors is not None:
            fields = torch.cat((fields, dense.unsqueeze(2) * self.vectors), dim=1)
        return fields, rows


class FieldNorm(nn.Module):
    """Layer normalisation of each field by itself, with a gain and a bias for each of its entries."""

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_fields, dim))
        self.bias = nn.Parameter(torch.zeros(num_fields, dim))

    def forward(self, fields: Tensor) -> Tensor:
        """[B, F, D] -> [B, F, D]."""
        return functional.layer_norm(fields, fields.shape[-1:]) * self.gain + self.bias


class FieldLogit(nn.Module):
    """``w . [all fields beside each other] + b`` in float32, also under autocast; a row of the weight for each field."""

    def __init__(self, num_fields: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_fields, width))
        self.bias = nn.Parameter(torch.zeros(()))
        nn.init.normal_(self.weight, std=(num_fields * width) ** -0.5)

    def forward(self, fields: Tensor) -> Tensor:
        """[B, F, W] -> [B]."""
        with torch.autocast(fields.device.type, enabled=False):
            return torch.mv(fields.flatten(1).float(), self.weight.flatten()) + self.bias
