"""DIN (Zhou et al., 2018, "Deep Interest Network for Click-Through Rate Prediction", figure 2, equations 2 and 3).

``logit = MLP(numbers, pooled features, candidate and its kin, interests)``: an interest is a history weighted event by
event by its relation to the candidate.

Tables of attended sequences are read id by id (EmbeddingCollection), all others pooled (EmbeddingBagCollection).

Shapes: B rows of this rank, T events of one history over the batch, D summed width of an event's attributes.
"""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from data_loaders.batch import Batch
from data_loaders.errors import UserError
from data_loaders.schema import Layout, Schema, one_of
from trainer.models import FeatureAxes
from trainer.models.pooled import build_pooled, look_up_pooled
from trainer.modules.attention import TargetAttention
from trainer.modules.embeddings import (
    JoinedColumns,
    PooledGroups,
    bag_configs,
    build_embeddings,
    embedding_configs,
    projections,
)
from trainer.modules.head import Head
from trainer.modules.jagged import Segments, segment_mean, segment_sum
from trainer.modules.mlp import MLP, aligned, check_units
from trainer.modules.requests import RequestJagged

POSITIONS = ("none", "learned")


class HistoryModel(nn.Module):
    """What DIN and the models after it have in common: tables, their lookups, and a head that reads histories event by event.
    ``head``: built by the caller, on the CPU and before the tables, which lie on ``device``."""

    def __init__(self, schema: Schema, head: "DINHead", device: torch.device) -> None:
        super().__init__()
        self.layout: Layout = schema.layout(attention=True)
        self.head = head
        configs = bag_configs(schema, self.layout.pooled)
        self.embedding_bags, self.weighted_bags = build_pooled(configs, self.layout, device)
        self.join = JoinedColumns()
        self.embeddings = build_embeddings(embedding_configs(schema, self.layout.unpooled), device)

    def forward(self, batch: Batch) -> Tensor:
        pooled = look_up_pooled(self.embedding_bags, self.weighted_bags, self.join, batch)
        jagged = [collection(batch.sequence) for collection in self.embeddings.values()]
        return self.head(batch.dense, pooled, jagged, batch.weights)  # [B]

    @staticmethod
    def feature_modules(schema: Schema) -> dict[str, tuple[str, ...]]:
        """The features of each module that belongs to a history, by the module's name."""
        return {f"head.attentions.{index}": group for index, group in enumerate(schema.histories.values())}


class DIN(HistoryModel):
    """``hidden_units``, ``normalization``, ``dropout``: of the network over all inputs; ``attention_units``: of the
    activation unit; ``activation``: of both (dice, prelu or relu); ``softmax``: whether an event's weights sum to 1 over a
    history (the paper: no); ``position``: what an event's weight knows of its distance from the end of the history, nothing
    (none, as in the paper) or a vector for each distance up to ``max_length`` (learned); ``cosine``, ``intensity``: what
    lets ids match that training has never seen (``TargetAttention``).

    Raises ``UserError`` where no sequence of the schema names a ``target``, or for hyperparameters out of range."""

    def __init__(
        self,
        schema: Schema,
        *,
        hidden_units: list[int] = [256, 128],
        attention_units: list[int] = [64, 32],
        activation: str = "dice",
        softmax: bool = False,
        position: str = "none",
        cosine: bool = False,
        intensity: bool = False,
        normalization: str = "none",
        dropout: float = 0.0,
        device: torch.device,
    ) -> None:
        check_units(hidden_units, "model.hidden_units")
        one_of(position, POSITIONS, "model.position")
        check_histories(schema, "din")
        width = widths(schema)
        attentions = nn.ModuleList(
            TargetAttention(
                sum(width[key] for key in group),
                attention_units,
                activation=activation,
                softmax=softmax,
                positions=max(schema.features[key].max_length for key in group) if position == "learned" else None,
                cosine=cosine,
                intensity=intensity,
            )
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
        super().__init__(schema, DINHead(schema, attentions, deep), device)

    @staticmethod
    def feature_axes(schema: Schema) -> FeatureAxes:
        width = widths(schema)
        attended = {
            f"{prefix}.first.weight": (1, 4 * [(key, width[key]) for key in group])  # q, k, q - k, q * k
            for prefix, group in DIN.feature_modules(schema).items()
        }
        added = {
            f"{prefix}.intensity": (0, [(key, width[key]) for key in group])
            for prefix, group in DIN.feature_modules(schema).items()
        }
        return {"head.deep.layers.0.weight": (1, inputs_of(schema)), **attended, **added}


def check_histories(schema: Schema, model: str) -> None:
    """Raises ``UserError`` where no sequence names a target."""
    if not schema.histories:
        raise UserError(
            f"schema.features has no sequence with a target, which model {model} attends to: set target: <sparse "
            "feature of the same table> on a feature of kind: sequence, or choose another model"
        )


def input_width(schema: Schema) -> int:
    return sum(width for _, width in inputs_of(schema))


def inputs_of(schema: Schema) -> list[tuple[str, int]]:
    """``(feature, width)`` of what the network reads: numbers, pooled features, candidates, interests."""
    width = widths(schema)
    members = [key for group in schema.histories.values() for key in group]
    others = [key for key in width if key not in members]
    return [*((name, 1) for name in schema.dense), *((key, width[key]) for key in (*others, *members))]


def widths(schema: Schema) -> dict[str, int]:
    """Of each feature's vector, pooled ones first."""
    layout = schema.layout(attention=True)
    return {key: schema.dim(schema.features[key].table) for key in (*layout.pooled, *layout.unpooled)}


class DINHead(Head):
    """``attentions``: one for each history of ``schema``, (candidate [B, D], events [T, D], offsets [B + 1]) -> [B, D]."""

    def __init__(self, schema: Schema, attentions: nn.ModuleList, deep: MLP) -> None:
        super().__init__()
        pooled_keys = schema.layout(attention=True).pooled
        self.histories = schema.histories
        self.targets = {key: schema.features[key].target for group in self.histories.values() for key in group}
        unpooled = schema.layout(attention=True).unpooled
        pooled = {key: schema.features[key] for key in unpooled if key not in self.targets}
        # One id is its own mean.
        self.means = {
            key: schema.tables[feature.table].pooling == "mean" and feature.max_length is not None
            for key, feature in pooled.items()
        }
        self.groups = PooledGroups(
            bag_configs(schema, pooled_keys), pooled_keys, projections=projections(schema, pooled_keys)
        )
        self.attentions, self.deep = attentions, deep

    def logits(
        self, dense: Tensor, pooled: KeyedTensor | None, jagged: list[dict[str, JaggedTensor]], weights: Tensor
    ) -> Tensor:
        features = {key: ids for collection in jagged for key, ids in collection.items()}
        vectors = {key: self._pool(key, features[key]) for key in self.means}  # each [B, D of its table]
        interests = [
            self._interest(attention, group, features, vectors)
            for attention, group in zip(self.attentions, self.histories.values(), strict=True)
        ]
        embedded = [self.groups(pooled)[0]] if pooled is not None else []
        inputs = aligned(dense, *embedded, *vectors.values(), *interests)
        return self.deep(inputs, valid=weights).squeeze(1)

    def _pool(self, key: str, ids: JaggedTensor) -> Tensor:
        pool = segment_mean if self.means[key] else segment_sum
        return pool(ids.values(), Segments.of(ids.offsets(), ids.values().shape[0]))

    def _interest(
        self,
        attention: nn.Module,
        group: tuple[str, ...],
        features: dict[str, JaggedTensor],
        vectors: dict[str, Tensor],
    ) -> Tensor:
        query = joined([vectors[self.targets[key]] for key in group])  # [B, D]
        histories = [features[key] for key in group]
        # Served, and all rows of a request share it.
        if isinstance(histories[0], RequestJagged) and isinstance(attention, TargetAttention):
            return attention.of_requests(query, joined([each.shared for each in histories]), histories[0])
        tokens = joined([features[key].values() for key in group])  # [T, D]
        return attention(query, tokens, features[group[0]].offsets())  # [B, D]


def joined(vectors: list[Tensor]) -> Tensor:
    """Side by side, [N, summed width]; a single one as it is."""
    return torch.cat(vectors, dim=1) if len(vectors) > 1 else vectors[0]


Model = DIN
