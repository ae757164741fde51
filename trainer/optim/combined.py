"""The one optimizer that the training pipeline steps: dense part, data-parallel tables, FTRL; fused tables are updated
inside backward already. Its state is the same pieces whatever the plan (``trainer.sharding.model_state``), and the
number of steps.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.optimizers import in_backward_optimizer_filter

from trainer.checkpoint.piece import Piece, empty_piece, in_order, whole_piece, written_once
from trainer.config.optim import OptimConfig
from trainer.optim.average import DenseAverage
from trainer.optim.dense import (
    clip_gradients,
    leaves_out_masked,
    make_dense_optimizer,
    materialise_state,
    rests_without_gradient,
    schedule_factor,
)
from trainer.optim.ftrl import FTRL
from trainer.optim.masked_tables import MaskedTables
from trainer.optim.mini_batch_aware import MiniBatchAware
from trainer.optim.rates import TableRates, check_schedules
from trainer.optim.row_clock import RowClock
from trainer.optim.tables import data_parallel_table_optimizers, state_names
from trainer.runtime.step_mask import Rollback, StepMask
from trainer.sharding.kernels import (
    FusedShard,
    count_training_steps_only,
    fused_kernels,
    fused_shards,
    set_fused_steps,
)
from trainer.sharding.table_plan import TablePlan

FORGOTTEN = ("tables/", "clock/")  # what is kept of each row


class CombinedOptimizer:
    """All optimizers of a sharded model.

    ``steps`` counts the steps made. It and ``reduction``, what a plateau left of all rates, decide the learning rates of
    the next step. Clipping is for dense parameters only. A step that ``mask`` masks changes nothing but these
    counts. Raises ``UserError`` for options that an optimizer does not have.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        tables: Sequence[TablePlan],
        optim: OptimConfig,
        *,
        total_steps: int,
        mask: StepMask,
    ) -> None:
        self.config, self.total_steps = optim.dense, total_steps
        self.steps = self.table_steps = self.clock_steps = 0
        self.reduction = 1.0
        self._tables, self._wide = tables, optim.wide
        check_schedules(tables, plateau=optim.plateau.patience is not None)
        self._data_parallel, self._table_parameters = data_parallel_table_optimizers(model, tables)
        for optimizer in self._data_parallel:
            materialise_state(optimizer)
        self._dense_parameters = {
            name: parameter
            for name, parameter in in_backward_optimizer_filter(model.named_parameters())
            if parameter.requires_grad and name not in self._table_parameters
        }
        self._dense = make_dense_optimizer(self._dense_parameters, optim.dense) if self._dense_parameters else None
        averaged = optim.dense.ema_decay is not None and self._dense_parameters
        self._average = DenseAverage(self._dense_parameters, optim.dense.ema_decay) if averaged else None
        has_ftrl = any(table.optimizer.name == "ftrl" for table in tables)
        self._kernels = fused_kernels(model)
        self._ftrl = FTRL(model, self._kernels, optim.wide) if has_ftrl else None
        self._table_rates = TableRates(self._kernels, self._data_parallel, tables, total_steps)
        self._table_rates.set(self.steps, self.reduction)
        self.mini_batch_aware = MiniBatchAware(self._kernels, tables, mask)
        self._masked_tables = MaskedTables(self._kernels, tables, mask)
        # After the decay by gradients' rates, before the kernels' updates; a later hook sees the step written down.
        self.row_clock = RowClock(model, self._kernels, tables, lambda: self.clock_steps + self.steps + 1, mask)
        self._mask = mask
        resting, moving = self._resting_and_moving()
        self._resting, self._rollback = resting, Rollback(moving, mask)
        count_training_steps_only(self._kernels)

    @property
    def lr(self) -> float:
        """The dense learning rate of the next step."""
        return self.config.lr * schedule_factor(self.config.schedule, self.steps, self.total_steps) * self.reduction

    def reduce_rates(self, reduction: float) -> None:
        """From the next step on all learning rates are ``reduction`` times what their schedules say."""
        if self._ftrl is not None:
            self._ftrl.change_rate(self._wide.lr * reduction)
        self.reduction = reduction
        self._table_rates.set(self.steps, self.reduction)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self._ordinary():
            optimizer.zero_grad(set_to_none=set_to_none)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """After backward. (``closure`` is there for the pipeline's sake only.)"""
        assert closure is None
        if self._dense is not None:
            if self.config.clip_norm is not None:
                clip_gradients(list(self._dense_parameters.values()), self.config.clip_norm)
            rate = self.lr
            for group in self._dense.param_groups:
                group["lr"] = rate
        self._mask.zero([parameter.grad for parameter in self._resting if parameter.grad is not None])
        self._rollback.keep()
        for optimizer in self._ordinary():
            optimizer.step()
        if self._ftrl is not None:
            self._ftrl.step()
        if self._average is not None:
            self._average.update(self.steps)
        self._rollback.restore()
        self._masked_tables.restore()
        self.steps += 1
        self._table_rates.set(self.steps, self.reduction)

    def pieces(self) -> list[Piece]:
        """All state but the number of steps: the same names in the same order on every rank. It is the optimizer's own
        memory, which stays where it is from the first step to the last."""
        shards: dict[str, list[FusedShard]] = {}
        for shard in fused_shards(self._kernels):
            shards.setdefault(shard.table, []).append(shard)
        fused: list[Piece] = []
        replicated = [*self._dense_pieces(), *self.row_clock.replicated_pieces()]
        for table in self._tables:
            if table.data_parallel:
                replicated += self._data_parallel_pieces(table)
            else:
                fused += _fused_pieces(table, shards.get(table.name, []))
        further = [*self.mini_batch_aware.pieces(), *self.row_clock.pieces(), *self.average_pieces()]
        return in_order([*fused, *further, *written_once(replicated)])

    def average_pieces(self) -> list[Piece]:
        """Of the averages that stand for the dense parameters in scoring (``optim.dense.ema_decay``)."""
        return in_order(written_once(self._average.pieces())) if self._average is not None else []

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the dense parameters are their averages, where there are any."""
        return self._average.in_place() if self._average is not None else nullcontext()

    def restore(self, steps: int, table_steps: int = 0, reduction: float = 1.0, *, clock_steps: int = 0) -> None:
        """Goes on as after ``steps`` steps: the schedules, and what the tables' optimizers derive from their number, in
        which the ``table_steps`` of earlier runs count, too, and the row clock, with the ``clock_steps`` of earlier runs.
        The rest of the state is in ``pieces``."""
        self.steps, self.table_steps, self.reduction, self.clock_steps = steps, table_steps, reduction, clock_steps
        if self._ftrl is not None:
            self._ftrl.restore_rate(self._wide.lr * reduction)
        self._table_rates.set(steps, reduction)
        if self._average is not None and not steps:  # a warm start has changed the parameters
            self._average.restart()
        set_fused_steps(self._kernels, table_steps + steps)
        for optimizer in self._data_parallel:
            for state in optimizer.state.values():
                if "step" in state:  # of each parameter, equal to ours
                    state["step"].fill_(table_steps + steps)

    def forget_tables(self) -> None:
        """As if no step had trained the tables yet, whose rows are drawn anew. What the data say (``counts/``) stays."""
        for piece in self.pieces():
            if piece.name.startswith(FORGOTTEN):
                piece.tensor.zero_()
        self.restore(self.steps, -self.steps, self.reduction, clock_steps=self.clock_steps)

    def _ordinary(self) -> list[torch.optim.Optimizer]:
        return [*self._data_parallel, *([self._dense] if self._dense is not None else [])]

    def _resting_and_moving(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Parameters that a gradient of zero leaves as they are; and all that a step changes without a gradient, unless its
        optimizer leaves out a masked step by itself."""
        resting: list[nn.Parameter] = []
        moving = [] if self._average is None else list(self._average.values.values())
        for optimizer in self._ordinary():
            if leaves_out_masked(optimizer, self._mask):
                continue
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            states = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
            rests = rests_without_gradient(optimizer)
            resting += parameters if rests else []
            moving += [] if rests else parameters
            moving += [value for key, value in states if isinstance(value, Tensor) and (key == "step" or not rests)]
        return resting, moving

    def _dense_pieces(self) -> list[Piece]:
        found: list[Piece] = []
        for name, parameter in self._dense_parameters.items():
            assert self._dense is not None
            for key, value in self._dense.state[parameter].items():
                if value is not None:  # SGD without momentum
                    found.append(whole_piece(f"optimizer/{name}/{key}", value))
        return found

    def _data_parallel_pieces(self, table: TablePlan) -> list[Piece]:
        parameter: nn.Parameter = self._table_parameters[table.parameter]
        state = next((o.state[parameter] for o in self._data_parallel if parameter in o.state), {})
        widths = (table.dim,) if table.optimizer.name == "rowwise_adagrad" else None
        return [
            whole_piece(f"tables/{table.name}/{key}", state[key].view(table.rows, -1), widths)
            for key in state_names(table.optimizer)
        ]


def _fused_pieces(table: TablePlan, shards: Sequence[FusedShard]) -> list[Piece]:
    """All states of a table, each with at least one piece."""
    by_rows, widths = table.optimizer.name == "rowwise_adagrad", table.part_widths
    found: list[Piece] = []
    for key in state_names(table.optimizer):
        name, shape = f"tables/{table.name}/{key}", (table.rows, len(widths) if by_rows else table.dim)
        for shard in shards:
            if by_rows:
                part = [sum(widths[:part]) for part in range(len(widths))].index(shard.column)
                found.append(Piece(name, shape, (shard.row, part), shard.states[key].unsqueeze(1), widths=widths))
            else:
                found.append(Piece(name, shape, (shard.row, shard.column), shard.states[key]))
        if not shards:
            found.append(empty_piece(name, shape, torch.float32, widths if by_rows else None))
    return found
