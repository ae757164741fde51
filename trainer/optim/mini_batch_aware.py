"""Mini-batch aware regularisation of embedding tables (Zhou et al., 2018, "Deep Interest Network for Click-Through Rate
Prediction", section 5.1, equations 4 to 7): of a table only the rows whose ids occur in a global batch are decayed, by

    w_j -= lr (gradient + λ / n_j w_j)

where n_j is how often id j occurs in all training data, so that λ is what a row is decayed by in an epoch in which each of
its occurrences has a batch of its own, however frequent the id is.

When: in backward, before a kernel updates its rows (``trainer.optim.touched_rows``). A row is decayed once a step, however
often its id occurs. With sgd this is equation 7 to the letter. Other optimizers adapt to the gradient alone: the decay is
decoupled, as in AdamW (Loshchilov and Hutter, 2019), and goes by their learning rate.

``weight_decay`` (with ``weight_decay_rows: touched``) is the same with n_j = 1: w_j -= lr weight_decay w_j, beside the
optimizer's own step, on a CPU and a GPU alike. (FBGEMM's weight decay is not used: its CPU kernels ignore it, sgd and adagrad
have none, and row-wise AdaGrad's goes through s, adam's does not.)

n_j is exact: before the first step of a run all its rows are read once for their ids (``count``), whose numbers go to the
shards' owners. They are pieces of the checkpoint, ``counts/<table>``, so a resumed run does not count again, under
whatever plan. (Not ``tables/<table>/…``: they are facts of the data, which a warm start has others of.) An id that was not
counted, in files that came later, is taken to occur once.

Shapes: N ids of a kernel's call, U the most units a row has (``touched_rows.RowUnits``), n distinct ids of a round.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from data_loaders.batch import Batch
from data_loaders.errors import UserError
from trainer.checkpoint.piece import Piece, empty_piece
from trainer.optim.touched_rows import Lookup, RowUnits, TouchedRows
from trainer.runtime.step_mask import StepMask
from trainer.sharding.kernels import FusedKernel
from trainer.sharding.table_plan import TablePlan


class MiniBatchAware:
    """Decays the rows of the tables of a sharded model that have ``mini_batch_l2`` or ``weight_decay``. ``count`` comes
    before the first step of a run, or the counts of a checkpoint.

    Raises ``UserError`` for a data-parallel table."""

    def __init__(self, kernels: Iterable[FusedKernel], tables: Sequence[TablePlan], mask: StepMask) -> None:
        self.tables = [table for table in tables if table.optimizer.mini_batch_l2]
        for table in self.tables:
            _check_sharded(table)
        optimizers = {table.name: table.optimizer for table in tables}
        l2 = {name: config.mini_batch_l2 for name, config in optimizers.items()}
        weight_decay = {
            name: config.weight_decay if config.weight_decay_rows == "touched" else 0.0
            for name, config in optimizers.items()
        }
        self._kernels = [
            _Kernel(TouchedRows(kernel), l2, weight_decay, mask)
            for kernel in kernels
            if any(l2[shard.name] or weight_decay[shard.name] for shard in kernel.shards)
        ]
        # The rows of all tables, one after the other, are one space of ids.
        begins = accumulate((table.rows for table in self.tables), initial=0)
        self._begins = dict(zip((table.name for table in self.tables), begins))
        self._owned = _owned(self.tables, self._begins)

    def count(self, batches: Iterable[Batch], *, batches_per_round: int) -> None:
        """Sets the counts to how often ids occur in ``batches``, all ranks' together: each has equally many of them.
        ``batches_per_round``: after so many batches the ranks exchange their ids, which must fit into memory."""
        for kernel in self._kernels:
            kernel.counts.zero_()
        pending: list[Tensor] = []
        for number, batch in enumerate(batches, start=1):
            pending += self._ids(batch)
            if number % batches_per_round == 0:
                self._share(pending)
                pending = []
        self._share(pending)

    def pieces(self) -> list[Piece]:
        """``counts/<table>`` int64 [rows, 1]. What several parts of a row keep, the first one's owner writes."""
        found: list[Piece] = []
        shards = [shard for kernel in self._kernels for shard in kernel.shards]
        for table in self.tables:
            name, shape = f"counts/{table.name}", (table.rows, 1)
            mine = [shard for shard in shards if shard.table == table.name]
            for shard in mine:
                counts = shard.counts.unsqueeze(1)
                found.append(Piece(name, shape, (shard.row, 0), counts, written=shard.column == 0))
            if not mine:
                found.append(empty_piece(name, shape, torch.int64))
        return found

    def _ids(self, batch: Batch) -> list[Tensor]:
        found = []
        for table in self.tables:
            pooled = batch.weighted if table.weighted else batch.sparse
            jagged = pooled if table.pooled else batch.sequence
            found += [jagged[key].values().long() + self._begins[table.name] for key in table.features]
        return found

    def _share(self, ids: Sequence[Tensor]) -> None:
        """Adds up what all ranks found since the last round, where the rows are."""
        distinct, counts = torch.cat([torch.empty(0, dtype=torch.int64), *ids]).unique(return_counts=True)
        found = torch.stack((distinct, counts), dim=1)  # [n, 2], ascending
        sends = []
        for ranges in self._owned:
            places = torch.searchsorted(distinct, torch.tensor(ranges, dtype=torch.int64).view(-1)).view(-1, 2)
            sends.append(torch.cat([found[:0], *(found[start:end] for start, end in places.tolist())]))
        received, occurrences = _exchange(sends).unbind(1)
        for kernel in self._kernels:
            for shard in kernel.shards:
                row = received - self._begins[shard.table] - shard.row
                inside = (row >= 0) & (row < len(shard.counts))
                device = shard.counts.device
                shard.counts.index_add_(0, row[inside].to(device), occurrences[inside].to(device))


@dataclass(frozen=True)
class _Shard:
    """A part of ``table`` that begins at ``row`` and ``column``, and how often the ids of its rows occur: ``counts``
    [rows of the shard]."""

    table: str
    row: int
    column: int
    counts: Tensor


class _Kernel:
    """A kernel with a table to decay, perhaps among others."""

    def __init__(
        self, touched: TouchedRows, l2: dict[str, float], weight_decay: dict[str, float], mask: StepMask
    ) -> None:
        self._mask = mask
        self._rows, shards, of_feature = touched, touched.shards, touched.of_feature
        device = touched.memory.device
        counted = [shard.local_rows if l2[shard.name] else 0 for shard in shards]
        ends = list(accumulate(counted))
        self.counts = torch.zeros(ends[-1], dtype=torch.int64, device=device)
        parts = self.counts.split(counted)
        self.shards = [
            _Shard(shard.name, row, column, part)
            for shard, part in zip(shards, parts, strict=True)
            if l2[shard.name]
            for row, column in [shard.local_metadata.shard_offsets]
        ]
        self._units = RowUnits(touched)
        self._features = torch.arange(len(touched.begins), device=device)
        self._l2 = of_feature([l2[shard.name] for shard in shards])
        self._weight_decay = of_feature([weight_decay[shard.name] for shard in shards])
        # An id of a table without counts stands for the first count, and its λ is 0.
        self._counted = of_feature([int(count > 0) for count in counted])
        self._first_counts = of_feature([end - count if count else 0 for end, count in zip(ends, counted)])
        touched.before_update(self._decay)

    @torch.no_grad()
    def _decay(self, lookup: Lookup) -> None:
        feature, ids = lookup.spread(self._features), lookup.rows  # [N]
        decay = self._weight_decay[feature]  # [N]
        if self.counts.numel():
            counts = self.counts.index_select(0, self._first_counts[feature] + ids * self._counted[feature])
            decay = decay + self._l2[feature] / counts.clamp(min=1)
        # The kernel's rate, a tensor on the host: nothing waits for a GPU. A masked step keeps all of a row.
        self._units.shrink(ids, feature, 1 - self._mask.zeroed(self._rows.kernel.learning_rate_tensor * decay))


def _check_sharded(table: TablePlan) -> None:
    if table.data_parallel:
        raise UserError(
            f"table '{table.name}' is data_parallel and has mini_batch_l2={table.optimizer.mini_batch_l2}: no rank sees all ids "
            f"of a batch there; choose another type in sharding.by_table.{table.name}, or set mini_batch_l2 to 0 (optim.by_table)"
        )


def _owned(tables: Sequence[TablePlan], begins: dict[str, int]) -> list[list[tuple[int, int]]]:
    """For each rank the ranges of ids whose rows it has a part of."""
    found: list[set[tuple[int, int]]] = [set() for _ in range(dist.get_world_size())]
    for table in tables:
        for part in table.parts:
            first = begins[table.name] + part.row
            found[part.rank].add((first, first + part.height))
    return [sorted(ranges) for ranges in found]


def _exchange(sends: Sequence[Tensor]) -> Tensor:
    """What all ranks send here: ``sends`` int64 [n, 2] for each rank -> [sum of n, 2], on the CPU."""
    sizes = torch.tensor([len(send) for send in sends])
    arriving = torch.empty_like(sizes)
    dist.all_to_all_single(arriving, sizes)
    received = torch.empty(int(arriving.sum()), 2, dtype=torch.int64)
    dist.all_to_all_single(received, torch.cat(list(sends)), arriving.tolist(), sizes.tolist())
    return received
