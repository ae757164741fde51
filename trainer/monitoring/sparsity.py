"""How sparse a linear part is: the share of its weights that are not 0, which is what FTRL's L1 is for (McMahan et al., 2013,
"Ad Click Prediction: a View from the Trenches", section 3)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from trainer.modules.embeddings import WIDE_WEIGHT_SLOT
from trainer.runtime.distributed import Ranks, all_reduce_sum
from trainer.runtime.read_back import to_host
from trainer.sharding.table_plan import TablePlan

SQUARES_SLOT = 2  # of a row [w, z, n, g]: n is above 0 once FTRL has trained the row


@torch.no_grad()
def wide_weights(model: nn.Module, tables: Sequence[TablePlan], ranks: Ranks) -> dict[str, Any] | None:
    """``rows`` of all wide tables, how many are ``nonzero``, their ``share``, and that ``by_table``; with FTRL also
    ``trained`` rows and the ``share_of_trained``. None for a model without a linear part. All ranks together: each counts
    its shards where they lie, and one small tensor is summed."""
    tables = [table for table in tables if table.wide]
    if not tables:
        return None
    state = model.state_dict()
    counts = torch.zeros(len(tables), 2, dtype=torch.int64, device=ranks.device)
    for place, table in enumerate(tables):
        for rows in _own_rows(state[table.parameter], ranks):
            counts[place, 0] += rows[:, WIDE_WEIGHT_SLOT].count_nonzero()
            counts[place, 1] += rows[:, SQUARES_SLOT].count_nonzero()
    found = to_host(all_reduce_sum(counts)).tolist()
    total, nonzero, trained = sum(table.rows for table in tables), sum(n for n, _ in found), sum(n for _, n in found)
    by_table = {table.name: n / table.rows for table, (n, _) in zip(tables, found, strict=True)}
    values = {"rows": total, "nonzero": nonzero, "share": nonzero / total, "by_table": by_table}
    return values | ({"trained": trained, "share_of_trained": nonzero / trained} if trained else {})


def _own_rows(weight: Tensor | ShardedTensor, ranks: Ranks) -> list[Tensor]:
    """The rows of a wide table [R, 4] that this rank counts: its shards, or all on rank 0 of a table that every rank has."""
    if isinstance(weight, ShardedTensor):
        return [shard.tensor for shard in weight.local_shards()]
    return [weight] if ranks.is_first else []
