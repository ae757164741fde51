"""What a step would take on clusters that nobody here has: the table of docs/scaling.md.

    python -m bench.scaling [--gpu H100] [--models deepfm din] [--terabytes 0.1 1 10] [--gpus 8 64 512] [--batches 65536 524288]

Every cell is a plan of ``trainer.plan`` (nothing is measured here) for a click log like Criteo's: 13 numbers, 40 ids, for DIN a
history of 50. Cells go to bench/results/scaling.json; those that are there already are not planned again. Ends with the
Markdown tables.

``exchanged`` counts the bytes of the exchange by hand, as the page's formulas do, and so checks the planner. Letters: B rows
of a step on all W ranks, L of them a machine, D embedding_dim.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from bench import harness
from trainer.config.compose import compose
from trainer.plan.estimate import Estimate, Planned
from trainer.plan.smallest import smallest_cluster
from trainer.sharding.hardware import GIB, GPUS, PER_MACHINE, Cluster, of_ranks

DIM, FLOAT, NUMBERS, HISTORY = 128, 4, 13, 50
LARGE, MIDDLE, SMALL, SMALL_ROWS = 8, 16, 16, 1000  # tables, and rows of a small one
LARGE_SHARE, MIDDLE_SHARE = 0.12, 0.0025  # of all rows, each: 96 % and 4 % together
SHARDS = 512  # logical shards, so that 512 ranks have one each
COUNTED = ("table_wise", "row_wise", "table_row_wise")
HBM, EXCHANGE, DENSE = (
    ("lookup", "backward_and_update"),
    ("exchange_forward", "exchange_backward"),
    ("dense", "dense_all_reduce", "dense_optimizer"),
)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    cells, smallest = [], []
    for model, terabytes in product(options.models, options.terabytes):
        log = f"{model} {terabytes:g} TB"
        for gpus, batch in product(options.gpus, options.batches):
            cluster = of_ranks(GPUS[options.gpu], gpus)
            make = partial(cell, model, terabytes, cluster, batch, *options.overrides)
            cells.append(harness.once(options.output, "cells", f"{log} {gpus}x{options.gpu} {batch}", make))
        make = partial(smallest_of, model, terabytes, options.gpu, options.batches[0], *options.overrides)
        found = harness.once(options.output, "smallest", f"{log} {options.gpu} {options.batches[0]}", make)
        smallest.append(f"{log}: {found}")
    print(markdown(cells))
    print(f"\nSmallest cluster that fits: {'; '.join(smallest)}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, "scaling.json", overrides=True)
    parser.add_argument("--gpu", default="H100", choices=list(GPUS))
    parser.add_argument("--models", nargs="+", default=["deepfm", "din"])
    parser.add_argument("--terabytes", nargs="+", type=float, default=[0.1, 1, 10])
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--batches", nargs="+", type=int, default=[65_536, 524_288])
    return parser.parse_intermixed_args(argv)


def log_of(terabytes: float, history: bool) -> dict[str, Any]:
    """The data set: ``terabytes`` of fp32 weights in 40 tables of ``DIM`` columns, most of them in ``LARGE``."""
    rows = terabytes * 1e12 / (FLOAT * DIM)
    sizes = [LARGE_SHARE * rows] * LARGE + [MIDDLE_SHARE * rows] * MIDDLE + [SMALL_ROWS] * SMALL
    tables = {f"c{n}": {"num_embeddings": int(size)} for n, size in enumerate(sizes)}
    features: dict[str, Any] = {f"n{n}": {"kind": "dense", "fill": 0.0} for n in range(NUMBERS)}
    features |= {name: {"kind": "sparse", "table": name} for name in tables}
    if history:
        features["history"] = {"kind": "sequence", "table": "c0", "max_length": HISTORY, "target": "c0"}
    schema = {"embedding_dim": DIM, "tables": tables, "features": features}
    return {"name": "log", "root": ".", "train": ["train"], "schema": schema}


def job(model: str, terabytes: float, cluster: Cluster, batch: int, *overrides: str) -> Planned:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data", "log.yaml")
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(log_of(terabytes, model == "din")))
        own = ["data=log", f"model={model}", f"batch_size={batch}", f"data.stream.shards={SHARDS}"]
        return Planned.of(compose(["--config-dir", folder, *own, *overrides]).config, cluster)


def cell(model: str, terabytes: float, cluster: Cluster, batch: int, *overrides: str) -> dict[str, Any]:
    """One plan, by a part of the search of a run (``thorough=False``), and what follows from it."""
    started = time.monotonic()
    planned = job(model, terabytes, cluster, batch, *overrides)
    estimate = planned.estimate(cluster, thorough=False)
    rows_per_second = 1e3 * batch / estimate.step_ms
    return {
        "model": model,
        "terabytes": terabytes,
        "cluster": str(cluster),
        "gpus": cluster.ranks,
        "batch_size": batch,
        "fits": estimate.fits,
        "gib_of_the_fullest": round(estimate.fullest / GIB, 1),
        "types": dict(Counter(row["sharding"] for row in estimate.tables)),
        "step_ms": {part: round(value, 3) for part, value in estimate.step.items()}
        | {"total": round(estimate.step_ms, 2)},
        "exchanged_forward": exchanged(planned, estimate),
        "rows_per_second": round(rows_per_second),
        "input_gb_per_second_a_machine": round(rows_per_second / cluster.machines * row_bytes(model) / 1e9, 2),
        "checkpoint_gb_a_machine": round(planned.needed() / 1e9 / cluster.machines, 1),
        "planning_seconds": round(time.monotonic() - started, 1),
    }


def smallest_of(model: str, terabytes: float, gpu: str, batch: int, *overrides: str) -> str:
    """The smallest cluster of full machines, or part of one, that holds the tables."""
    like = of_ranks(GPUS[gpu], PER_MACHINE)
    return str(smallest_cluster(job(model, terabytes, like, batch, *overrides), like))


def exchanged(planned: Planned, estimate: Estimate) -> dict[str, int] | None:
    """Bytes of looked-up rows that the busiest rank exchanges in forward, inside its machine and between machines; None
    for a sharding type that is not in ``COUNTED``."""
    if not {row["sharding"] for row in estimate.tables} <= set(COUNTED):
        return None
    cluster = estimate.cluster
    inside, between = [0.0] * cluster.ranks, [0.0] * cluster.ranks
    for row in estimate.tables:
        table = planned.tables[row["table"]]
        ids = sum(planned.lengths.get(feature, 1.0) for feature in table.features)
        near, far = exchanged_of_table(row["sharding"], table.pooled, len(table.features), ids, table.dim, estimate)
        for rank in row["ranks"]:
            inside[rank] += near
            between[rank] += far
    busiest = max(range(cluster.ranks), key=lambda rank: _seconds(inside[rank], between[rank], cluster))
    return {"inside": int(inside[busiest]), "between": int(between[busiest])}


def exchanged_of_table(
    sharding: str, pooled: bool, features: int, ids: float, dim: int, estimate: Estimate
) -> tuple[float, float]:
    """Of each rank that has a part of the table: bytes inside its machine, and between machines. ``ids`` a row of the log,
    over ``features`` features of the table."""
    cluster = estimate.cluster
    batch = estimate.batch_size * cluster.ranks
    vectors = batch * (features if pooled else ids) * FLOAT * dim
    if sharding == "table_row_wise":
        return vectors, (vectors / cluster.local if cluster.machines > 1 else 0.0)
    if sharding == "row_wise" and not pooled:
        vectors /= cluster.ranks  # an id has one owner, so nothing is added up
    return (0.0, vectors) if cluster.machines > 1 else (vectors, 0.0)


def _seconds(inside: float, between: float, cluster: Cluster) -> float:
    return inside / (cluster.hardware.within or 1) + between / (cluster.hardware.between or 1)


def row_bytes(model: str) -> int:
    """Of a prepared row, uncompressed: numbers, ids and the label in four bytes each, a list with its length."""
    return FLOAT * (NUMBERS + LARGE + MIDDLE + SMALL + 1 + (HISTORY + 1 if model == "din" else 0))


def markdown(cells: Sequence[dict[str, Any]]) -> str:
    head = (
        "| model, TB | GPUs | batch | GiB of the fullest | tables by rows, machine, whole | HBM | exchange | dense | launch | "
        "step, ms | M rows/s | input GB/s a machine | checkpoint GB a machine |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    return "\n".join(lines + [_line(one) for one in cells])


def _line(one: dict[str, Any]) -> str:
    start = f"| {one['model']}, {one['terabytes']:g} | {one['gpus']} | {one['batch_size'] // 1024} Ki"
    if not one["fits"]:
        return f"{start} | does not fit |" + " |" * 9
    step, types = one["step_ms"], one["types"]
    parts = [sum(step[name] for name in names) for names in (HBM, EXCHANGE, DENSE)] + [step["host"]]
    most = max(parts)
    times = [f"**{part:.2f}**" if part == most else f"{part:.2f}" for part in parts]
    shapes = ", ".join(str(types.get(name, 0)) for name in ("row_wise", "table_row_wise", "table_wise"))
    last = [
        f"{step['total']:.1f}",
        f"{one['rows_per_second'] / 1e6:.1f}",
        f"{one['input_gb_per_second_a_machine']:.2f}",
        f"{one['checkpoint_gb_a_machine']:,.0f}",
    ]
    return " | ".join([start, f"{one['gib_of_the_fullest']:.0f}", shapes, *times, *last]) + " |"


if __name__ == "__main__":
    main()
