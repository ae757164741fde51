"""Pieces of sharded models: complete, the same tensors whatever the plan, and the optimizer's own memory.

Every launch trains each kind of optimizer under each plan, holds its pieces against closed forms, saves them whole, and
loads what this and earlier launches, of other numbers of ranks, have saved into fresh models of every other plan.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from tests.helpers.model_states import LAYOUTS, Whole, assembled, assert_equal, layout, load, train
from tests.helpers.ranks import run_distributed
from tests.helpers.reference_optimizers import DENSE, Closed, Reference
from tests.helpers.tables import DIMS, ROWS, TinyModel, all_tables, build, make_batch, unmasked
from tests.helpers.whole_tables import gather_table
from trainer.checkpoint.piece import Piece
from trainer.config.optim import DenseOptimizerConfig, OptimConfig, ScheduleConfig, TableOptimizerConfig
from trainer.modules.dice import Dice
from trainer.modules.embeddings import is_wide_table
from trainer.modules.execution import Execution, executed_by
from trainer.optim.combined import CombinedOptimizer
from trainer.runtime.distributed import all_reduce_sum
from trainer.sharding.model_state import model_pieces

SAVED, TOTAL = 3, 5  # steps


SCHEDULE = ScheduleConfig(warmup_steps=2, decay="cosine")
KINDS = {
    name: OptimConfig(tables=config, wide=TableOptimizerConfig("sgd", lr=config.lr), dense=DENSE)
    for name, config in {
        "sgd": TableOptimizerConfig("sgd", lr=0.5),
        "adagrad": TableOptimizerConfig("adagrad", lr=0.3),
        "rowwise_adagrad": TableOptimizerConfig("rowwise_adagrad", lr=0.3),
        "adam": TableOptimizerConfig("adam", lr=0.1),
    }.items()
} | {
    "everything": OptimConfig(
        tables=TableOptimizerConfig("rowwise_adagrad", lr=0.3),
        wide=TableOptimizerConfig("ftrl", lr=0.5, l1=0.05),
        by_table={"item": TableOptimizerConfig("adagrad", lr=0.2)},
        dense=DenseOptimizerConfig("nadam", lr=0.1, clip_norm=0.05, schedule=SCHEDULE),
    )
}
FEW_KINDS = ("rowwise_adagrad", "everything")  # on more ranks than there are cores


class Counted(nn.Module):
    """A dense layer behind Dice, with buffers of floats and of whole numbers."""

    def __init__(self, top: nn.Module) -> None:
        super().__init__()
        with executed_by(Execution(all_reduce=all_reduce_sum)):
            self.top, self.dice = top, Dice(32)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, deep: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.top(self.dice(deep))


class Job:
    """A model with its optimizer, whose pieces were taken before the first step."""

    def __init__(self, world_size: int, kind: str, plan: str, seed: int = 3) -> None:
        model, self.optim = TinyModel(sequence=True), KINDS[kind]
        if kind == "everything":
            model.head.top = Counted(model.head.top)
        self.model, self.tables = build(world_size, LAYOUTS[plan], self.optim, sequence=True, model=model, seed=seed)
        self.optimizer = CombinedOptimizer(self.model, self.tables, self.optim, total_steps=TOTAL, mask=unmasked())
        self.pieces = [*model_pieces(self.model, self.tables), *self.optimizer.pieces()]
        self.step = 0

    def train(self, steps: int) -> list[Tensor]:
        """Goes on up to ``steps``; this rank's logits of each step."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        logits = train(self.model, self.optimizer, [make_batch(rank, world_size, s) for s in range(self.step, steps)])
        self.optimizer.row_clock.agree()
        return logits

    def load(self, saved: dict[str, Whole], steps: int) -> None:
        load(self.pieces, saved)
        self.optimizer.restore(steps)
        self.step = steps


# What holds of each job.


def check_against_closed_form(kind: str, before: dict[str, Tensor], state: dict[str, Whole]) -> None:
    """Sums of squares, in float64, over the global batches of the steps made."""
    world_size, config = dist.get_world_size(), KINDS[kind].tables
    widths = {name.split("/")[1]: w for name, (_, w) in state.items() if w is not None}
    reference = Reference(before, Closed(config, {table: w[0] for table, w in widths.items()}), sequence=True)
    for step in range(SAVED):
        reference.step([make_batch(rank, world_size, step) for rank in range(world_size)])
    for table in ("user", "item", "clicked"):
        sums = reference.update.sums[table]  # [rows, D]
        if config.name == "rowwise_adagrad":
            sums = sums[:, :: widths[table][0]]  # [rows, parts]
        torch.testing.assert_close(state[f"tables/{table}/sum"][0].double(), sums, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(state["dense/head.top.weight"][0].double().flatten(), reference.top.detach())


def check_widths(plan: str, state: dict[str, Whole]) -> None:
    cut = {"column_wise": ("user", "item", "clicked"), "grid_shard": ("user", "item"), "mixed": ("user",)}.get(plan, ())
    for table in ("user", "item", "clicked"):
        values, widths = state[f"tables/{table}/sum"]
        if widths is None:  # one a column
            assert values.shape == (ROWS[table], DIMS[table])
        else:
            assert values.shape == (ROWS[table], len(widths)) and sum(widths) == DIMS[table]
            assert len(set(widths)) == 1 and (len(widths) > 1) == (table in cut), (plan, table, widths)


def check_shares(pieces: Sequence[Piece]) -> None:
    """Writing what all ranks hold is shared out to within the largest tensor."""
    ranks: list = [None] * dist.get_world_size()
    whole = {p.name: (p.tensor.nbytes, p.written) for p in pieces if tuple(p.tensor.shape) == p.shape}
    dist.all_gather_object(ranks, whole)
    alike = set.intersection(*map(set, ranks))
    loads = [sum(size for name, (size, written) in rank.items() if written and name in alike) for rank in ranks]
    assert sum(loads) == sum(whole[name][0] for name in alike)
    if len(ranks) > 1:
        assert max(loads) - min(loads) <= max((whole[name][0] for name in alike), default=0), loads


def cut_clock(plan: str, piece: Piece) -> bool:
    """Of a table cut by columns each part keeps a clock, and one of them writes."""
    return plan in ("column_wise", "grid_shard", "mixed") and piece.name.startswith("clock/")


def trained(world_size: int, kind: str, plan: str) -> tuple[dict[str, Whole], list[Tensor], dict[str, Whole]]:
    """(state after ``SAVED`` steps, logits from there on, state at the end)"""
    job = Job(world_size, kind, plan)
    before = all_tables(job.model, sequence=True)
    job.train(SAVED)
    state = assembled(job.pieces)
    for table, values in all_tables(job.model, sequence=True).items():
        assert torch.equal(state[f"tables/{table}/weight"][0], values) and not torch.equal(values, before[table])
    if kind in ("adagrad", "rowwise_adagrad"):
        check_against_closed_form(kind, before, state)
        check_widths(plan, state)
    check_shares(model_pieces(job.model, job.tables))
    check_shares([piece for piece in job.optimizer.pieces() if not cut_clock(plan, piece)])
    again = [*model_pieces(job.model, job.tables), *job.optimizer.pieces()]
    assert [(p, p.tensor.data_ptr()) for p in again if p.tensor.numel()] == [
        (p, p.tensor.data_ptr()) for p in job.pieces if p.tensor.numel()
    ]
    job.step = SAVED
    logits = job.train(TOTAL)
    return state, logits, assembled(job.pieces)


def check_going_on(job: Job, plan: str, state: dict[str, Whole], logits: list[Tensor], final: dict[str, Whole]) -> None:
    """A fresh job goes on from ``state`` bit by bit as the one that saved it did."""
    job.load(state, SAVED)
    assert_equal(assembled(job.pieces), state)
    found = job.train(TOTAL)
    assert all(torch.equal(one, other) for one, other in zip(found, logits, strict=True))
    assert_equal(assembled(job.pieces), final)


def _on_ranks(rank: int, world_size: int, folder: str, earlier: Sequence[int]) -> dict[str, dict[str, Whole]]:
    """Trains and saves every job; goes on from it in a fresh one; loads every plan's state into every plan."""
    kinds = KINDS if world_size <= 2 else FEW_KINDS
    results = {(kind, plan): trained(world_size, kind, plan) for kind in kinds for plan in LAYOUTS}
    if rank == 0:
        torch.save({case: state for case, (state, _, _) in results.items()}, Path(folder) / f"{world_size}.pt")
    dist.barrier()
    saved = {n: torch.load(Path(folder) / f"{n}.pt") for n in (*earlier, world_size)}
    for kind in kinds:
        origins = [n for n, states in saved.items() if (kind, "mixed") in states]
        for (i, plan), (j, other) in itertools.product(enumerate(LAYOUTS), repeat=2):
            if j == 0:
                job = Job(world_size, kind, plan, seed=77)
                check_going_on(job, plan, *results[kind, plan])
            origin = origins[(i + j) % len(origins)]
            state = saved[origin][kind, other]
            job.load(state, SAVED)
            assert_equal(assembled(job.pieces), state)
            assert torch.equal(gather_table(job.model, "user"), state["tables/user/weight"][0]), (kind, plan, other)
    return {plan: results["everything", plan][0] for plan in LAYOUTS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, dict[str, Whole]]]]:
    """In this order, so that state travels to fewer and to more ranks."""
    folder = str(tmp_path_factory.mktemp("saved"))
    order = (3, 1, 4, 2)
    return {n: run_distributed(_on_ranks, n, folder, order[:i]) for i, n in enumerate(order)}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_state_is_whole_and_goes_from_any_plan_to_any_other(runs, world_size: int) -> None:
    """The checks are made on the ranks; here, that none was left out and that names do not depend on plan or ranks."""
    names = {frozenset(state) for states in runs[world_size] for state in states.values()}
    assert names == {frozenset(NAMES)} and len(runs[world_size]) == world_size


NAMES = [
    *(f"clock/{table}" for table in DIMS),
    "dense/head.top.calls",
    "dense/head.top.dice.alpha",
    "dense/head.top.dice.batches",
    "dense/head.top.dice.moving_mean",
    "dense/head.top.dice.moving_variance",
    "dense/head.top.top.weight",
    *(
        f"optimizer/head.top.{parameter}/{state}"
        for parameter in ("dice.alpha", "top.weight")
        for state in ("exp_avg", "exp_avg_sq", "mu_product", "step")
    ),
    "tables/clicked/sum",
    "tables/clicked/weight",
    "tables/item/sum",
    "tables/item/weight",
    "tables/user/sum",
    "tables/user/weight",
    "tables/wide_item/weight",
    "tables/wide_user/weight",
]


def test_what_counts_steps_has_counted_them(runs) -> None:
    for states in runs.values():
        state = states[0]["mixed"]
        assert int(state["dense/head.top.calls"][0]) == float(state["dense/head.top.dice.batches"][0]) == SAVED
        assert float(state["optimizer/head.top.top.weight/step"][0]) == SAVED
        assert state["tables/wide_user/weight"][0][:, 2].any()  # FTRL's sums are in the table


# Adam of data-parallel tables, whose optimizer is PyTorch's.


def _adam(rank: int, world_size: int) -> list[str]:
    def job(seed: int) -> tuple[CombinedOptimizer, list[Piece], DistributedModelParallel]:
        model, plan = build(world_size, layout("data_parallel"), KINDS["adagrad"], seed=seed)
        plan = tuple(replace(t, optimizer=adam.of_table(t.name, wide=is_wide_table(t.name))) for t in plan)
        optimizer = CombinedOptimizer(model, plan, adam, total_steps=TOTAL, mask=unmasked())
        return optimizer, [*model_pieces(model, plan), *optimizer.pieces()], model

    adam = replace(KINDS["adagrad"], tables=TableOptimizerConfig("adam", lr=0.1))
    batches = [make_batch(rank, world_size, step) for step in range(TOTAL)]
    optimizer, pieces, model = job(3)
    train(model, optimizer, batches[:SAVED])
    optimizer.row_clock.agree()
    saved = assembled(pieces)
    final = train(model, optimizer, batches[SAVED:])
    fresh, loaded, other = job(77)
    load(loaded, saved)
    fresh.restore(SAVED)
    assert fresh.steps == SAVED
    for found, expected in zip(train(other, fresh, batches[SAVED:]), final, strict=True):
        assert torch.equal(found, expected)
    for each in (optimizer, fresh):
        each.row_clock.agree()
    assert_equal(assembled(loaded), assembled(pieces))
    return sorted(saved)


def test_adam_of_data_parallel_tables_goes_on_at_its_step() -> None:
    for names in run_distributed(_adam, 2):
        assert names == [
            *(f"clock/{table}" for table in ("item", "user", "wide_item", "wide_user")),
            "dense/head.top.weight",
            *(f"tables/{table}/{s}" for table in ("item", "user") for s in ("exp_avg", "exp_avg_sq", "weight")),
            "tables/wide_item/weight",
            "tables/wide_user/weight",
        ]
