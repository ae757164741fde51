"""Learning rates of embedding tables over the run: each table optimizer's own schedule times what a plateau left of it.

FBGEMM keeps a rate for each kernel, on the host, and reads it in a training forward; tables of equal optimizer arguments
share a kernel, so they share a schedule (``check_schedules``). FTRL's rate is part of its sums and changes on a plateau
only (``trainer.optim.ftrl``).
"""

from collections.abc import Sequence

import torch

from data_loaders.errors import UserError
from trainer.config.optim import ScheduleConfig, TableOptimizerConfig
from trainer.optim.dense import schedule_factor
from trainer.optim.tables import fused_optimizer
from trainer.sharding.kernels import FusedKernel
from trainer.sharding.table_plan import EmbeddingTable, TablePlan


class TableRates:
    """Sets the rates of fused and of data-parallel tables. A parameter group of ``data_parallel`` has its table's
    ``config``."""

    def __init__(
        self,
        kernels: Sequence[FusedKernel],
        data_parallel: Sequence[torch.optim.Optimizer],
        tables: Sequence[TablePlan],
        total_steps: int,
    ) -> None:
        self._total_steps = total_steps
        self._groups = [group for optimizer in data_parallel for group in optimizer.param_groups]
        self._kernels = []
        self._rates: list[float] = []  # of the kernels
        optimizers = {table.name: table.optimizer for table in tables}
        for kernel, shards in kernels:
            configs = [optimizers[shard.name] for shard in shards]
            if all(config.name != "ftrl" for config in configs):
                self._kernels.append((kernel, configs[0]))

    def set(self, step: int, reduction: float) -> None:
        """For the step that ``step`` steps precede."""
        for group in self._groups:
            group["lr"] = self._rate(group["config"], step, reduction)
        rates = [self._rate(config, step, reduction) for _, config in self._kernels]
        if rates != self._rates:
            for (kernel, _), rate in zip(self._kernels, rates, strict=True):
                kernel.set_learning_rate(rate)
        self._rates = rates

    def _rate(self, config: TableOptimizerConfig, step: int, reduction: float) -> float:
        return config.lr * schedule_factor(config.schedule, step, self._total_steps) * reduction


def check_schedules(tables: Sequence[EmbeddingTable], *, plateau: bool) -> None:
    """Raises ``UserError`` for tables that would share a kernel and not its rate. ``plateau``: rates may be reduced."""
    known: dict[str, tuple[str, str]] = {}
    for table in tables:
        config = table.optimizer
        arguments = repr(fused_optimizer(config))
        rate = "ftrl" if config.name == "ftrl" else repr(config.schedule)
        other, theirs = known.setdefault(arguments, (table.name, rate))
        moves = plateau or not {rate, theirs} <= {"ftrl", repr(ScheduleConfig())}
        if rate != theirs and moves:
            raise UserError(
                f"optim: tables '{other}' and '{table.name}' have the same optimizer and lr={config.lr}, so FBGEMM updates "
                "them with one rate, but their rates change differently: give one of them another lr (such as "
                f"{1.0001 * config.lr:g}), or both one schedule"
            )
