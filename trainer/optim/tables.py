"""Optimizers of embedding tables: fused into backward (FBGEMM, or ``trainer.sharding.cpu_tables``), or ordinary ones for
data-parallel tables.

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

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.optim.optimizers import SGD, Adagrad, Adam
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from data_loaders.errors import UserError
from trainer.config.optim import TableOptimizerConfig
from trainer.sharding.table_plan import EmbeddingTable, TablePlan

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


def apply_table_optimizers(model: nn.Module, tables: Sequence[TablePlan], device: torch.device) -> None:
    """Attaches to every table of the unsharded ``model`` the optimizer that sharding will fuse into its backward.
    Data-parallel tables are left to ``data_parallel_table_optimizers``.

    Raises ``UserError`` for what FBGEMM cannot do.
    """
    parameters = dict(model.named_parameters())
    for table in tables:
        if not table.data_parallel:
            _check_fused(table, device)
            optimizer, arguments = fused_optimizer(table.optimizer)
            _apply_optimizer_in_backward(optimizer, [parameters[table.parameter]], arguments)


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


def state_names(config: TableOptimizerConfig) -> tuple[str, ...]:
    """The states of a table, fused or data-parallel, apart from the number of steps made."""
    return _STATES[config.name]


def data_parallel_table_optimizers(
    model: nn.Module, tables: Sequence[TablePlan]
) -> tuple[list[torch.optim.Optimizer], dict[str, nn.Parameter]]:
    """Optimizers (one a kind) for the data-parallel tables of the sharded ``model``, and those parameters by name.

    The updates are those above, computed densely over the table; only adam differs: it moves rows that a batch does not
    touch, too. Raises ``UserError`` for a weight decay of touched rows: which these are, an ordinary optimizer cannot know.
    """
    tables = [table for table in tables if table.data_parallel]
    parameters = dict(model.named_parameters()) if tables else {}
    groups: dict[str, list[dict[str, Any]]] = {}
    for table in tables:
        config = table.optimizer
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


def _check_fused(table: EmbeddingTable, device: torch.device) -> None:
    """Raises ``UserError`` for what a table can have only where it is data-parallel."""
    config, remedy = table.optimizer, f"sharding.by_table.{table.name}=data_parallel"
    if config.name == "adam" and device.type == "cuda" and table.dtype != torch.float32:
        raise UserError(
            f"optim: table '{table.name}' has optimizer adam and rows of fp16, which FBGEMM's Adam fails on in its first "
            f"step: set data.schema.tables.{table.name}.dtype=fp32, or use rowwise_adagrad, adagrad or sgd"
        )
    if config.weight_decay and config.weight_decay_rows == "all":
        raise UserError(
            f"optim: table '{table.name}' has weight_decay={config.weight_decay} of all its rows, which FBGEMM does not "
            f"touch in a step: use weight_decay_rows=touched, or {remedy}"
        )
