"""Tables of fp16: trained as those of fp32 but for rounding, saved as they are, loaded under every plan to the bit."""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchrec.modules.embedding_configs import DataType

from tests.helpers.model_states import LAYOUTS, Whole, assembled, assert_equal, load, train
from tests.helpers.ranks import run_distributed
from tests.helpers.reference_optimizers import DENSE, HALVES, Closed, Reference
from tests.helpers.tables import DIMS, TinyModel, all_tables, build, make_batch, plan_alone, unmasked
from trainer.config.optim import OptimConfig, TableOptimizerConfig
from trainer.config.sharding import ShardingConfig
from trainer.optim.combined import CombinedOptimizer
from trainer.sharding.kernels import fused_kernels
from trainer.sharding.model_state import model_pieces

SAVED, TOTAL = 3, 5  # steps
PLANS = ("table_wise", "row_wise", "column_wise")
OPTIMIZERS = {
    "sgd": TableOptimizerConfig("sgd", lr=0.5),
    "adagrad": TableOptimizerConfig("adagrad", lr=0.3),
    "rowwise_adagrad": TableOptimizerConfig("rowwise_adagrad", lr=0.3),
}
# Values are below 2, where neighbours in fp16 are 2^-10 apart: a rounding for the first value and each step, twice, as
# AdaGrad's first steps, of 0.3 each, magnify what another row's rounding does to a gradient.
TOLERANCE = 2 * (TOTAL + 1) * 2**-11


class Job:
    """The tiny model with deep tables of fp16; wide ones are fp32 always."""

    def __init__(self, kind: str, plan: str) -> None:
        config = OPTIMIZERS[kind]
        self.optim = OptimConfig(tables=config, wide=TableOptimizerConfig("sgd", lr=config.lr), dense=DENSE)
        model, world_size = TinyModel(True, data_type=DataType.FP16), dist.get_world_size()
        self.model, sharding = build(world_size, LAYOUTS[plan], self.optim, sequence=True, model=model)
        self.optimizer = CombinedOptimizer(self.model, sharding, self.optim, total_steps=TOTAL, mask=unmasked())
        self.pieces = [*model_pieces(self.model, sharding), *self.optimizer.pieces()]

    def train(self, steps: range) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        train(self.model, self.optimizer, [make_batch(rank, world_size, step) for step in steps])
        self.optimizer.row_clock.agree()

    def load(self, state: dict[str, Whole]) -> None:
        load(self.pieces, state)
        self.optimizer.restore(SAVED)


def largest_difference(job: Job, reference: Reference) -> float:
    world_size = dist.get_world_size()
    for step in range(TOTAL):
        reference.step([make_batch(rank, world_size, step) for rank in range(world_size)])
    found = all_tables(job.model, sequence=True)
    return max(float((values.double() - reference.tables[name]).abs().max()) for name, values in found.items())


def trained(kind: str, plan: str) -> tuple[dict[str, Whole], dict[str, Whole]]:
    """The state after ``SAVED`` steps and at the end, which the closed form's is close to."""
    job = Job(kind, plan)
    cut = HALVES if (kind, plan) == ("rowwise_adagrad", "column_wise") else None
    reference = Reference(all_tables(job.model, sequence=True), Closed(OPTIMIZERS[kind], cut), sequence=True)
    assert all(kernel.optimizer_args.stochastic_rounding for kernel, _ in fused_kernels(job.model))  # GPUs have it
    job.train(range(SAVED))
    state = assembled(job.pieces)
    for name, (values, _) in state.items():
        _, table, tensor = name.split("/") if name.startswith("tables/") else ("", "", "")
        half = tensor == "weight" and not table.startswith("wide_")
        whole = torch.int32 if name.startswith("clock/") else torch.float32
        assert values.dtype == (torch.float16 if half else whole), name
    job.train(range(SAVED, TOTAL))
    difference = largest_difference(job, reference)
    assert 1e-6 < difference < TOLERANCE, (kind, plan, difference)
    return state, assembled(job.pieces)


def _on_ranks(rank: int, world_size: int, folder: str, earlier: list[int]) -> bool:
    results = {case: trained(*case) for case in product(OPTIMIZERS, PLANS)}
    for (kind, plan), (state, final) in results.items():
        job = Job(kind, plan)
        job.load(state)
        job.train(range(SAVED, TOTAL))
        assert_equal(assembled(job.pieces), final)
    if rank == 0:
        torch.save({case: state for case, (state, _) in results.items()}, Path(folder) / f"{world_size}.pt")
    dist.barrier()
    for ranks, (kind, plan, other) in product([*earlier, world_size], product(OPTIMIZERS, PLANS, PLANS)):
        state = torch.load(Path(folder) / f"{ranks}.pt")[kind, plan]
        job = Job(kind, other)
        job.load(state)
        assert_equal(assembled(job.pieces), state)
    return True


def test_half_tables_follow_the_closed_forms_within_rounding_and_go_on_under_every_plan(tmp_path: Path) -> None:
    assert run_distributed(_on_ranks, 1, str(tmp_path), []) == [True]
    assert run_distributed(_on_ranks, 2, str(tmp_path), [1]) == [True, True]


def test_the_summary_counts_two_bytes_a_weight_and_four_a_state() -> None:
    plan = plan_alone(ShardingConfig(["table_wise"]), OptimConfig(), data_type=DataType.FP16)
    assert list(plan["user"]["bytes"].values()) == [2 * 11 * 8 + 4 * 11 + 4 * 11]  # weights, sums, clock
    assert list(plan["wide_user"]["bytes"].values()) == [4 * 11 * (2 * DIMS["wide_user"] + 1)]  # AdaGrad


@pytest.mark.parametrize(
    ("sharding", "optimizer", "message"),
    [
        (ShardingConfig(["data_parallel"]), TableOptimizerConfig(), "data_parallel: an ordinary optimizer would lose"),
        (
            ShardingConfig(),
            TableOptimizerConfig(weight_decay=0.1),
            "weight_decay=0.1.*tables.user.dtype=fp32, or weight",
        ),
        (
            ShardingConfig(),
            TableOptimizerConfig(mini_batch_l2=0.2),
            "mini_batch_l2=0.2.*tables.user.dtype=fp32, or mini",
        ),
    ],
)
def test_what_needs_steps_smaller_than_a_rounding_is_refused(
    sharding: ShardingConfig, optimizer: TableOptimizerConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_alone(sharding, OptimConfig(tables=optimizer), data_type=DataType.FP16)
