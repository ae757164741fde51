"""The one optimizer that the training pipeline steps: dense part, data-parallel tables, FTRL; fused tables are updated
inside backward already. Its state is the same pieces whatever the plan (``trainer.sharding.model_state``), and the
number of steps.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.optimizers import in_backward_optimizer_filter

from trainer.checkpoint.piece import Piece, empty_piece, in_order, whole_piece, written_once
from trainer.config.optim import OptimConfig, TableOptimizerConfig
from trainer.modules.embeddings import is_wide_table
from trainer.optim.average import DenseAverage
from trainer.optim.dense import clip_gradients, make_dense_optimizer, materialise_state, schedule_factor
from trainer.optim.ftrl import FTRL
from trainer.optim.mini_batch_aware import MiniBatchAware
from trainer.optim.rates import TableRates, check_schedules
from trainer.optim.tables import (
    EmbeddingTable,
    FusedShard,
    count_training_steps_only,
    data_parallel_table_optimizers,
    embedding_tables,
    fused_shards,
    is_data_parallel,
    part_widths,
    set_fused_steps,
    state_names,
)


class CombinedOptimizer:
    """All optimizers of a sharded model.

    ``steps`` counts the steps made. It and ``reduction``, what a plateau left of all rates, decide the learning rates of
    the next step. Clipping is for dense parameters only. Raises ``UserError`` for options that an optimizer does not have.
    """

    def __init__(
        self, model: DistributedModelParallel, plan: ShardingPlan, optim: OptimConfig, *, total_steps: int
    ) -> None:
        self.config, self.total_steps = optim.dense, total_steps
        self.steps = self.table_steps = 0
        self.reduction = 1.0
        self._model, self._plan, self._optim = model, plan, optim
        check_schedules(embedding_tables(model), optim)
        self._tables, self._table_parameters = data_parallel_table_optimizers(model, plan, optim)
        for optimizer in self._tables:
            materialise_state(optimizer)
        self._dense_parameters = {
            name: parameter
            for name, parameter in in_backward_optimizer_filter(model.named_parameters())
            if parameter.requires_grad and name not in self._table_parameters
        }
        self._dense = make_dense_optimizer(self._dense_parameters, optim.dense) if self._dense_parameters else None
        averaged = optim.dense.ema_decay is not None and self._dense_parameters
        self._average = DenseAverage(self._dense_parameters, optim.dense.ema_decay) if averaged else None
        wide = any(is_wide_table(table.name) for table in embedding_tables(model))
        self._ftrl = FTRL(model, optim.wide) if wide and optim.wide.name == "ftrl" else None
        self._table_rates = TableRates(model, self._tables, optim, total_steps)
        self._table_rates.set(self.steps, self.reduction)
        self.mini_batch_aware = MiniBatchAware(model, plan, optim)
        count_training_steps_only(model)

    @property
    def lr(self) -> float:
        """The dense learning rate of the next step."""
        return self.config.lr * schedule_factor(self.config.schedule, self.steps, self.total_steps) * self.reduction

    def reduce_rates(self, reduction: float) -> None:
        """From the next step on all learning rates are ``reduction`` times what their schedules say."""
        if self._ftrl is not None:
            self._ftrl.change_rate(self._optim.wide.lr * reduction)
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
            for group in self._dense.param_groups:
                group["lr"] = self.lr
        for optimizer in self._ordinary():
            optimizer.step()
        if self._ftrl is not None:
            self._ftrl.step()
        if self._average is not None:
            self._average.update(self.steps)
        self.steps += 1
        self._table_rates.set(self.steps, self.reduction)

    def pieces(self) -> list[Piece]:
        """All state but the number of steps: the same names in the same order on every rank. It is the optimizer's own
        memory, which stays where it is from the first step to the last."""
        shards: dict[str, list[FusedShard]] = {}
        for shard in fused_shards(self._model):
            shards.setdefault(shard.table, []).append(shard)
        fused: list[Piece] = []
        replicated = self._dense_pieces()
        for table in embedding_tables(self._model):
            kind = self._optim.of_table(table.name, wide=is_wide_table(table.name))
            if is_data_parallel(table, self._plan):
                replicated += self._data_parallel_pieces(table, kind)
            else:
                fused += _fused_pieces(table, kind, part_widths(table, self._plan), shards.get(table.name, []))
        return in_order([*fused, *self.mini_batch_aware.pieces(), *self.average_pieces(), *written_once(replicated)])

    def average_pieces(self) -> list[Piece]:
        """Of the averages that stand for the dense parameters in scoring (``optim.dense.ema_decay``)."""
        return in_order(written_once(self._average.pieces())) if self._average is not None else []

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the dense parameters are their averages, where there are any."""
        return self._average.in_place() if self._average is not None else nullcontext()

    def restore(self, steps: int, table_steps: int = 0, reduction: float = 1.0) -> None:
        """Goes on as after ``steps`` steps: the schedules, and what the tables' optimizers derive from their number, in
        which the ``table_steps`` of earlier runs count, too. The rest of the state is in ``pieces``."""
        self.steps, self.table_steps, self.reduction = steps, table_steps, reduction
        if self._ftrl is not None:
            self._ftrl.config = replace(self._optim.wide, lr=self._optim.wide.lr * reduction)
        self._table_rates.set(steps, reduction)
        if self._average is not None and not steps:  # a warm start has changed the parameters
            self._average.restart()
        set_fused_steps(self._model, table_steps + steps)
        for optimizer in self._tables:
            for state in optimizer.state.values():
                if "step" in state:  # of each parameter, equal to ours
                    state["step"].fill_(table_steps + steps)

    def _ordinary(self) -> list[torch.optim.Optimizer]:
        return [*self._tables, *([self._dense] if self._dense is not None else [])]

    def _dense_pieces(self) -> list[Piece]:
        found: list[Piece] = []
        for name, parameter in self._dense_parameters.items():
            assert self._dense is not None
            for key, value in self._dense.state[parameter].items():
                if value is not None:  # SGD without momentum
                    found.append(whole_piece(f"optimizer/{name}/{key}", value))
        return found

    def _data_parallel_pieces(self, table: EmbeddingTable, kind: TableOptimizerConfig) -> list[Piece]:
        parameter: nn.Parameter = self._table_parameters[table.parameter]
        state = next((o.state[parameter] for o in self._tables if parameter in o.state), {})
        widths = (table.dim,) if kind.name == "rowwise_adagrad" else None
        return [
            whole_piece(f"tables/{table.name}/{key}", state[key].view(table.rows, -1), widths)
            for key in state_names(kind)
        ]


def _fused_pieces(
    table: EmbeddingTable, kind: TableOptimizerConfig, widths: tuple[int, ...], shards: Sequence[FusedShard]
) -> list[Piece]:
    """All states of a table, each with at least one piece. ``widths``: columns of the parts of its rows."""
    by_rows = kind.name == "rowwise_adagrad"
    found: list[Piece] = []
    for key in state_names(kind):
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
