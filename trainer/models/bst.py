"""BST (Chen et al., 2019, "Behavior Sequence Transformer for E-commerce Recommendation in Alibaba", section 2).

``logit = MLP(numbers, pooled features, candidate and its kin, interests)``: an interest is the output for the candidate of a
transformer block over the history and the candidate. One block, which the paper found best.

Shapes: B rows of this rank, D summed width of an event's attributes.
"""

import torch
from torch import nn

from data_loaders.errors import UserError
from data_loaders.schema import Schema
from trainer.models import FeatureAxes
from trainer.models.din import DINHead, HistoryModel, check_histories, input_width, inputs_of, widths
from trainer.modules.mlp import MLP, check_least, check_units
from trainer.modules.sequences import Transformer


class BST(HistoryModel):
    """``heads``, ``block_units`` (of the block's inner layer), ``block_dropout``: of the transformer; ``hidden_units``,
    ``activation``, ``normalization``, ``dropout``: of the network.

    Raises ``UserError`` where no sequence of the schema names a ``target``, or for hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        heads: int = 2,
        block_units: int = 64,
        block_dropout: float = 0.0,
        hidden_units: list[int] = [256, 128],
        activation: str = "relu",
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        check_units(hidden_units, "model.hidden_units")
        check_least(heads, 1, "model.heads")
        check_least(block_units, 1, "model.block_units")
        if not 0 <= block_dropout < 1:
            raise UserError(f"model.block_dropout is {block_dropout}: give a share, at least 0 and below 1")
        check_histories(schema, "bst")
        blocks = nn.ModuleList(
            Transformer(divided(schema, group, heads), most_events(schema, group), heads, block_units, block_dropout)
            for group in schema.histories.values()
        )
        deep = MLP(
            input_width(schema),
            hidden_units,
            activation=activation,
            normalization=normalization,
            dropout=dropout,
            out_dim=1,
        )
        super().__init__(schema, DINHead(schema, blocks, deep), device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        axes: FeatureAxes = {"head.deep.layers.0.weight": (1, inputs_of(schema))}
        places = dict.fromkeys(("positions", "query", "key", "value", "first", "gains", "biases"), 1)
        places |= dict.fromkeys(("output", "second", "second_bias"), 0)
        for prefix, group in BST.feature_modules(schema).items():
            own = [(key, widths(schema)[key]) for key in group]
            axes |= {f"{prefix}.{name}": (axis, own) for name, axis in places.items()}
        return axes


def divided(schema: Schema, group: tuple[str, ...], heads: int) -> int:
    """The width of a history's events. Raises ``UserError`` where the heads do not divide it."""
    width = sum(widths(schema)[key] for key in group)
    if width % heads:
        raise UserError(f"model.heads is {heads}, which does not divide {width}, the width of the events of {group[0]}")
    return width


def most_events(schema: Schema, group: tuple[str, ...]) -> int:
    return max(schema.features[key].max_length or 1 for key in group)


Model = BST
