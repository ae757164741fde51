"""Plan against reality: bytes that ranks of a real job hold, beside those that ``trainer.plan`` foretells."""

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.ranks import run_distributed
from trainer.config.compose import compose
from trainer.config.job import TrainConfig
from trainer.models.construct import build_model
from trainer.plan.estimate import Planned
from trainer.run import build
from trainer.runtime.distributed import Ranks
from trainer.sharding import planner
from trainer.sharding.hardware import GIB, Cluster, Hardware
from trainer.sharding.kernels import fused_kernels

MEMORY = {f"{kind}_{place}" for kind in ("weights", "momentum1") for place in ("dev", "host", "uvm")}  # FBGEMM's names
JOBS = {
    "deepfm": ["model=deepfm", "data.schema.tables.user.num_embeddings=50_000"],
    "din": ["model=din", "optim.tables.name=adagrad", "data.schema.tables.item.num_embeddings=30_001"],
    "half": ["model=wide_deep", "data.schema.tables.user={num_embeddings: 40_001, dtype: fp16}"],
    "counted": ["model=din", "optim.tables.mini_batch_l2=1e-4"],
    "cut": [
        "model=deepfm",
        "optim.tables.name=adagrad",
        "sharding.types=[row_wise]",
        "+sharding.by_table={user: column_wise, tag: data_parallel}",
        "data.schema.tables.user.num_embeddings=20_000",
    ],
}


def allocated(rank: int, world_size: int, jobs: dict[str, TrainConfig]) -> dict[str, tuple[int, int, list]]:
    """Of each job: bytes of this rank's kernels and data-parallel tables, those beside them, and its plan's rows."""
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    found = {}
    for name, config in jobs.items():
        model = build_model(config.model, config.data.schema, config.seed, build.execution(config, world_size))
        built = build.build(config, model, ranks, config.batch_size // world_size, total_steps=10)
        found[name] = (*bytes_of(built), [table.summary() for table in built.tables])
    return found


def bytes_of(built: build.Built) -> tuple[int, int]:
    weights = state = 0
    for kernel, _ in fused_kernels(built.task):
        for name, tensor in (*kernel.named_parameters(), *kernel.named_buffers()):
            size = tensor.untyped_storage().nbytes() if name in MEMORY and tensor.numel() > 0 else 0
            weights, state = (
                weights + size * name.startswith("weights_"),
                state + size * (not name.startswith("weights_")),
            )
    parameters = dict(built.task.named_parameters())
    for table in built.tables:
        if table.data_parallel:
            weights += parameters[table.parameter].nbytes
            state += parameters[table.parameter].nbytes  # AdaGrad's, made at the first step
    optimizer = built.optimizer
    beside = (
        *optimizer.mini_batch_aware.pieces(),
        *optimizer.row_clock.pieces(),
        *optimizer.row_clock.replicated_pieces(),
    )
    state += sum(piece.tensor.nbytes for piece in beside)
    return weights, state


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_hold_what_the_plan_says(tmp_path, world_size):
    jobs = {name: tiny.job(tmp_path, *overrides).config for name, overrides in JOBS.items()}
    if world_size == 1:
        del jobs["cut"]
    held = run_distributed(allocated, world_size, jobs)
    cluster = Cluster(Hardware("CPU", "cpu", 8 * GIB, 8 * GIB, 1e10, 3e9, 1.2e9, 1e11, bf16=False), 1, world_size)
    for name, config in jobs.items():
        estimate = Planned.of(config, cluster).estimate(cluster)
        for rank, planned in enumerate(estimate.memory):
            weights, state, _ = held[rank][name]
            assert planned["tables"] == pytest.approx(weights, rel=0.05), (name, rank)
            assert planned["optimizer_state"] == pytest.approx(state, rel=0.05), (name, rank)


def test_ranks_hold_what_the_plan_says_of_real_data_sets():
    """Every model on every schema it can have: DIN compares a history with its candidate, and criteo39 has none."""
    pairs = [(model, data) for model in ("wide_deep", "deepfm", "din") for data in ("criteo39", "ml1m", "trivago")]
    pairs.remove(("din", "criteo39"))
    common = ("data.root=.", "device=cpu", "precision=fp32")
    jobs = {f"{model} on {data}": compose([f"model={model}", f"data={data}", *common]).config for model, data in pairs}
    held = run_distributed(allocated, 2, jobs)
    cluster = Cluster(planner.measured(torch.device("cpu"), 2), 1, 2)
    for name, config in jobs.items():
        estimate = Planned.of(config, cluster).estimate(cluster)
        planned_rows = {row["table"]: (row["sharding"], row["bytes"]) for row in estimate.tables}
        for rank, planned in enumerate(estimate.memory):
            weights, state, rows = held[rank][name]
            assert planned_rows == {row["table"]: (row["sharding"], row["bytes"]) for row in rows}, name
            assert planned["tables"] == weights, (name, rank)
            # Kernels without state (FTRL's, SGD's) hold a few bytes in its place.
            assert planned["optimizer_state"] == pytest.approx(state, abs=100), (name, rank)
