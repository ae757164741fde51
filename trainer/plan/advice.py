"""What would make a plan fit, smaller or faster: each remedy is planned itself, and reported where it helps."""

from dataclasses import replace
from typing import Any

from data_loaders.errors import UserError
from trainer.config.job import TrainConfig
from trainer.config.optim import OptimConfig
from trainer.config.sharding import SHARDING_TYPES
from trainer.modules.embeddings import is_wide_table
from trainer.plan.estimate import Estimate, Planned
from trainer.plan.smallest import smallest_cluster
from trainer.runtime import gpus
from trainer.sharding.hardware import GIB, Cluster
from trainer.sharding.table_plan import EmbeddingTable

LARGE = 0.05  # of all bytes, from where a table is worth a line
MANY = 3  # tables that another sharding type is tried for
MOST_RANKS = 16  # up to which that is tried; on many machines a search takes long
WORTH = 0.9  # of the step's time


def advice(job: Planned, estimate: Estimate, smallest: Cluster | None) -> list[str]:
    """One line each; ``smallest`` is None where no cluster fits."""
    return [
        *_no_code(estimate),
        *_half_tables(job, estimate, smallest),
        *_less_state(job, estimate, smallest),
        *_other_types(job, estimate),
        *_host_memory(estimate),
    ]


def _no_code(estimate: Estimate) -> list[str]:
    hardware = estimate.cluster.hardware
    problem = gpus.refusal(hardware.name, hardware.capability) if hardware.capability else None
    return [f"nothing can be trained here: {problem}"] if problem else []


def _half_tables(job: Planned, estimate: Estimate, smallest: Cluster | None) -> list[str]:
    schema = job.config.data.schema
    names = [
        name
        for name, table in schema.tables.items()
        if table.dtype == "fp32" and name in job.tables and job.tables[name].optimizer.name != "adam"
    ]  # FBGEMM's Adam has no fp16
    saved = {name: job.tables[name].weight_bytes(job.tables[name].rows, job.tables[name].dim) // 2 for name in names}
    large = [name for name in names if 2 * saved[name] > LARGE * job.needed()]
    if not large:
        return []
    tables = schema.tables | {name: replace(schema.tables[name], dtype="fp16") for name in large}
    config = replace(job.config, data=replace(job.config.data, schema=replace(schema, tables=tables)))
    where = " ".join(f"data.schema.tables.{name}.dtype=fp16" for name in large)
    return _if_better(config, estimate, smallest, where, sum(saved[name] for name in large))


def _less_state(job: Planned, estimate: Estimate, smallest: Cluster | None) -> list[str]:
    """For tables whose optimizer keeps as much as the weights or more, section by section of the configuration."""
    optim, lines = job.config.optim, []
    sections = {"tables": optim.tables, "wide": optim.wide} | {
        f"by_table.{name}": one for name, one in optim.by_table.items()
    }
    for section, now in sections.items():
        owned = [table for name, table in job.tables.items() if _section(name, optim) == section]
        less = replace(now, name="rowwise_adagrad")
        saved = sum(_state_bytes(table) - _state_bytes(replace(table, optimizer=less)) for table in owned)
        if now.name not in ("adagrad", "adam") or saved < LARGE * job.needed():
            continue
        kind, _, name = section.partition(".")
        changed: dict[str, Any] = {kind: optim.by_table | {name: less} if name else less}
        config = replace(job.config, optim=replace(optim, **changed))
        lines += _if_better(config, estimate, smallest, f"optim.{section}.name=rowwise_adagrad", saved)
    return lines


def _state_bytes(table: EmbeddingTable) -> int:
    return table.state_bytes(table.rows, table.dim)


def _section(table: str, optim: OptimConfig) -> str:
    if table in optim.by_table:
        return f"by_table.{table}"
    return "wide" if is_wide_table(table) else "tables"


def _if_better(config: TrainConfig, estimate: Estimate, smallest: Cluster | None, where: str, saved: int) -> list[str]:
    """A line where it makes the plan fit, or a smaller cluster do."""
    try:
        other = Planned.of(config, estimate.cluster)
        least = smallest_cluster(other, estimate.cluster)
    except UserError:
        return []
    if not estimate.fits and other.estimate(estimate.cluster, thorough=False).fits:
        return [f"{where}: {saved / GIB:,.3g} GiB less in all; it then fits ({least} would do)"]
    if smallest is None or least.ranks < smallest.ranks:
        return [f"{where}: {saved / GIB:,.3g} GiB less in all; {least} would do"]
    return []


def _other_types(job: Planned, estimate: Estimate) -> list[str]:
    """Sharding types that the configuration, or what ``auto`` looks at, leaves out: table after table of the costliest gets
    the type that it costs least in. Ranks wait for the slowest of several tables that are alike, so that a change may
    help only together with later ones: reported are the first n changes, with the n of the shortest step."""
    if estimate.cluster.ranks > MOST_RANKS:
        return []
    cost = "step_ms" if estimate.fits else "size"
    changed: dict[str, str] = {}
    stages = [(changed, estimate)]
    for row in sorted(estimate.tables, key=lambda row: -row[cost])[:MANY]:
        name, now = row["table"], stages[-1][1]
        kind, found = min(
            [(row["sharding"], now), *_tried(job, now, changed, name)], key=lambda one: _cost(one[1], name)
        )
        if found is not now:
            changed = changed | {name: kind}
            stages.append((changed, found))
    changed, best = min(stages, key=lambda stage: _cost(stage[1]))
    added = {True: "", False: "+"}  # Hydra's, for a new key
    known = job.config.sharding.by_table
    where = " ".join(f"{added[name in known]}sharding.by_table.{name}={kind}" for name, kind in changed.items())
    if not estimate.fits and best.fits:
        return [f"{where}: it then fits"]
    if estimate.fits and best.step_ms < WORTH * estimate.step_ms:
        return [f"{where}: {best.step_ms:.3g} ms a step instead of {estimate.step_ms:.3g}"]
    return []


def _tried(job: Planned, now: Estimate, changed: dict[str, str], table: str) -> list[tuple[str, Estimate]]:
    """The other sharding types that ``table`` can have besides what has ``changed``, and what comes of each."""
    sharding, found = job.config.sharding, []
    present = next(row["sharding"] for row in now.tables if row["table"] == table)
    for kind in SHARDING_TYPES:
        if kind in (present, "data_parallel"):  # the latter trains otherwise
            continue
        other = replace(sharding, by_table=sharding.by_table | changed | {table: kind})
        try:
            estimate = job.with_sharding(other).estimate(now.cluster, thorough=False)
        except UserError:  # impossible for this table
            continue
        found.append((kind, estimate))
    return found


def _cost(estimate: Estimate, table: str | None = None) -> tuple[bool, float]:
    """What is better is less: first of all to fit, then the time of a step, of ``table`` alone where it is given."""
    if not estimate.fits:
        return True, estimate.fullest
    if table is None:
        return False, estimate.step_ms
    return False, next(row["step_ms"] for row in estimate.tables if row["table"] == table)


def _host_memory(estimate: Estimate) -> list[str]:
    if estimate.fits or estimate.cluster.hardware.device == "cpu":
        return []
    over = estimate.fullest - estimate.usable
    host = estimate.cluster.hardware.host_memory
    if not 0 < over < host:
        return []
    return [
        f"{over / GIB:,.3g} GiB of the fullest rank would go into its {host / GIB:,.0f} GiB of host memory (UVM), read at "
        "PCIe's speed; this trainer has no such kernels: add ranks instead"
    ]
