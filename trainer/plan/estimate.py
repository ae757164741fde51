"""A configuration and a cluster -> where each table would lie, what each rank would hold, and the step's estimated parts.

The plan is ``sharding.find_plan``'s, the one a run makes; a cluster whose memory does not suffice is planned as if it had
more, to show what is missing. Letters: B rows of a rank's batch.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torchrec.distributed.planner.types import ShardingOption, Topology

from trainer.config.job import TrainConfig
from trainer.config.sharding import ShardingConfig
from trainer.models.construct import build_model
from trainer.modules.execution import Execution, bfloat16, float32
from trainer.modules.task import ClickTask
from trainer.plan.dense import DensePart
from trainer.plan.step import step_times
from trainer.run import build
from trainer.sharding import planner
from trainer.sharding.hardware import GIB, Cluster
from trainer.sharding.table_plan import EmbeddingTable, embedding_tables

UNBOUNDED = 1 << 50  # bytes: more than any cluster has
HELD = ("tables", "optimizer_state", "buffers", "activations", "dense")


@dataclass(frozen=True)
class Estimate:
    """``memory``: of each rank, bytes by ``HELD``; ``usable``: bytes the plan may fill, of ``capacity``. ``step``:
    milliseconds by part. ``tables``: one row each. ``short``: why it does not fit, or empty."""

    cluster: Cluster
    batch_size: int
    memory: list[dict[str, int]]
    usable: int
    capacity: int
    step: dict[str, float]
    tables: list[dict[str, Any]]
    short: str

    @property
    def fits(self) -> bool:
        return not self.short

    @property
    def step_ms(self) -> float:
        return sum(self.step.values())

    @property
    def fullest(self) -> int:
        return max(sum(rank.values()) for rank in self.memory)


@dataclass(frozen=True)
class Planned:
    """A job that is only planned: its model on meta, and the cost of its dense part, made once."""

    config: TrainConfig
    task: ClickTask
    lengths: dict[str, float]  # mean ids of a feature
    dense: DensePart
    tables: dict[str, EmbeddingTable]

    @classmethod
    def of(cls, config: TrainConfig, cluster: Cluster) -> "Planned":
        model = build_model(config.model, config.data.schema, config.seed)
        task = build.build_task(model, may_drop=False, loss=config.loss)
        lengths = planner.ids_per_row(config.data.schema)
        dense = DensePart(config, lengths, _execution(config, cluster))
        tables = {table.name: table for table in embedding_tables(task, config.optim)}
        return cls(config, task, lengths, dense, tables)

    def with_sharding(self, sharding: ShardingConfig) -> "Planned":
        return replace(self, config=replace(self.config, sharding=sharding))

    @property
    def dense_bytes(self) -> int:
        return planner.dense_bytes(self.task, self.tables.values())

    def local_batch_size(self, ranks: int) -> int:
        """Rows of a rank's batch, as the loader has it where the ranks may share the stream's shards, else rounded up."""
        shards = self.config.data.stream.shards
        if ranks > shards:
            return -(-self.config.batch_size // ranks)
        return -(-shards // ranks) * (self.config.batch_size // shards)

    def find(self, cluster: Cluster, thorough: bool = True) -> planner.FoundPlan:
        return planner.find_plan(
            self.task, list(self.tables.values()), self.config.sharding, cluster.hardware,
            batch_size=self.local_batch_size(cluster.ranks), device=torch.device(cluster.hardware.device),
            world_size=cluster.ranks, local_world_size=cluster.local, ids_per_row=self.lengths,
            thorough=thorough,
        )  # fmt: skip

    def needed(self) -> int:
        """Bytes of all tables and what their optimizers keep, each once."""
        return sum(table.all_bytes(table.rows, table.dim) for table in self.tables.values())

    def estimate(self, cluster: Cluster, thorough: bool = True) -> Estimate:
        """``thorough``: by the whole search of a run (see ``find_plan``). Raises ``UserError`` for what no memory would
        mend."""
        short = ""
        try:
            found = self.find(cluster, thorough)
        except planner.TablesDoNotFit as error:
            short = str(error)
            found = self._without_limit(cluster)
        batch_size = self.local_batch_size(cluster.ranks)
        memory = self._memory(found, cluster, batch_size)
        capacity = int(self._capacity(cluster))
        fullest = max(range(cluster.ranks), key=lambda rank: sum(memory[rank].values()))
        if not short and (held := sum(memory[fullest].values())) > capacity:
            short = (
                f"rank {fullest} would hold {held / GIB:.3g} GiB with activations of {batch_size:,} rows, a device has "
                f"{capacity / GIB:.3g}: use a smaller batch_size, or more ranks"
            )
        dense = self.dense.cost(batch_size)
        parameters = self.dense_bytes // planner.DENSE_COPIES
        step = step_times(found.chosen, cluster, dense.operations, parameters)
        usable = int(planner.usable_memory(self.config.sharding, cluster.hardware))
        tables = self._rows(found, usable - self.dense_bytes)
        return Estimate(cluster, batch_size, memory, usable, capacity, step, tables, short)

    def _without_limit(self, cluster: Cluster) -> planner.FoundPlan:
        unlimited = replace(self.config.sharding, hbm_gb=None, ddr_gb=None)
        vast = replace(cluster.hardware, memory=UNBOUNDED, host_memory=UNBOUNDED)
        return self.with_sharding(unlimited).find(replace(cluster, hardware=vast), thorough=False)

    def _capacity(self, cluster: Cluster) -> float:
        """What is there; as much as configured where more is promised than the table of devices knows."""
        return max(cluster.hardware.memory, planner.usable_memory(self.config.sharding, cluster.hardware))

    def _memory(self, found: planner.FoundPlan, cluster: Cluster, batch_size: int) -> list[dict[str, int]]:
        held = [dict.fromkeys(HELD, 0) for _ in range(cluster.ranks)]
        gpu = cluster.hardware.device == "cuda"
        for option in found.chosen:
            for shard in option.shards:
                table = self.tables[option.name]
                weights, state = table.weight_bytes(*shard.size), table.state_bytes(*shard.size)
                total = shard.storage.hbm if gpu else shard.storage.ddr
                rank = held[shard.rank]
                rank["tables"] += weights
                rank["optimizer_state"] += state
                rank["buffers"] += max(0, int(total) - weights - state)
        activations = int(self.dense.cost(batch_size).activations)
        for rank in held:
            rank |= {"activations": activations, "dense": self.dense_bytes}
        return held

    def _rows(self, found: planner.FoundPlan, room: int) -> list[dict[str, Any]]:
        """The tables, the largest first: the rows of ``plan.json``, and why."""
        open_to = defaultdict(list)
        for option in found.open:
            open_to[option.name].append(option)
        chosen = {option.name: option for option in found.chosen}
        rows = [table.summary() for table in found.plan.tables]
        for row in rows:
            row["size"] = sum(row["bytes"].values())
            row["step_ms"] = _slowest(chosen[row["table"]])
            row["why"] = self._why(chosen[row["table"]], open_to[row["table"]], found.topology, room)
        return sorted(rows, key=lambda row: -row["size"])

    def _why(self, chosen: ShardingOption, options: list[ShardingOption], topology: Topology, room: int) -> str:
        config = self.config.sharding
        if chosen.name in config.by_table:
            return f"set by sharding.by_table.{chosen.name}"
        if len({option.sharding_type for option in options}) == 1:
            return "the only one of sharding.types that is possible" if config.types else _only(topology)
        times = {option.sharding_type: _slowest(option) for option in options}
        sizes = {option.sharding_type: max(_bytes(shard) for shard in option.shards) for option in options}
        others = [name for name in times if name != chosen.sharding_type]
        large = [name for name in others if sizes[name] > room]
        costs = [f"{name}: {sizes[name] / GIB:.3g} GiB on one rank" for name in large]
        costs += [f"{name}: {times[name]:.3g} ms" for name in others if name not in large]
        mine = times[chosen.sharding_type]
        best = all(mine <= times[name] for name in others if name not in large)
        reason = f"{mine:.3g} ms on its slowest rank" if best else f"balances the ranks ({mine:.3g} ms)"
        return f"{reason}; {', '.join(costs)}"


def _only(topology: Topology) -> str:
    if topology.world_size == 1:
        return "one rank"
    return "small for a CPU" if topology.compute_device == "cpu" else "the only possible type"


def _slowest(option: ShardingOption) -> float:
    return max(shard.perf.total for shard in option.shards)


def _bytes(holder: Any) -> int:
    return holder.storage.hbm or holder.storage.ddr


def _execution(config: TrainConfig, cluster: Cluster) -> Execution:
    """As ``build.autocast_dtype`` chooses, for a device that is not here."""
    in_bf16 = config.precision == "bf16" or (config.precision == "auto" and cluster.hardware.bf16)
    return Execution(bfloat16 if in_bf16 else float32)
