"""One record a table: what it is, how it learns and where its rows lie.

``embedding_tables`` reads the module tree once, before the plan; ``sharding.planner`` adds where the rows lie. From then on
whoever wants to know something of a table has its ``TablePlan``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.distributed.types import ParameterSharding, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import PoolingType, data_type_to_dtype
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from data_loaders.errors import UserError
from trainer.config.optim import OptimConfig, TableOptimizerConfig
from trainer.modules.embeddings import WIDE_DIM, is_wide_table


@dataclass(frozen=True)
class EmbeddingTable:
    """A table of a model that is not sharded yet. ``module`` is the path of its collection, ``parameter`` the name of its
    weight in ``state_dict``; ``pooled`` distinguishes an EmbeddingBagCollection from an EmbeddingCollection, ``mean`` is
    its pooling; ``weighted``: of ids with weights."""

    name: str
    module: str
    parameter: str
    pooled: bool
    mean: bool
    rows: int
    dim: int
    dtype: torch.dtype
    features: tuple[str, ...]
    optimizer: TableOptimizerConfig
    weighted: bool

    @property
    def wide(self) -> bool:
        return is_wide_table(self.name)

    def weight_bytes(self, rows: int, dim: int) -> int:
        """Of a shard [rows, dim]."""
        return self.dtype.itemsize * rows * dim

    def state_bytes(self, rows: int, dim: int) -> int:
        """Bytes beside the weights of a shard [rows, dim]: float32 optimizer state, the int64 counts of mini-batch aware
        regularisation, and the int32 clock."""
        entries = {"sgd": 0, "ftrl": 0, "rowwise_adagrad": rows, "adagrad": rows * dim, "adam": 2 * rows * dim}
        clock, counts = 4 * rows * self.optimizer.clock, 8 * rows * (self.optimizer.mini_batch_l2 > 0)
        return 4 * entries[self.optimizer.name] + clock + counts

    def all_bytes(self, rows: int, dim: int) -> int:
        return self.weight_bytes(rows, dim) + self.state_bytes(rows, dim)


@dataclass(frozen=True)
class Part:
    """``height`` rows from ``row`` on, ``width`` columns from ``column`` on, which ``rank`` holds."""

    rank: int
    row: int
    column: int
    height: int
    width: int


@dataclass(frozen=True)
class TablePlan(EmbeddingTable):
    """``parts`` of a data-parallel table: the whole of it on every rank."""

    sharding_type: str
    kernel: str
    parts: tuple[Part, ...]

    @property
    def data_parallel(self) -> bool:
        return self.sharding_type == ShardingType.DATA_PARALLEL.value

    @property
    def part_widths(self) -> tuple[int, ...]:
        """Columns of each part of its rows, wherever the parts lie: (dim,) for a table that is not cut by columns."""
        widths = {part.column: part.width for part in self.parts}
        return tuple(widths[column] for column in sorted(widths))

    @property
    def bytes_by_rank(self) -> dict[int, int]:
        """Weights and optimizer state."""
        held = dict.fromkeys(sorted({part.rank for part in self.parts}), 0)
        for part in self.parts:
            held[part.rank] += self.all_bytes(part.height, part.width)
        return held

    def summary(self) -> dict[str, Any]:
        """For printing and ``plan.json``."""
        held = self.bytes_by_rank
        return {
            "table": self.name,
            "module": self.module,
            "sharding": self.sharding_type,
            "kernel": self.kernel,
            "optimizer": self.optimizer.name,
            "rows": self.rows,
            "dim": self.dim,
            "ranks": list(held),
            "bytes": {str(rank): size for rank, size in held.items()},
        }


@dataclass(frozen=True)
class Plan:
    """Where all tables lie: as TorchRec wants it, and one record each."""

    sharding: ShardingPlan
    tables: tuple[TablePlan, ...]


def make_records(tables: Sequence[EmbeddingTable], plan: ShardingPlan) -> tuple[TablePlan, ...]:
    return tuple(_record(table, plan.plan[table.module][table.name]) for table in tables)


def _record(table: EmbeddingTable, sharding: ParameterSharding) -> TablePlan:
    if sharding.sharding_spec is None:  # data-parallel
        parts = tuple(Part(rank, 0, 0, table.rows, table.dim) for rank in sharding.ranks)
    else:
        shards = sharding.sharding_spec.shards
        parts = tuple(Part(s.placement.rank(), *s.shard_offsets, *s.shard_sizes) for s in shards)
    return TablePlan(**vars(table), sharding_type=sharding.sharding_type, kernel=sharding.compute_kernel, parts=parts)


def embedding_tables(model: nn.Module, optim: OptimConfig) -> list[EmbeddingTable]:
    """All tables of an unsharded model. Raises ``UserError`` if two collections have a table of the same name, and (table,
    value, remedy) for a table optimizer that cannot work."""
    found: dict[str, EmbeddingTable] = {}
    for path, module in model.named_modules():
        for table in _tables_of(path, module, optim):
            if table.name in found:
                raise UserError(
                    f"table '{table.name}' is in both '{found[table.name].module}' and '{path}': a table lives in one "
                    "collection; rename one of them"
                )
            found[table.name] = table
    _check_by_table(found, optim)
    for table in found.values():
        _check_optimizer(table)
    return list(found.values())


def _tables_of(path: str, module: nn.Module, optim: OptimConfig) -> Iterator[EmbeddingTable]:
    if isinstance(module, EmbeddingBagCollection):
        configs, pooled, attribute = module.embedding_bag_configs(), True, "embedding_bags"
    elif isinstance(module, EmbeddingCollection):
        configs, pooled, attribute = module.embedding_configs(), False, "embeddings"
    else:
        return
    prefix = f"{path}.{attribute}" if path else attribute
    for config in configs:
        yield EmbeddingTable(
            name=config.name,
            module=path,
            parameter=f"{prefix}.{config.name}.weight",
            pooled=pooled,
            mean=pooled and config.pooling == PoolingType.MEAN,
            rows=config.num_embeddings,
            dim=config.embedding_dim,
            dtype=data_type_to_dtype(config.data_type),
            features=tuple(config.feature_names),
            optimizer=optim.of_table(config.name, wide=is_wide_table(config.name)),
            weighted=pooled and module.is_weighted(),
        )


def _check_by_table(tables: dict[str, EmbeddingTable], optim: OptimConfig) -> None:
    for name in optim.by_table:
        if name not in tables:
            raise UserError(f"optim.by_table.{name}: the model has no such table; it has {', '.join(sorted(tables))}")
    wide = [table for table in tables.values() if table.wide]
    rest = [table.name for table in wide if table.optimizer.name != "ftrl"]
    if 0 < len(rest) < len(wide):
        raise UserError(
            f"optim.by_table.{rest[0]}: with optim.wide.name=ftrl all wide tables use FTRL (their gradients go to the "
            "slot it reads); remove the entry, or choose another optim.wide.name"
        )


def _check_optimizer(table: EmbeddingTable) -> None:
    config = table.optimizer
    where = f"optim: table '{table.name}' has optimizer {config.name}"
    if config.name in ("rowwise_adagrad", "adagrad", "adam") and not config.eps > 0:
        raise UserError(f"{where} with eps={config.eps}: a gradient of zeros would divide 0 by 0; use 1e-8")
    if config.weight_decay and config.name == "ftrl":
        raise UserError(f"{where} with weight_decay={config.weight_decay}: use l2 instead, or set it to 0")
    decays = [key for key in ("weight_decay", "mini_batch_l2", "interval_decay") if getattr(config, key)]
    if table.dtype != torch.float32 and decays:
        (decay, *_) = decays
        raise UserError(
            f"{where} with {decay}={getattr(config, decay)}, whose steps are too small for rows of fp16: set "
            f"schema.tables.{table.name}.dtype=fp32, or {decay}=0"
        )
    if config.name == "ftrl":
        assert table.wide and table.dim == WIDE_DIM, table
