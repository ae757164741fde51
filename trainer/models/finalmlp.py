"""FinalMLP (Mao et al., 2023, "FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction", equations 3 to 11).

Two networks over the same embeddings, each behind a gate that chooses features for it, ``2 sigmoid(MLP(context)) * v``; their
outputs meet in a bilinear fusion of several heads: ``b + w_1 . o_1 + w_2 . o_2 + sum over heads of o_1 W o_2``.

Shapes: B rows of this rank, F fields, D embedding_dim, K heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.errors import UserError
from data_loaders.schema import Schema, one_of
from trainer.models import FeatureAxes
from trainer.models.inputs import field_axes, field_dim, field_names
from trainer.models.pooled import PooledModel, pooled_lookup
from trainer.modules.fields import Fields
from trainer.modules.head import Head
from trainer.modules.interactions import BilinearFusion
from trainer.modules.mlp import MLP, aligned, check_least, check_units


class FinalMLP(PooledModel):
    """``first_units``, ``second_units``: of the two networks; ``first_context``, ``second_context``: features that their gates
    look at (none: a learned vector, the same for every row); ``gate_units``: of the gates; ``heads`` of the fusion,
    by which the last widths of both networks can be divided; ``normalization``, ``dropout``: of both networks.

    Raises ``UserError`` where the schema has no sparse feature or its tables differ in ``embedding_dim``, for a context that is
    no feature, or for hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        first_units: list[int] = [400, 400, 400],
        second_units: list[int] = [400, 400],
        first_context: list[str] = [],
        second_context: list[str] = [],
        gate_units: list[int] = [64],
        heads: int = 2,
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        check_heads(first_units, second_units, heads)
        check_units(gate_units, "model.gate_units")
        layout, dim, names = schema.layout(), field_dim(schema, "finalmlp"), field_names(schema)
        tables, groups = pooled_lookup(schema, layout.pooled)
        contexts = {"first_context": first_context, "second_context": second_context}
        gates = (Gate(places(names, chosen, key), len(names), dim, gate_units) for key, chosen in contexts.items())
        streams = (
            MLP(len(names) * dim, units[:-1], normalization=normalization, dropout=dropout, out_dim=units[-1])
            for units in (first_units, second_units)
        )
        head = FinalMLPHead(
            Fields(groups, len(schema.dense), dim),
            nn.ModuleList(gates),
            nn.ModuleList(streams),
            BilinearFusion(first_units[-1], second_units[-1], heads),
        )
        super().__init__(layout, tables, head, device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        """A network of one layer has its features in the output layer, and so has a gate."""
        names, dim = field_names(schema), field_dim(schema, "finalmlp")
        wide = [(name, dim) for name in names]
        axes: FeatureAxes = {f"head.streams.{stream}.layers.0.weight": (1, wide) for stream in (0, 1)}
        for gate in (0, 1):
            axes |= {f"head.gates.{gate}.network.output.{part}": (0, wide) for part in ("weight", "bias")}
        return axes | field_axes(schema)


def check_heads(first: list[int], second: list[int], heads: int) -> None:
    """Raises ``UserError``."""
    check_least(heads, 1, "model.heads")
    for key, units in (("first_units", first), ("second_units", second)):
        check_units(units, f"model.{key}")
        if len(units) < 2:
            raise UserError(
                f"model.{key} is {units}: give two widths or more, of which the last is the stream's output"
            )
        if units[-1] % heads:
            raise UserError(f"model.{key} ends with {units[-1]}, which model.heads={heads} does not divide")


def places(names: list[str], chosen: list[str], key: str) -> list[int]:
    for name in chosen:
        one_of(name, names, f"model.{key}")
    return [names.index(name) for name in chosen]


class Gate(nn.Module):
    """``2 sigmoid(MLP(context))`` for every entry of every field; ``context``: places of the fields that it looks at."""

    def __init__(self, context: list[int], num_fields: int, dim: int, units: list[int]) -> None:
        super().__init__()
        self.context = context
        self.constant = None if context else nn.Parameter(nn.init.normal_(torch.empty(1, dim)))
        self.network = MLP(max(len(context), 1) * dim, units, out_dim=num_fields * dim)

    def forward(self, fields: Tensor) -> Tensor:
        """[B, F, D] -> [B, F D]."""
        context = (
            torch.cat([fields[:, place] for place in self.context], dim=1) if self.constant is None else self.constant
        )
        return 2 * self.network(context).sigmoid() * fields.flatten(1)


class FinalMLPHead(Head):
    def __init__(self, fields: Fields, gates: nn.ModuleList, streams: nn.ModuleList, fusion: BilinearFusion) -> None:
        super().__init__()
        self.fields, self.gates, self.streams, self.fusion = fields, gates, streams, fusion

    def logits(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        fields, _ = self.fields(dense, pooled)
        first, second = (
            functional.relu(stream(aligned(gate(fields)), valid=weights))
            for gate, stream in zip(self.gates, self.streams, strict=True)
        )
        return self.fusion(first, second)


Model = FinalMLP
