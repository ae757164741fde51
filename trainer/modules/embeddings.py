"""From the schema to TorchRec's unsharded embedding modules, on any device, and back from their outputs to tensors.

Deep tables are the schema's own. A linear (*wide*) model adds one table for each of its features and crosses, called
``wide_<feature>``, because linear weights are not shared between features. FBGEMM's rows are at least 4 wide, so a wide
row is ``[w, z, n, g]``: slot 0 is the weight, the others are free for the optimizer (FTRL keeps its state there).

Shapes: B rows of this rank, F features, D embedding_dim, T ids of one feature over the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.errors import UserError
from data_loaders.schema import Schema

WIDE_PREFIX = "wide_"
WIDE_DIM = 4
WIDE_WEIGHT_SLOT = 0
DEFAULT_INIT_STD = 0.01

_DATA_TYPE = {"fp32": DataType.FP32, "fp16": DataType.FP16}
_POOLING = {"mean": PoolingType.MEAN, "sum": PoolingType.SUM}


def wide_table(key: str) -> str:
    """The table with the linear weights of a feature or cross. A module's name cannot hold '.', and TorchRec splits
    names at '@': both are percent-encoded, so that different keys keep different tables."""
    return WIDE_PREFIX + key.replace("%", "%25").replace(".", "%2E").replace("@", "%40")


def is_wide_table(table: str) -> bool:
    return table.startswith(WIDE_PREFIX)


@dataclass(frozen=True)
class InitialValues:
    """Independent of each other, of mean 0 and standard deviation ``std``; ``distribution``: normal or uniform."""

    std: float
    distribution: str = "normal"

    @torch.no_grad()
    def fill(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """In place."""
        if self.distribution == "uniform":
            bound = math.sqrt(3) * self.std
            return values.uniform_(-bound, bound, generator=generator)
        return values.normal_(0.0, self.std, generator=generator)


def initial_values(schema: Schema, table: str) -> InitialValues:
    """Of a deep table: normal of deviation 0.01, or uniform between ±1/√rows (as in DLRM's program), unless the table has an
    ``init_std`` of its own.

    Small and the same for every width, as in libFM's practice (Rendle, 2012, "Factorization Machines with libFM",
    section 3.4, 5.4): the sum over pairs of fields then starts near 0, whereas 1/sqrt(D) would start DeepFM with logits
    of several units for a few dozen fields.
    """
    spec = schema.tables[table]
    std = (3 * spec.num_embeddings) ** -0.5 if spec.init == "uniform" else DEFAULT_INIT_STD
    return InitialValues(std if spec.init_std is None else spec.init_std, spec.init)


def initial_values_of_tables(schema: Schema) -> dict[str, InitialValues]:
    """For every table that a model may have: deep tables and, as zeros, wide ones."""
    wide = {wide_table(key): InitialValues(0.0) for key in (*schema.sparse, *schema.sequences, *schema.crosses)}
    return {**{table: initial_values(schema, table) for table in schema.tables}, **wide}


def bag_configs(schema: Schema, deep: Sequence[str], wide: Sequence[str] = ()) -> list[EmbeddingBagConfig]:
    """Tables of an EmbeddingBagCollection: one for each schema table that ``deep`` features read, then one for each
    feature or cross in ``wide``. Raises ``UserError`` for a table name that TorchRec cannot hold."""
    configs = [
        EmbeddingBagConfig(
            name=table,
            num_embeddings=schema.tables[table].num_embeddings,
            embedding_dim=schema.stored_dim(table),
            feature_names=features,
            pooling=_POOLING[schema.tables[table].pooling],
            init_fn=initial_values(schema, table).fill,
            data_type=_DATA_TYPE[schema.tables[table].dtype],
        )
        for table, features in _features_by_table(schema, deep).items()
    ]
    for key in wide:
        configs.append(
            EmbeddingBagConfig(
                name=wide_table(key),
                num_embeddings=schema.num_embeddings(key),
                embedding_dim=WIDE_DIM,
                feature_names=[key],
                pooling=PoolingType.SUM,
                init_fn=nn.init.zeros_,
            )
        )
    return configs


def embedding_configs(schema: Schema, features: Sequence[str]) -> list[EmbeddingConfig]:
    """Tables that are read id by id. Raises ``UserError`` for a table name that TorchRec cannot hold."""
    return [
        EmbeddingConfig(
            name=table,
            num_embeddings=schema.tables[table].num_embeddings,
            embedding_dim=schema.stored_dim(table),
            feature_names=names,
            init_fn=initial_values(schema, table).fill,
            data_type=_DATA_TYPE[schema.tables[table].dtype],
        )
        for table, names in _features_by_table(schema, features).items()
    ]


def build_embedding_bags(configs: list[EmbeddingBagConfig], device: torch.device) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(tables=configs, device=device)


def build_weighted_bags(configs: list[EmbeddingBagConfig], device: torch.device) -> EmbeddingBagCollection:
    """Of ids with weights (``Batch.weighted``), which hold what makes means of sums."""
    summed = [replace(config, pooling=PoolingType.SUM) for config in configs]
    return EmbeddingBagCollection(tables=summed, device=device, is_weighted=True)


class JoinedColumns(nn.Module):
    """The columns of several pooled lookups as one."""

    def forward(self, *pooled: KeyedTensor) -> KeyedTensor:
        keys = [key for part in pooled for key in part.keys()]  # noqa: SIM118  it is no dict
        widths = [width for part in pooled for width in part.length_per_key()]
        return KeyedTensor(keys, widths, torch.cat([part.values() for part in pooled], dim=1))


def build_embeddings(configs: list[EmbeddingConfig], device: torch.device) -> nn.ModuleDict:
    """One EmbeddingCollection for each embedding_dim, ``dim_<D>``, since TorchRec's holds a single width."""
    by_dim: dict[int, list[EmbeddingConfig]] = {}
    for config in configs:
        by_dim.setdefault(config.embedding_dim, []).append(config)
    collections = {f"dim_{dim}": EmbeddingCollection(tables=group, device=device) for dim, group in by_dim.items()}
    return nn.ModuleDict(collections)


class PooledGroups(nn.Module):
    """Columns of a pooled lookup's KeyedTensor in the model's order: ``(deep [B, ΣD], wide [B, 4F])``.

    Columns are found by name, since sharding changes their order, and TorchRec calls a column ``feature@table`` where
    several tables read the feature. Neighbours stay together: an unsharded model gets two views, copying nothing.
    (``KTRegroupAsDict`` does this with an FBGEMM operator that took 435 ms forward and backward for [4096, 520] on a
    CPU, against 8 ms for ``split`` and ``cat``; ``KeyedTensor.regroup`` took 17 ms.)
    """

    def __init__(
        self,
        configs: list[EmbeddingBagConfig],
        deep: Sequence[str],
        wide: Sequence[str] = (),
        projections: "Projections | None" = None,
    ) -> None:
        super().__init__()
        self.projections = projections
        columns = {
            (feature, is_wide_table(config.name)): name
            for config, names in zip(configs, get_embedding_names_by_table(configs), strict=True)
            for feature, name in zip(config.feature_names, names, strict=True)
        }
        self.groups = ([columns[key, False] for key in deep], [columns[key, True] for key in wide])

    def forward(self, pooled: KeyedTensor) -> tuple[Tensor, Tensor]:
        if self.projections is not None:
            pooled = self.projections(pooled)
        deep, wide = split_columns(pooled, self.groups)
        return deep, wide


class Projections(nn.Module):
    """Rows of tables that are not as wide as the schema has them (``init_from.dim``), made so by a linear map a table, without a
    bias and in float32. Sums and means of rows are projected as rows are. ``linear``: by table."""

    def __init__(self, schema: Schema, features: Sequence[str]) -> None:
        super().__init__()
        self.of_feature = schema.projected(features)
        self.linear = nn.ModuleDict(
            {
                f"of_{table}": nn.Linear(schema.stored_dim(table), schema.dim(table), bias=False)
                for table in dict.fromkeys(self.of_feature.values())
            }
        )

    def forward(self, pooled: KeyedTensor) -> KeyedTensor:
        names, parts = pooled.keys(), pooled.values().split(pooled.length_per_key(), dim=1)
        with torch.autocast(parts[0].device.type, enabled=False):
            made = [self._made(*column) for column in zip(names, parts, strict=True)]
        return KeyedTensor(names, [part.shape[1] for part in made], torch.cat(made, dim=1))

    def _made(self, name: str, part: Tensor) -> Tensor:
        """TorchRec calls a column ``feature`` or ``feature@table``; those of the linear part stay."""
        feature, _, table = name.partition("@")
        projects = feature in self.of_feature and not is_wide_table(table)
        return self.linear[f"of_{self.of_feature[feature]}"](part.float()) if projects else part


def projections(schema: Schema, features: Sequence[str]) -> Projections | None:
    """None where no table of ``features`` is projected."""
    return Projections(schema, features) if schema.projected(features) else None


def split_columns(pooled: KeyedTensor, groups: Sequence[Sequence[str]]) -> list[Tensor]:
    """The columns named by each group, in the group's order, as one tensor ``[B, Σ widths]`` a group; a name belongs to
    one group. Backward is one concatenation however many names there are."""
    place = {name: (group, rank) for group, names in enumerate(groups) for rank, name in enumerate(names)}
    runs: list[tuple[int, int]] = []  # (group, rank of the run's first name), -1 for columns that nobody wants
    widths: list[int] = []
    expected = None
    for name, width in zip(pooled.keys(), pooled.length_per_key(), strict=True):
        group, rank = place.get(name, (-1, 0))
        if (group, rank) == expected:
            widths[-1] += width
        else:
            runs.append((group, rank))
            widths.append(width)
        expected = (group, rank + 1)
    pieces = pooled.values().split(widths, dim=1)
    found: list[list[tuple[int, Tensor]]] = [[] for _ in groups]
    for (group, rank), piece in zip(runs, pieces, strict=True):
        if group >= 0:
            found[group].append((rank, piece))
    return [_join([piece for _, piece in sorted(parts, key=lambda part: part[0])], pooled) for parts in found]


class WideLookup(nn.Module):
    """Linear weights out of the rows of wide tables: ``[B, 4F] -> [B, F]`` (slot 0, a sum for a bag of ids).

    ``gradient_slot`` is the slot that receives the weight's gradient in backward. With 0 it is a plain linear model
    whatever the table optimizer; FTRL chooses 3, where the tables' SGD of rate 1 then collects ``-g`` for its own step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gradient_slot = WIDE_WEIGHT_SLOT

    def collect_gradient(self, slot: int) -> None:
        self.gradient_slot = slot

    def forward(self, rows: Tensor) -> Tensor:
        return _WeightSlot.apply(rows, self.gradient_slot)


class _WeightSlot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, gradient_slot: int) -> Tensor:
        ctx.gradient_slot = gradient_slot
        return rows.unflatten(1, (-1, WIDE_DIM))[:, :, WIDE_WEIGHT_SLOT]  # [B, F]

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        rows = gradient.new_zeros((*gradient.shape, WIDE_DIM))  # [B, F, 4]
        rows[:, :, ctx.gradient_slot] = gradient
        return rows.flatten(1), None


def _features_by_table(schema: Schema, features: Sequence[str]) -> dict[str, list[str]]:
    by_table: dict[str, list[str]] = {}
    for feature in features:
        by_table.setdefault(schema.features[feature].table, []).append(feature)
    for table in by_table:
        _check_table_name(table)
    return by_table


def _check_table_name(table: str) -> None:
    where = f"schema.tables.{table}"
    if is_wide_table(table):
        raise UserError(f"{where}: names beginning with '{WIDE_PREFIX}' belong to the linear part; rename the table")
    # A table is an entry of a ModuleDict: a name with '.', or one of the class's own, is refused by PyTorch.
    if not table or "." in table or hasattr(nn.ModuleDict, table) or table == "training":
        raise UserError(
            f"{where}: a PyTorch module cannot be called {table!r}; rename the table, e.g. to "
            f"'{table.replace('.', '_')}_table' (features and columns keep their names)"
        )


def _join(pieces: list[Tensor], pooled: KeyedTensor) -> Tensor:
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces, dim=1) if pieces else pooled.values()[:, :0]
