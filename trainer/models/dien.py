"""DIEN (Zhou et al., 2019, "Deep Interest Evolution Network for Click-Through Rate Prediction", section 4).

``logit = MLP(numbers, pooled features, candidate and its kin, interests)``: a GRU extracts an interest at each event, an AUGRU,
whose update gate is scaled by attention to the candidate, follows their evolution; its last state is the interest.

Shapes: B rows of this rank, T events of one history over the batch, D summed width of an event's attributes.
"""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from data_loaders.errors import UserError
from data_loaders.schema import Schema
from trainer.models import FeatureAxes
from trainer.models.bst import most_events
from trainer.models.din import DINHead, HistoryModel, check_histories, input_width, inputs_of, widths
from trainer.modules.mlp import MLP, check_units
from trainer.modules.sequences import AddedLoss, InterestEvolution, auxiliary_loss


class DIEN(HistoryModel):
    """``auxiliary``: weight of the auxiliary loss, which tells a history's next event from one of another history of the rank's
    batch (0: none; with it, results depend on how rows lie on ranks); ``hidden_units``, ``activation``, ``normalization``,
    ``dropout``: of the network.

    Raises ``UserError`` where no sequence of the schema names a ``target``, or for hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        auxiliary: float = 0.0,
        hidden_units: list[int] = [256, 128],
        activation: str = "dice",
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        check_units(hidden_units, "model.hidden_units")
        if auxiliary < 0:
            raise UserError(f"model.auxiliary is {auxiliary}: give the weight of the auxiliary loss, 0 or more")
        check_histories(schema, "dien")
        width = widths(schema)
        evolutions = nn.ModuleList(
            InterestEvolution(sum(width[key] for key in group), most_events(schema, group))
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
        super().__init__(schema, DIENHead(schema, evolutions, deep, auxiliary), device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        """An entry of a state belongs to the feature whose entry it is multiplied with in the auxiliary loss."""
        axes: FeatureAxes = {"head.deep.layers.0.weight": (1, inputs_of(schema))}
        for prefix, group in DIEN.feature_modules(schema).items():
            own = [(key, widths(schema)[key]) for key in group]
            axes[f"{prefix}.weight"] = ((0, 1), own)
            for layer in (f"{prefix}.extractor", f"{prefix}.evolution"):
                axes |= {f"{layer}.{name}": ((1, 2), own) for name in ("inputs", "hidden")}
                axes[f"{layer}.bias"] = (1, own)
        return axes


class DIENHead(DINHead):
    def __init__(self, schema: Schema, evolutions: nn.ModuleList, deep: MLP, auxiliary: float) -> None:
        super().__init__(schema, evolutions, deep)
        self.auxiliary = auxiliary

    def logits(
        self, dense: Tensor, pooled: KeyedTensor | None, jagged: list[dict[str, JaggedTensor]], weights: Tensor
    ) -> Tensor:
        learning = self.training and self.auxiliary > 0 and torch.is_grad_enabled()
        for evolution in self.attentions:
            evolution.listen(learning)
        logits = super().logits(dense, pooled, jagged, weights)
        if not learning:
            return logits
        losses = [auxiliary_loss(*evolution.take()) for evolution in self.attentions]
        return AddedLoss.apply(logits, self.auxiliary * torch.stack(losses).sum())


Model = DIEN
