"""The plan of where tables live, and its memory.

TorchRec's planner chooses a sharding type for each table among those that the configuration, the device, the kind of
lookup and the table's optimizer allow, by estimated time, under the memory of the devices. Letters: B rows of a rank's
batch, D embedding_dim.

What ``auto`` (an empty ``sharding.types``) chooses from:

* ``table_wise`` and ``row_wise``, whose results do not depend on the plan. On one rank only the former, and on a CPU for
  tables below 256 MB: a pooled row-wise table adds a collective to forward and backward, which gloo feels.
* ``table_row_wise`` on several machines (rows over the ranks of one of them).
* ``column_wise`` for tables of two parts of at least 128 columns, unless the optimizer is row-wise AdaGrad, whose
  update (a mean over the columns of a part) and checkpoint would then depend on the cut.
* never ``data_parallel`` (the table leaves the in-backward optimizers) or ``grid_shard``: only where named.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption

from data_loaders.errors import UserError
from data_loaders.schema import Schema, one_of
from trainer.config.optim import OptimConfig
from trainer.config.sharding import SHARDING_TYPES, ShardingConfig
from trainer.runtime import cpu
from trainer.runtime.distributed import from_first
from trainer.sharding.hardware import Hardware, recognised
from trainer.sharding.table_plan import EmbeddingTable, Plan, embedding_tables, make_records
from trainer.sharding.torchrec_internals import Enumerator, chosen_options, sharders

GB = 2**30
MIN_AUTO_COLUMNS = 128  # a narrower part of a row costs a lookup as much as a whole one
MIN_AUTO_ROW_WISE = 1 << 28  # bytes; for less, gloo's second collective each way costs more than the balance gains
MEMORY_SHARE = 0.85  # of what is measured; the rest is for activations, the allocator and the program itself
DENSE_COPIES = 6  # parameter, gradient, two moments, the all-reduce bucket, activations' share

# What gloo and NVLink-less hosts do, in bytes per millisecond as the planner counts: measured between two local gloo
# ranks (all_to_all_single of 17 MB in 6 ms), and FBGEMM's gathers on one core. NCCL keeps TorchRec's figures.
GLOO_LOCAL, GLOO_REMOTE, CPU_GATHER = 3.0 * GB / 1e3, 1.2 * GB / 1e3, 10.0 * GB / 1e3
CPU_MATMUL, CPU_MATMUL_BF16 = 1e11, 3e11  # operations a second of a core; DeepFM's MLP, forward and backward


# The plan.


def make_plan(
    model: nn.Module,
    config: ShardingConfig,
    optim: OptimConfig,
    *,
    batch_size: int,
    device: torch.device,
    world_size: int,
    local_world_size: int,
    ids_per_row: Mapping[str, float] | None = None,
) -> Plan:
    """The plan for a model whose tables are unsharded (on meta), the same on every rank: rank 0 plans.

    ``batch_size`` is a rank's; ``ids_per_row`` the mean number of ids of a feature (1 where not given). Without a
    process group of ``world_size`` ranks it is a plan for a cluster that is not there.

    Raises ``UserError`` on every rank: a table without a possible sharding type, an optimizer that cannot work, tables
    that do not fit into memory (needed against available, table by table).
    """

    def search() -> Plan:
        found = find_plan(
            model,
            embedding_tables(model, optim),
            config,
            measured(device, local_world_size),
            batch_size=batch_size,
            device=device,
            world_size=world_size,
            local_world_size=local_world_size,
            ids_per_row=ids_per_row,
        )
        return found.plan

    # Not the planner's own collective_plan: an error of rank 0 would leave the others waiting.
    collective = dist.is_initialized() and dist.get_world_size() == world_size
    return from_first(search) if collective else search()


class TablesDoNotFit(UserError):
    """The tables need more memory than there is."""


@dataclass(frozen=True)
class FoundPlan:
    """What a search ends with: the plan; the option it takes for each table and all that were open to it, with the memory
    and times that TorchRec estimates of their shards; the devices."""

    plan: Plan
    chosen: list[ShardingOption]
    open: list[ShardingOption]
    topology: Topology


def find_plan(
    model: nn.Module,
    tables: Sequence[EmbeddingTable],
    config: ShardingConfig,
    hardware: Hardware,
    *,
    batch_size: int,
    device: torch.device,
    world_size: int,
    local_world_size: int,
    ids_per_row: Mapping[str, float] | None = None,
    thorough: bool = True,
) -> FoundPlan:
    """``make_plan`` in one process, for devices that need not be here. Not ``thorough``: a part of the same search, in a
    second where up to 10,000 combinations take a minute; what it finds, the whole one finds or better."""
    for name in config.by_table:
        one_of(name, [table.name for table in tables], "sharding.by_table")
    constraints = {
        table.name: _constraints(table, config, device, world_size, local_world_size, ids_per_row or {})
        for table in tables
    }
    topology = _topology(dense_bytes(model, tables), config, hardware, world_size, local_world_size)
    return _search(model, tables, constraints, topology, batch_size, thorough)


def ids_per_row(schema: Schema) -> dict[str, float]:
    """The number of ids of each feature as the planner takes it: of lists, the most that a row may have."""
    return {name: float(feature.max_length or 1) for name, feature in schema.features.items() if feature.table}


def allowed_types(
    table: EmbeddingTable, config: ShardingConfig, device: torch.device, world_size: int, local_world_size: int
) -> list[str]:
    """The sharding types the planner may choose from for a table. Raises ``UserError`` when none is left: the table,
    what was asked for, and why each of that is impossible."""
    obstacles = _obstacles(table, device, world_size, local_world_size)
    possible = [name for name in SHARDING_TYPES if name not in obstacles]
    asked = [config.by_table[table.name]] if table.name in config.by_table else list(dict.fromkeys(config.types))
    if not asked:
        automatic = _automatic_types(table, device, world_size, local_world_size)
        return [name for name in possible if name in automatic]
    chosen = [name for name in asked if name in possible]
    if not chosen:
        where = f"sharding.by_table.{table.name}" if table.name in config.by_table else "sharding.types"
        reasons = "; ".join(f"{name}: {obstacles[name]}" for name in asked)
        raise UserError(
            f"{where} asks for {', '.join(asked)} for table '{table.name}' ({table.rows:,} x {table.dim}, optimizer "
            f"{table.optimizer.name}), which cannot be ({reasons}); possible: {', '.join(possible)}"
        )
    return chosen


# Constraints.


def _constraints(
    table: EmbeddingTable,
    config: ShardingConfig,
    device: torch.device,
    world_size: int,
    local_world_size: int,
    ids_per_row: Mapping[str, float],
) -> ParameterConstraints:
    types = allowed_types(table, config, device, world_size, local_world_size)
    return ParameterConstraints(
        sharding_types=types,
        # No unified memory: kernels that keep a table partly on the host are another trade, made by nobody here.
        compute_kernels=[EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value],
        min_partition=column_width(table.dim, world_size),
        pooling_factors=[float(ids_per_row.get(feature, 1.0)) for feature in table.features],
    )


def _obstacles(table: EmbeddingTable, device: torch.device, world_size: int, local_world_size: int) -> dict[str, str]:
    """Why a table cannot have a sharding type: ``{type: reason}``."""
    found: dict[str, str] = {}
    if not table.pooled:
        offered = EmbeddingCollectionSharder().sharding_types(device.type)
        found |= {name: "TorchRec has it for pooled tables only" for name in SHARDING_TYPES if name not in offered}
        if device.type == "cpu":
            found["data_parallel"] = "TorchRec sums the ids of an EmbeddingCollection there on a CPU"
    if table.pooled and device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        for name in ("table_row_wise", "grid_shard"):
            found[name] = "deterministic=true: TorchRec sends the ids of a bag there in no fixed order"
    if table.mean:
        found["grid_shard"] = "TorchRec adds up the means of its parts"
    if column_width(table.dim, world_size) == table.dim and world_size > 1:
        for name in ("column_wise", "grid_shard"):
            found.setdefault(name, f"{table.dim} columns have no parts that are multiples of 4")
    if world_size % local_world_size:
        for name in ("table_row_wise", "grid_shard"):
            found.setdefault(name, f"{world_size} ranks are not a multiple of {local_world_size} a machine")
    parts = {"row_wise": world_size, "table_row_wise": local_world_size, "grid_shard": local_world_size}
    for name, ranks in parts.items():
        held = -(-table.rows // ranks)  # rows of each rank but the last ones
        if -(-table.rows // held) < ranks:
            found.setdefault(name, f"{ranks} ranks are too many for {table.rows} rows: FBGEMM fails on none")
    if table.dtype != torch.float32:
        found.setdefault("data_parallel", "an ordinary optimizer would lose small steps in rows of fp16")
    if table.optimizer.name == "ftrl":
        for name in SHARDING_TYPES:
            if name not in ("table_wise", "row_wise"):
                found.setdefault(name, "FTRL keeps its state in whole rows of one owner")
    return found


def _automatic_types(table: EmbeddingTable, device: torch.device, world_size: int, local_world_size: int) -> list[str]:
    if world_size == 1 or (device.type == "cpu" and table.dtype.itemsize * table.rows * table.dim < MIN_AUTO_ROW_WISE):
        return ["table_wise"]
    types = ["table_wise", "row_wise"]
    if 1 < local_world_size < world_size:
        types.append("table_row_wise")
    whole_rows = table.optimizer.name == "rowwise_adagrad"
    if not whole_rows and column_width(table.dim, world_size) < table.dim >= 2 * MIN_AUTO_COLUMNS:
        types.append("column_wise")
    return types


def column_width(dim: int, world_size: int) -> int:
    """Columns of one part when ``dim`` is cut: multiples of 4, no more parts than ranks if that can be, of at least 128
    columns if that can be, or else 32; ``dim`` itself if it cannot be cut. Reading a part costs what reading 128 bytes
    does, and row-wise state is kept by part."""
    widths = [width for width in range(4, dim, 4) if dim % width == 0]
    wide = next((found for least in (MIN_AUTO_COLUMNS, 32) if (found := [w for w in widths if w >= least])), widths)
    few = [width for width in wide if dim // width <= world_size]
    return min(few) if few else max(wide, default=dim)


# The search.


def _search(
    model: nn.Module,
    tables: Sequence[EmbeddingTable],
    constraints: dict[str, ParameterConstraints],
    topology: Topology,
    batch_size: int,
    thorough: bool,
) -> FoundPlan:
    enumerator = Enumerator(topology, batch_size, constraints, tables)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=enumerator,
        storage_reservation=FixedPercentageStorageReservation(0.0),  # already taken off in _topology
        proposer=None if thorough else [GreedyProposer(), GreedyProposer(use_depth=False), UniformProposer()],
        constraints=constraints,
        debug=False,
        stats=[],
    )
    try:
        plan = planner.plan(model, sharders())
    except PlannerError as error:
        raise TablesDoNotFit(_memory_report(tables, topology, batch_size)) from error
    return FoundPlan(Plan(plan, make_records(tables, plan)), chosen_options(planner), enumerator.open, topology)


def dense_bytes(model: nn.Module, tables: Iterable[EmbeddingTable]) -> int:
    """What is set aside for the parameters that are not tables: ``DENSE_COPIES`` of them."""
    rows = {table.parameter for table in tables}
    return DENSE_COPIES * sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in rows)


def usable_memory(config: ShardingConfig, hardware: Hardware) -> float:
    """Bytes of a rank that the plan may fill: as configured, or a share of what is there."""
    given = config.hbm_gb if hardware.device == "cuda" else config.ddr_gb
    if not given and not hardware.memory:
        raise UserError("no GPU here to measure: set sharding.hbm_gb to the memory of one device, in GB")
    return given * GB if given else MEMORY_SHARE * hardware.memory


def measured(device: torch.device, local_world_size: int) -> Hardware:
    """What a rank of this machine has, as far as this process can see; a GPU's links are those of its kind."""
    host = psutil.virtual_memory().available / local_world_size
    if device.type != "cuda":
        bandwidths = 1e3 * CPU_GATHER, 1e3 * GLOO_LOCAL, 1e3 * GLOO_REMOTE
        bf16 = cpu.multiplies_bf16()
        return Hardware("CPU", "cpu", host, host, *bandwidths, CPU_MATMUL_BF16 if bf16 else CPU_MATMUL, bf16)
    if not torch.cuda.is_available():
        return Hardware("GPU", "cuda", 0, host)
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    known = recognised(name, total)
    links = (known.within, known.between) if known else (None, None)
    bandwidth = _gpu_bandwidth(device)
    return Hardware(name, "cuda", free, host, bandwidth * 1e3 if bandwidth else None, *links)


def _topology(
    dense: int, config: ShardingConfig, hardware: Hardware, world_size: int, local_world_size: int
) -> Topology:
    """Devices as they are: memory as configured or there, less what the ``dense`` part takes."""
    gpu = hardware.device == "cuda"
    memory = usable_memory(config, hardware)
    cap = int(memory - dense)
    if cap <= 0:
        raise UserError(
            f"the dense part takes {dense / GB:.2f} GB, a rank has {memory / GB:.2f} GB "
            f"(sharding.{'hbm_gb' if gpu else 'ddr_gb'}): use a smaller model or devices with more memory"
        )
    host = config.ddr_gb * GB if config.ddr_gb else MEMORY_SHARE * hardware.host_memory
    arguments: dict[str, Any] = {"hbm_cap": cap, "ddr_cap": int(host)} if gpu else {"ddr_cap": cap}
    rates = {
        "hbm_mem_bw" if gpu else "ddr_mem_bw": hardware.memory_bandwidth,
        "intra_host_bw": hardware.within,
        "inter_host_bw": hardware.between,
    }
    arguments |= {name: rate / 1e3 for name, rate in rates.items() if rate}  # TorchRec counts bytes a millisecond
    logger = logging.getLogger("torchrec.distributed.planner.types")
    level = logger.level
    logger.setLevel(logging.ERROR)  # newer TorchRecs warn of this constructor, the only one that older ones have
    try:
        return Topology(world_size, hardware.device, local_world_size=local_world_size, **arguments)
    finally:
        logger.setLevel(level)


def _gpu_bandwidth(device: torch.device) -> float | None:
    """Bytes per millisecond of the device's memory, from its clock and bus; None where PyTorch does not report them."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    kilohertz, bits = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    return 2.0 * kilohertz * bits / 8 or None  # two transfers a clock; kHz x bytes are bytes per ms


def _memory_report(tables: Sequence[EmbeddingTable], topology: Topology, batch_size: int) -> str:
    needed = {table.name: table.all_bytes(table.rows, table.dim) / GB for table in tables}
    largest = sorted(needed.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {size:.3g} GB" for name, size in largest[:10])
    gpu = topology.compute_device == "cuda"
    memory = (topology.devices[0].storage.hbm if gpu else topology.devices[0].storage.ddr) / GB
    return (
        f"the tables do not fit: weights and optimizer state need {sum(needed.values()):.3g} GB ({shown}"
        f"{', …' if len(needed) > 10 else ''}), besides buffers for batches of {batch_size} rows a rank; available are "
        f"{memory:.3g} GB on each of {topology.world_size} rank(s). Use more ranks, smaller tables, table optimizers "
        "with less state (rowwise_adagrad, sgd), allow row_wise in sharding.types, or set "
        f"sharding.{'hbm_gb' if gpu else 'ddr_gb'} if more memory is there than was measured"
    )
