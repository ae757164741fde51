"""Optimizers of embedding tables: fused into backward (FBGEMM), or ordinary ones for data-parallel tables.

Gradients. TorchRec divides what a table receives by the world size, so a table is updated with the gradient of the
mean over ranks of the ranks' losses, as DistributedDataParallel does for dense parameters. Contributions to one row are
added up over the batch and over ranks before the update: a row is updated once a step however often its id occurs.

Updates of a touched row w with gradient g (D entries), as FBGEMM computes them:

* sgd              w -= lr g
* adagrad          s += g²; w -= lr g / (√s + eps)                         Duchi et al., 2011, one s an entry
* rowwise_adagrad  s += mean(g²); w -= lr g / (√s + eps)                   one s a row
* adam             m, v as Kingma & Ba, 2015; w -= lr m̂ / (√v̂ + eps); untouched rows rest
* ftrl             sgd with rate 1 collects -g in slot 3 of the row; see ``trainer.optim.ftrl``

``weight_decay`` of touched rows is ours (``trainer.optim.mini_batch_aware``). That of all rows is PyTorch's, of data-parallel
tables: g += weight_decay w in every row, the gradient of weight_decay / 2 ‖table‖² in the loss, as DeepCTR's and FuxiCTR's
regularisers have it; with their dense Adam, too, which moves every row at every step.

In a table cut by columns, rowwise_adagrad keeps one s for each part of a row, the mean being over that part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingModule
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import PoolingType, data_type_to_dtype
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.optimizers import SGD, Adagrad, Adam
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from data_loaders.errors import UserError
from trainer.config.optim import OptimConfig, TableOptimizerConfig
from trainer.modules.embeddings import WIDE_DIM, is_wide_table

_ORDINARY = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "rowwise_adagrad": RowWiseAdagrad,
}
_STATES = {
    "sgd": (),
    "ftrl": (),  # it is in the tables
    "adagrad": ("sum",),
    "rowwise_adagrad": ("sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
}


@dataclass(frozen=True)
class EmbeddingTable:
    """A table of a model, sharded or not. ``module`` is the path of its collection, ``parameter`` the name of its
    weight in ``state_dict``; ``pooled`` tells an EmbeddingBagCollection from an EmbeddingCollection, ``mean`` its
    pooling."""

    name: str
    module: str
    parameter: str
    pooled: bool
    mean: bool
    rows: int
    dim: int
    dtype: torch.dtype
    features: tuple[str, ...]


def embedding_tables(model: nn.Module) -> list[EmbeddingTable]:
    """All tables of a model, sharded or not. Raises ``UserError`` if two collections have a table of the same name."""
    found: dict[str, EmbeddingTable] = {}
    for path, module in get_unwrapped_module(model).named_modules():
        for table in _tables_of(path, module):
            if table.name in found:
                raise UserError(
                    f"table '{table.name}' is in both '{found[table.name].module}' and '{path}': a table lives in one "
                    "collection; rename one of them"
                )
            found[table.name] = table
    return list(found.values())


def apply_table_optimizers(model: nn.Module, plan: ShardingPlan, optim: OptimConfig, device: torch.device) -> None:
    """Attaches to every table of the unsharded ``model`` the optimizer that sharding will fuse into its backward.
    Data-parallel tables are left to ``data_parallel_table_optimizers``.

    Raises ``UserError`` for what FBGEMM or the linear part cannot do (see ``check_table_optimizers``).
    """
    tables = embedding_tables(model)
    check_table_optimizers(tables, optim, device)
    parameters = dict(model.named_parameters())
    for table in tables:
        if is_data_parallel(table, plan):
            continue
        _check_fused(table, optim.of_table(table.name, wide=is_wide_table(table.name)), device)
        optimizer, arguments = fused_optimizer(optim.of_table(table.name, wide=is_wide_table(table.name)))
        _apply_optimizer_in_backward(optimizer, [parameters[table.parameter]], arguments)


def check_table_optimizers(tables: list[EmbeddingTable], optim: OptimConfig, device: torch.device) -> None:
    """Raises ``UserError`` (table, value, remedy) for a table optimizer that cannot work."""
    names = {table.name for table in tables}
    for name in optim.by_table:
        if name not in names:
            raise UserError(f"optim.by_table.{name}: the model has no such table; it has {', '.join(sorted(names))}")
    wide = [table.name for table in tables if is_wide_table(table.name)]
    ftrl = [name for name in wide if optim.of_table(name, wide=True).name == "ftrl"]
    if ftrl and len(ftrl) != len(wide):
        rest = next(name for name in wide if name not in ftrl)
        raise UserError(
            f"optim.by_table.{rest}: with optim.wide.name=ftrl all wide tables use FTRL (their gradients go to the "
            "slot it reads); remove the entry, or choose another optim.wide.name"
        )
    for table in tables:
        _check_table_optimizer(table, optim.of_table(table.name, wide=is_wide_table(table.name)))


def fused_optimizer(config: TableOptimizerConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """TorchRec's optimizer class and FBGEMM's arguments for it, a new dict each time (TorchRec writes into it)."""
    if config.name == "ftrl":
        return SGD, {"lr": 1.0}
    if config.name == "sgd":
        return SGD, {"lr": config.lr}
    if config.name == "adagrad":
        return Adagrad, {"lr": config.lr, "eps": config.eps}
    if config.name == "adam":
        return Adam, {"lr": config.lr, "eps": config.eps, "beta1": config.beta1, "beta2": config.beta2}
    assert config.name == "rowwise_adagrad", config.name
    return RowWiseAdagrad, {"lr": config.lr, "eps": config.eps}


def state_bytes(config: TableOptimizerConfig, rows: int, dim: int) -> int:
    """Bytes beside the weights of a shard [rows, dim], of whatever type: float32 optimizer state, and the int64 counts of
    mini-batch aware regularisation."""
    entries = {"sgd": 0, "ftrl": 0, "rowwise_adagrad": rows, "adagrad": rows * dim, "adam": 2 * rows * dim}
    return 4 * entries[config.name] + (8 * rows if config.mini_batch_l2 else 0)


def table_bytes(table: EmbeddingTable, config: TableOptimizerConfig, rows: int, dim: int) -> int:
    """Bytes of a shard [rows, dim] of a table: its weights and what is beside them."""
    return table.dtype.itemsize * rows * dim + state_bytes(config, rows, dim)


def state_names(config: TableOptimizerConfig) -> tuple[str, ...]:
    """The states of a table, fused or data-parallel, apart from the number of steps made."""
    return _STATES[config.name]


def is_data_parallel(table: EmbeddingTable, plan: ShardingPlan) -> bool:
    return plan.plan[table.module][table.name].sharding_type == ShardingType.DATA_PARALLEL.value


def part_widths(table: EmbeddingTable, plan: ShardingPlan) -> tuple[int, ...]:
    """Columns of each part of a table's rows, wherever the parts lie: (dim,) for a table that is not cut by columns."""
    spec = plan.plan[table.module][table.name].sharding_spec
    if spec is None:  # data-parallel
        return (table.dim,)
    widths = {shard.shard_offsets[1]: shard.shard_sizes[1] for shard in spec.shards}  # by first column
    return tuple(widths[column] for column in sorted(widths))


def data_parallel_table_optimizers(
    model: nn.Module, plan: ShardingPlan, optim: OptimConfig
) -> tuple[list[torch.optim.Optimizer], dict[str, nn.Parameter]]:
    """Optimizers (one a kind) for the data-parallel tables of the sharded ``model``, and those parameters by name.

    The updates are those above, computed densely over the table; only adam differs: it moves rows that a batch does not
    touch, too. Raises ``UserError`` for a weight decay of touched rows: which these are, an ordinary optimizer cannot know.
    """
    tables = [table for table in embedding_tables(model) if is_data_parallel(table, plan)]
    parameters = dict(model.named_parameters()) if tables else {}
    groups: dict[str, list[dict[str, Any]]] = {}
    for table in tables:
        config = optim.of_table(table.name, wide=is_wide_table(table.name))
        if config.weight_decay and config.weight_decay_rows == "touched":
            raise UserError(
                f"table '{table.name}' is data_parallel and has weight_decay={config.weight_decay} for touched rows, which "
                "only sharded tables know: set weight_decay_rows=all, or shard the table (sharding.by_table)"
            )
        group = {"params": [parameters[table.parameter]], "lr": config.lr, "config": config}
        group["weight_decay"] = config.weight_decay
        if config.name != "sgd":
            group["eps"] = config.eps
        if config.name == "adam":
            group["betas"] = (config.beta1, config.beta2)
        groups.setdefault(config.name, []).append(group)
    optimizers = [_ORDINARY[name](group) for name, group in groups.items()]
    return optimizers, {table.parameter: parameters[table.parameter] for table in tables}


def fused_kernels(
    model: nn.Module,
) -> Iterator[tuple[SplitTableBatchedEmbeddingBagsCodegen, GroupedEmbeddingConfig]]:
    """The FBGEMM kernels of a sharded model on this rank, each with the table shards it holds."""
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingModule):
            for lookup in module._lookups:  # a plain list: not among model.modules()
                for kernel in lookup.modules():
                    table_batched = getattr(kernel, "emb_module", None)
                    if isinstance(table_batched, SplitTableBatchedEmbeddingBagsCodegen):
                        yield table_batched, kernel.config


@dataclass(frozen=True)
class FusedShard:
    """What FBGEMM keeps beside a shard of ``table`` that begins at ``row`` and ``column``: live memory by the names of
    ``state_names``, [rows of the shard] for row-wise AdaGrad, else [rows, columns of the shard]."""

    table: str
    row: int
    column: int
    states: dict[str, Tensor]


def fused_shards(model: nn.Module) -> Iterator[FusedShard]:
    """The shards on this rank of the fused tables whose optimizer has states."""
    for kernel, tables in fused_kernels(model):
        if kernel.optimizer == EmbOptimType.EXACT_SGD:
            continue
        for table, states in zip(tables.embedding_tables, kernel.get_optimizer_state(), strict=True):
            row, column = table.local_metadata.shard_offsets
            yield FusedShard(table.name, row, column, states)


def set_fused_steps(model: nn.Module, step: int) -> None:
    """Sets the step count of fused Adam (its bias correction), which FBGEMM keeps out of the optimizer's state."""
    for kernel, _ in fused_kernels(model):
        if kernel.optimizer == EmbOptimType.ADAM:
            kernel.iter.fill_(step)
            kernel.iter_cpu.fill_(step)


def count_training_steps_only(model: nn.Module) -> None:
    """FBGEMM's Adam counts every forward pass as a step, evaluation too: takes those back, so that the bias correction
    depends on training steps alone and a resumed run equals an uninterrupted one."""
    for kernel, _ in fused_kernels(model):
        if kernel.optimizer == EmbOptimType.ADAM:
            kernel.register_forward_hook(_uncount_evaluation)


def _uncount_evaluation(kernel: nn.Module, inputs: Any, output: Any) -> None:
    if not kernel.training:
        kernel.iter.sub_(1)
        kernel.iter_cpu.sub_(1)


def _tables_of(path: str, module: nn.Module) -> list[EmbeddingTable]:
    if isinstance(module, EmbeddingBagCollection):
        configs, pooled = module.embedding_bag_configs(), True
    elif isinstance(module, EmbeddingCollection):
        configs, pooled = module.embedding_configs(), False
    elif isinstance(module, ShardedEmbeddingBagCollection):
        configs, pooled = module._embedding_bag_configs, True
    elif isinstance(module, ShardedEmbeddingCollection):
        configs, pooled = module._embedding_configs, False
    else:
        return []
    attribute = "embedding_bags" if pooled else "embeddings"
    prefix = f"{path}.{attribute}" if path else attribute
    return [
        EmbeddingTable(
            name=config.name,
            module=path,
            parameter=f"{prefix}.{config.name}.weight",
            pooled=pooled,
            mean=pooled and config.pooling == PoolingType.MEAN,
            rows=config.num_embeddings,
            dim=config.embedding_dim,
            dtype=data_type_to_dtype(config.data_type),
            features=tuple(config.feature_names),
        )
        for config in configs
    ]


def _check_fused(table: EmbeddingTable, config: TableOptimizerConfig, device: torch.device) -> None:
    """Raises ``UserError`` for what a table can have only where it is data-parallel."""
    remedy = f"sharding.by_table.{table.name}=data_parallel"
    if config.name == "adam" and device.type == "cpu":
        raise UserError(
            f"optim: table '{table.name}' has optimizer adam, which FBGEMM lacks on a CPU: use rowwise_adagrad, adagrad or "
            f"sgd, or device=cuda, or {remedy}"
        )
    if config.name == "adam" and table.dtype != torch.float32:
        raise UserError(
            f"optim: table '{table.name}' has optimizer adam and rows of fp16, which FBGEMM's Adam fails on in its first "
            f"step: set data.schema.tables.{table.name}.dtype=fp32, or use rowwise_adagrad, adagrad or sgd"
        )
    if config.weight_decay and config.weight_decay_rows == "all":
        raise UserError(
            f"optim: table '{table.name}' has weight_decay={config.weight_decay} of all its rows, which FBGEMM does not "
            f"touch in a step: use weight_decay_rows=touched, or {remedy}"
        )


def _check_table_optimizer(table: EmbeddingTable, config: TableOptimizerConfig) -> None:
    where = f"optim: table '{table.name}' has optimizer {config.name}"
    if config.name in ("rowwise_adagrad", "adagrad", "adam") and not config.eps > 0:
        raise UserError(f"{where} with eps={config.eps}: a gradient of zeros would divide 0 by 0; use 1e-8")
    if config.weight_decay and config.name == "ftrl":
        raise UserError(f"{where} with weight_decay={config.weight_decay}: use l2 instead, or set it to 0")
    if table.dtype != torch.float32 and (config.weight_decay or config.mini_batch_l2):
        decay = "weight_decay" if config.weight_decay else "mini_batch_l2"
        raise UserError(
            f"{where} with {decay}={getattr(config, decay)}, whose steps are too small for rows of fp16: set "
            f"schema.tables.{table.name}.dtype=fp32, or {decay}=0"
        )
    if config.name == "ftrl":
        assert is_wide_table(table.name) and table.dim == WIDE_DIM, table
