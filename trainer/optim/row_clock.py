"""The row clock: for each row of a table the last step that trained it, ``clock/<table>`` int32 [rows, 1] of a checkpoint.

Steps are counted over the run and the runs that it was warm-started from; 0 is a row that none has trained. A row is trained
by every step in which its id occurs, whatever its gradient was, so that the clock is a function of the rows trained alone: not
of ranks, plans or restarts. A step that is masked is written down, too: nothing is saved after it.

Interval decay (AdagradAR, arXiv:2511.06374): before its update a row is multiplied by 1 - min(1, α n), n the steps since it was
last trained. It is decoupled from gradient and rate. A row that has never been trained has nothing to forget.

Shapes: N ids of a kernel's call, F features of the kernel, R rows of all its shards.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding_types import ShardedEmbeddingTable

from data_loaders.errors import UserError
from trainer.checkpoint.piece import Piece, empty_piece, whole_piece
from trainer.optim.touched_rows import Lookup, RowNumbers, RowUnits, TouchedRows
from trainer.runtime.step_mask import StepMask
from trainer.sharding.kernels import FusedKernel, dense_kernels
from trainer.sharding.table_plan import TablePlan


class RowClock:
    """Of the tables of a sharded model whose optimizer has ``clock``. ``now``: the step under way, from 1."""

    def __init__(
        self,
        model: nn.Module,
        kernels: Sequence[FusedKernel],
        tables: Sequence[TablePlan],
        now: Callable[[], int],
        mask: StepMask,
    ) -> None:
        self._tables = [table for table in tables if table.optimizer.clock]
        for table in self._tables:
            _check_sharded(table)
        clocked = {table.name: table for table in self._tables}
        self._replicated = {table.name for table in self._tables if table.data_parallel}
        self._shards = [
            shard
            for kernel in (*kernels, *dense_kernels(model))
            if any(each.name in clocked for each in kernel.shards)
            for shard in _Kernel(kernel, clocked, now, mask).shards
        ]

    def pieces(self) -> list[Piece]:
        """``clock/<table>`` of sharded tables. What several parts of a row keep, the first one's owner writes."""
        found: list[Piece] = []
        for table in self._tables:
            if not table.data_parallel:
                name, shape = f"clock/{table.name}", (table.rows, 1)
                mine = [shard for shard in self._shards if shard.table == table.name]
                found += [Piece(name, shape, (s.row, 0), s.last, written=s.column == 0) for s in mine]
                found += [] if mine else [empty_piece(name, shape, torch.int32)]
        return found

    def replicated_pieces(self) -> list[Piece]:
        """Those of data-parallel tables, alike on all ranks, which call it together."""
        self.agree()
        return [
            whole_piece(f"clock/{shard.table}", shard.last) for shard in self._shards if shard.table in self._replicated
        ]

    def agree(self) -> None:
        """A rank sees only its own ids of a data-parallel table: takes the latest step of all ranks."""
        if dist.get_world_size() > 1:
            for shard in self._shards:
                if shard.table in self._replicated:
                    dist.all_reduce(shard.last, dist.ReduceOp.MAX)


@dataclass(frozen=True)
class _Shard:
    """A part of ``table`` that begins at ``row`` and ``column``, and when its rows were ``last`` trained: [rows, 1], live."""

    table: str
    row: int
    column: int
    last: Tensor


class _Kernel:
    """A kernel with a table that has a clock, perhaps among others."""

    def __init__(
        self, kernel: FusedKernel, clocked: Mapping[str, TablePlan], now: Callable[[], int], mask: StepMask
    ) -> None:
        touched = TouchedRows(kernel)
        self._now, self._mask = now, mask
        heights = [shard.local_rows if shard.name in clocked else 0 for shard in kernel.shards]
        begins = list(accumulate(heights, initial=0))
        # The last one is of the tables without a clock.
        self._last = torch.zeros(begins[-1] + 1, dtype=torch.int32, device=kernel.module.weights_offsets.device)
        self.shards = [
            _Shard(shard.name, *_place(shard), self._last[begin : begin + height].unsqueeze(1))
            for shard, begin, height in zip(kernel.shards, begins, heights)
            if shard.name in clocked
        ]
        named = [begin if shard.name in clocked else None for shard, begin in zip(kernel.shards, begins)]
        self._numbers = RowNumbers(touched, named, other=begins[-1])
        alphas = [
            clocked[shard.name].optimizer.interval_decay if shard.name in clocked else 0.0 for shard in kernel.shards
        ]
        if any(alphas):
            self._alphas, self._units = touched.of_feature(alphas), RowUnits(touched)
            self._features = torch.arange(len(touched.begins), device=self._last.device)
            touched.before_update(self._decay)
        touched.numbers_before_update(self._numbers, self._tick)

    def _tick(self, numbers: Tensor) -> None:
        self._last.index_fill_(0, numbers, self._now())

    @torch.no_grad()
    def _decay(self, lookup: Lookup) -> None:
        last = self._last.index_select(0, self._numbers.of_lookup(lookup))  # [N]
        slept = torch.where(last > 0, self._now() - last, 0)
        feature = lookup.spread(self._features)  # [N]
        decay = (self._alphas[feature] * slept).clamp(max=1.0)
        self._units.shrink(lookup.rows, feature, 1 - self._mask.zeroed(decay))


def _check_sharded(table: TablePlan) -> None:
    """Raises ``UserError`` for a decay that only the shard's owner could make."""
    if table.data_parallel and table.optimizer.interval_decay:
        raise UserError(
            f"table '{table.name}' is data_parallel and has interval_decay={table.optimizer.interval_decay}: no rank sees all "
            f"ids of a batch there; choose another type in sharding.by_table.{table.name}, or set interval_decay to 0"
        )


def _place(shard: ShardedEmbeddingTable) -> tuple[int, int]:
    """Where a shard begins; a data-parallel table is whole."""
    row, column = shard.local_metadata.shard_offsets if shard.local_metadata is not None else (0, 0)
    return row, column
