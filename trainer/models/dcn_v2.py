"""DCN-V2 (Wang et al., 2021, "DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank
Systems", section 3, equations 1 to 5).

``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l`` over ``x_0``, all numbers and embeddings beside each other. Stacked, the deep network is
over the last ``x_l``; parallel, it is over ``x_0``, and a last layer over both. ``W_l`` is a full matrix, one of low rank, or a
mixture of low-rank experts.

Shapes: B rows of this rank, I width of x_0.
"""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.errors import UserError
from data_loaders.schema import Schema, one_of
from trainer.models import FeatureAxes
from trainer.models.inputs import concatenated, total_width
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.embeddings import PooledGroups
from trainer.modules.head import Head
from trainer.modules.interactions import LowRankCrossNetwork, MatrixCrossNetwork
from trainer.modules.mlp import MLP, LogitLinear, aligned, check_least, check_units

STRUCTURES = ("stacked", "parallel")


class DCNV2(PooledModel):
    """``cross_layers``, at least 1; ``structure``: stacked or parallel; ``rank`` of the cross layers' matrices (None: full)
    and ``experts`` of that rank; ``hidden_units``, ``normalization``, ``dropout``: of the deep network.

    Raises ``UserError`` where the schema has no sparse feature, or for hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        cross_layers: int = 3,
        structure: str = "stacked",
        rank: int | None = None,
        experts: int = 1,
        hidden_units: list[int] = [768, 768],
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        check_units(hidden_units, "model.hidden_units")
        check_least(cross_layers, 1, "model.cross_layers")
        check_least(experts, 1, "model.experts")
        one_of(structure, STRUCTURES, "model.structure")
        if rank is not None:
            check_least(rank, 1, "model.rank")
        elif experts > 1:
            raise UserError(f"model.experts is {experts}, but their matrices are full: give model.rank, or experts=1")
        layout, in_dim = schema.layout(), total_width(concatenated(schema, "dcn_v2"))
        tables, groups = pooled_lookup(schema, layout.pooled)
        head = DCNV2Head(
            groups,
            cross_network(in_dim, cross_layers, rank, experts),
            MLP(in_dim, hidden_units, normalization=normalization, dropout=dropout, out_dim=1),
            LogitLinear(in_dim) if structure == "parallel" else None,
        )
        super().__init__(layout, tables, head, device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        """Of a full matrix, ``cross.weights``, both the rows and the columns belong to features."""
        inputs = concatenated(schema, "dcn_v2")
        axes: FeatureAxes = {"head.cross.weights": ((1, 2), inputs)}
        columns = ("deep.layers.0.weight", "cross_output.weight", "cross.biases", "cross.up")
        axes |= {f"head.{name}": (1, inputs) for name in columns}
        return axes | {f"head.cross.{name}": (2, inputs) for name in ("down", "gates")}


def cross_network(in_dim: int, num_layers: int, rank: int | None, experts: int) -> nn.Module:
    if rank is None:
        return MatrixCrossNetwork(in_dim, num_layers)
    return LowRankCrossNetwork(in_dim, num_layers, rank, experts)


class DCNV2Head(Head):
    """``cross_output`` is there where the two networks are parallel."""

    def __init__(self, groups: PooledGroups, cross: nn.Module, deep: MLP, cross_output: LogitLinear | None) -> None:
        super().__init__()
        self.groups, self.cross, self.deep, self.cross_output = groups, cross, deep, cross_output

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        embedded, _ = self.groups(pooled)
        inputs = torch.cat((dense, embedded), dim=1)  # [B, I]
        crossed = self.cross(inputs)
        if self.cross_output is None:
            return self.deep(aligned(crossed), valid=weights).squeeze(1)
        return self.deep(aligned(inputs), valid=weights).squeeze(1) + self.cross_output(crossed)


Model = DCNV2
