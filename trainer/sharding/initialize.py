"""Initial values of tables: a function of seed, table, row and column alone, whatever the plan."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from trainer.modules.embeddings import InitialValues
from trainer.sharding.table_plan import TablePlan

INITIAL_CHUNK = 1 << 16  # values drawn from one seed


def initialize_tables(
    model: nn.Module, tables: Sequence[TablePlan], seed: int, initial: Mapping[str, InitialValues], *, epoch: int = 0
) -> None:
    """Fills all tables of a sharded model with their ``initial`` values, others in each ``epoch``.

    A value depends on (seed, table, row, column, D) and the kind of device alone, neither on the plan nor on the number
    of ranks: rows are drawn in chunks, each from its own seed, and a shard keeps its part.
    """
    state = model.state_dict()
    for table in tables:
        for values, row, column in local_shards(state[table.parameter]):
            origin = f"{seed}/{table.name}" if epoch == 0 else f"{seed}/epoch {epoch}/{table.name}"
            _fill(values, row, column, table.dim, origin, initial[table.name])


def local_shards(weight: Tensor | ShardedTensor) -> list[tuple[Tensor, int, int]]:
    """(values, first row, first column) of each part of a table on this rank; the values are the table's memory."""
    if isinstance(weight, ShardedTensor):
        return [(shard.tensor.detach(), *shard.metadata.shard_offsets) for shard in weight.local_shards()]
    return [(weight.detach(), 0, 0)]


def _fill(values: Tensor, row: int, column: int, dim: int, origin: str, initial: InitialValues) -> None:
    if initial.std == 0:
        values.zero_()
        return
    height = max(1, INITIAL_CHUNK // dim)  # rows of a chunk
    generator = torch.Generator(device=values.device)
    end = row + values.shape[0]
    for chunk in range(row // height, -(-end // height)):
        digest = hashlib.blake2b(f"{origin}/{chunk}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        # Always whole chunks, so that a value does not depend on where the shard or the table ends.
        drawn = initial.fill(torch.empty(height, dim, device=values.device), generator)
        first, last = max(row, chunk * height), min(end, (chunk + 1) * height)
        part = drawn[first - chunk * height : last - chunk * height, column : column + values.shape[1]]
        values[first - row : last - row].copy_(part)
