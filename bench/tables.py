"""Compiled kernels of embedding tables against FBGEMM's on a CPU: lookup and update, and whole steps.

    python -m bench.tables [--only steps] --repeats 9      # one thread; bench/results/tables.json

* kernels: modules of both take turns in one process, with equal tables, ids and gradients. Ids are drawn by Zipf's law
  (exponent 1.2) and scattered over the table, or uniformly.
* steps: training with and without them, batches in memory.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from bench import harness
from bench.train import Ours, in_memory_batches
from trainer import kernels
from trainer.config.compose import compose
from trainer.run import build
from trainer.runtime.distributed import choose_device
from trainer.runtime.process import guarded
from trainer.runtime.rendezvous import process_group
from trainer.sharding.cpu_tables import CpuTables

ZIPF = 1.2
CALLS, STEPS = 5, 5  # of a pass
JOBS = {
    "DeepFM": ["model=deepfm"],
    "Wide & Deep, FTRL": ["model=wide_deep", "optim.wide.name=ftrl"],
    "DIN": ["model=din", "batch_size=1024"],
}
SCATTER = 2654435761  # a prime: frequent ids are not neighbours


@dataclass(frozen=True)
class Case:
    """``tables`` tables [rows, dim], each read by ``features`` features; ``bags`` of ``length`` ids a feature."""

    name: str
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD
    tables: int = 8
    features: int = 1
    rows: int = 1_000_000
    dim: int = 16
    pooling: PoolingMode = PoolingMode.SUM
    precision: SparseType = SparseType.FP32
    bags: int = 8192
    length: int = 1
    uniform: bool = False


POOLED = Case("row-wise AdaGrad")
SEQUENCE = Case("sequence, row-wise AdaGrad", tables=1, rows=400_000, pooling=PoolingMode.NONE, bags=1024, length=50)
CASES = (
    POOLED,
    replace(POOLED, name="row-wise AdaGrad, uniform ids", uniform=True),
    replace(POOLED, name="row-wise AdaGrad, fp16", precision=SparseType.FP16),
    replace(POOLED, name="row-wise AdaGrad, 26 features of one table", tables=1, features=26, rows=400_000),
    replace(POOLED, name="row-wise AdaGrad, bags of 20, D 32", tables=4, rows=400_000, dim=32, bags=1024, length=20),
    replace(POOLED, name="AdaGrad", optimizer=EmbOptimType.EXACT_ADAGRAD),
    replace(POOLED, name="SGD", optimizer=EmbOptimType.EXACT_SGD),
    replace(POOLED, name="wide rows (D 4), AdaGrad", optimizer=EmbOptimType.EXACT_ADAGRAD, dim=4),
    replace(POOLED, name="wide rows (D 4), SGD", optimizer=EmbOptimType.EXACT_SGD, dim=4),
    SEQUENCE,
    replace(SEQUENCE, name="sequence, row-wise AdaGrad, uniform ids", uniform=True),
    replace(SEQUENCE, name="sequence, row-wise AdaGrad, fp16", precision=SparseType.FP16),
    replace(SEQUENCE, name="sequence, AdaGrad", optimizer=EmbOptimType.EXACT_ADAGRAD),
    replace(SEQUENCE, name="sequence, SGD", optimizer=EmbOptimType.EXACT_SGD),
)


def main() -> None:
    sections = {"kernels": kernels_alone, "steps": steps}
    options = harness.sections_parser(__doc__, "tables.json", sections, repeats=9).parse_args()
    if not kernels.available():
        sys.exit("error: kernels are not compiled for this CPU: make setup, with g++ or clang++ installed")
    torch.set_num_threads(1)
    guarded(lambda: harness.run_sections(sections, options, "torchrec"))


def kernels_alone(options: argparse.Namespace) -> harness.Section:
    return harness.Section(rows={case.name: compare(case, options.repeats) for case in CASES})


def steps(options: argparse.Namespace) -> harness.Section:
    section = harness.Section()
    with process_group(choose_device("cpu"), 300.0) as ranks:
        for job, overrides in JOBS.items():
            sides: dict[str, Callable[[int], harness.Pass]] = {}
            for side in ("true", "false"):
                config = compose([*overrides, f"kernels={side}"]).config
                build.ensure_synthetic(config.data)
                sides[f"{job}, kernels={side}"] = Ours(config, ranks, STEPS, cycle(in_memory_batches(config, ranks, 8)))
            passes = harness.take_turns(sides, options.repeats)
            section.rates.update({name: harness.Rates.of(found) for name, found in passes.items()})
            section.add_ratio(" / ".join(sides))
    return section


def compare(case: Case, repeats: int) -> dict[str, Any]:
    """Medians of CPU time, and the medians of FBGEMM's over ours turn by turn."""
    arguments = module_arguments(case)
    ours, fbgemm = CpuTables(**arguments, compiled=True), SplitTableBatchedEmbeddingBagsCodegen(**arguments)
    ids, offsets = batch(case)
    gradient = torch.randn_like(ours(ids, offsets))
    works = {
        "lookup": lambda module: module(ids, offsets),
        "lookup and update": lambda module: module(ids, offsets).backward(gradient),
    }
    row: dict[str, Any] = {}
    for name, work in works.items():
        mine, theirs = in_turns([lambda m=m, work=work: work(m) for m in (ours, fbgemm)], repeats)
        row[f"{name}, ms"] = f"{statistics.median(theirs):.2f} -> {statistics.median(mine):.2f}"
        row[f"{name}, ratio"] = round(statistics.median(b / a for a, b in zip(mine, theirs)), 2)
    return row


def in_turns(sides: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Milliseconds of this thread's CPU time, after a pass of each that does not count."""
    found: list[list[float]] = [[] for _ in sides]
    for number in range(repeats + 1):
        for side, times in zip(sides, found):
            began = time.thread_time()
            for _ in range(CALLS):
                side()
            if number:
                times.append((time.thread_time() - began) / CALLS * 1e3)
    return found


def module_arguments(case: Case) -> dict[str, Any]:
    location = (EmbeddingLocation.HOST, ComputeDevice.CPU)
    return {
        "embedding_specs": [(case.rows, case.dim, *location)] * case.tables,
        "feature_table_map": [table for table in range(case.tables) for _ in range(case.features)],
        "optimizer": case.optimizer,
        "pooling_mode": case.pooling,
        "weights_precision": case.precision,
        "device": torch.device("cpu"),
        "learning_rate": 0.05,
        "stochastic_rounding": False,
    }


def batch(case: Case) -> tuple[Tensor, Tensor]:
    """(ids, offsets)"""
    bags, random = case.tables * case.features * case.bags, np.random.default_rng(1)
    count = bags * case.length
    drawn = random.integers(case.rows, size=count) if case.uniform else random.zipf(ZIPF, count) * SCATTER % case.rows
    return torch.from_numpy(drawn.astype(np.int64)), torch.arange(bags + 1) * case.length


if __name__ == "__main__":
    main()
