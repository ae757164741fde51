"""The smallest cluster of one kind of device that a job fits into."""

import torch

from data_loaders.errors import UserError
from trainer.plan.estimate import Planned
from trainer.sharding.hardware import GIB, MAX_RANKS, Cluster, cluster
from trainer.sharding.planner import allowed_types, column_width, usable_memory
from trainer.sharding.table_plan import EmbeddingTable

WHOLE = ("table_wise", "data_parallel")
MOST = 1024  # ranks tried


def smallest_cluster(job: Planned, like: Cluster) -> Cluster:
    """Machines as in ``like``, or a part of one (on machines of one GPU, more of those). The batch of all ranks together
    stays. Raises ``UserError`` for a table that no number of ranks can hold, or where ``MOST`` ranks are too few."""
    check_holdable(job, like)
    sizes = cluster_sizes(like)
    room = usable_memory(job.config.sharding, like.hardware) - job.dense_bytes
    first = next((n for n, size in enumerate(sizes) if size.ranks * room >= job.needed()), len(sizes) - 1)
    if _fits(job, sizes[first]):
        return sizes[first]
    low, high = first, min(2 * first + 1, len(sizes) - 1)  # low is too small
    while not _fits(job, sizes[high]):
        if high == len(sizes) - 1:
            raise UserError(
                f"{sizes[-1]} do not hold {job.needed() / GIB:,.4g} GiB of tables and optimizer state: use devices with more "
                "memory, smaller tables, or table optimizers with less state (rowwise_adagrad, sgd)"
            )
        low, high = high, min(2 * high + 1, len(sizes) - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(job, sizes[middle]) else (middle, high)
    return sizes[high]


def cluster_sizes(like: Cluster) -> list[Cluster]:
    """Parts of one machine, then whole ones."""
    parts = [cluster(like.hardware, 1, ranks) for ranks in range(1, like.local)]
    most = max(1, min(MOST, MAX_RANKS) // like.local)
    return parts + [cluster(like.hardware, machines, like.local) for machines in range(1, most + 1)]


def check_holdable(job: Planned, like: Cluster) -> None:
    """Raises ``UserError`` for a table whose smallest possible part is larger than a device."""
    room = usable_memory(job.config.sharding, like.hardware) - job.dense_bytes
    for table in job.tables.values():
        types = _types(job, table, like)
        if not set(types) <= {*WHOLE, "column_wise"}:
            continue
        width = column_width(table.dim, like.ranks) if "column_wise" in types else table.dim
        size = table.all_bytes(table.rows, width)
        if size > room:
            raise UserError(
                f"table '{table.name}' fits nowhere: {', '.join(types)} puts {size / GIB:,.4g} GiB of it on one rank, "
                f"{like.hardware.name} has room for {max(0.0, room) / GIB:,.4g}, however many there are: allow row_wise "
                f"(sharding.by_table.{table.name}=row_wise, or sharding.types=[])"
            )


def _types(job: Planned, table: EmbeddingTable, like: Cluster) -> list[str]:
    device, ranks = torch.device(like.hardware.device), max(2, like.ranks)
    return allowed_types(table, job.config.sharding, device, ranks, min(like.local, ranks))


def _fits(job: Planned, candidate: Cluster) -> bool:
    try:
        return job.estimate(candidate, thorough=False).fits
    except UserError:  # a sharding type that was asked for and needs more ranks, or fewer
        return False
