"""Mini-batch aware regularisation on sharded tables: equation 7 of the DIN paper, exact counts, and going on from a
checkpoint bit by bit, on other plans and numbers of ranks."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from data_loaders.batch import Batch
from tests.helpers import tiny
from tests.helpers.jobs import built_job, curve, ranks_of, state_of
from tests.helpers.model_states import assembled, load
from tests.helpers.ranks import run_distributed
from tests.helpers.reference_optimizers import DENSE, Closed, Reference, train
from tests.helpers.tables import DIMS, FEATURES, ROWS, all_tables, build, make_batch, unmasked
from tests.helpers.whole_tables import gather_table
from trainer.checkpoint import loading
from trainer.checkpoint.saving import Checkpoints
from trainer.checkpoint.verification import newest_whole
from trainer.config.optim import OptimConfig, TableOptimizerConfig
from trainer.config.sharding import ShardingConfig
from trainer.optim.combined import CombinedOptimizer
from trainer.optim.mini_batch_aware import MiniBatchAware
from trainer.run.build import build_train_loader, count_ids
from trainer.run.loop import batches_from
from trainer.runtime.progress import Progress
from trainer.sharding.kernels import fused_kernels

STEPS = 4
L2 = 0.9  # with the rates below a row of one occurrence loses nearly half of itself a step
WIDE = dict.fromkeys(("wide_user", "wide_item"), "table_wise")  # 4 columns cannot be cut
PLANS = {
    "table-wise": ShardingConfig(["table_wise"]),
    "row-wise": ShardingConfig(["row_wise"]),
    "column-wise": ShardingConfig(["column_wise"], WIDE),
    "table-row-wise": ShardingConfig(["table_row_wise"], {"clicked": "row_wise"}),
    "grid": ShardingConfig(["grid_shard"], {**WIDE, "item": "column_wise", "clicked": "column_wise"}),
}


def optim(name: str = "sgd", lr: float = 0.5, **of_item: float) -> OptimConfig:
    """``of_item``: another λ for that table, in the same kernel as those with L2; linear weights have none."""
    tables = TableOptimizerConfig(name, lr=lr, mini_batch_l2=L2)
    by_table = {"item": TableOptimizerConfig(name, lr=lr, **of_item)} if of_item else {}
    return OptimConfig(tables=tables, wide=TableOptimizerConfig("sgd", lr=lr), by_table=by_table, dense=DENSE)


def ids_of(batch: Batch, table: str) -> list[int]:
    jagged = [(batch.sequence if key == "clicks" else batch.sparse)[key] for key in FEATURES[table]]
    return [i for each in jagged for i in each.values().tolist()]


def all_batches(world_size: int) -> list[list[Batch]]:
    """The training data, step by step, rank by rank."""
    return [[make_batch(rank, world_size, step) for rank in range(world_size)] for step in range(STEPS)]


def occurrences(world_size: int, table: str) -> Counter[int]:
    return Counter(i for step in all_batches(world_size) for batch in step for i in ids_of(batch, table))


class Regularised:
    """Equation 7 row by row: w -= lr (g + λ / n w) for the rows of the ids in ``present``; the rest has no gradient. Other
    optimizers than sgd make their step (``Closed``) beside the decay."""

    def __init__(self, optim: OptimConfig, world_size: int) -> None:
        self.optim, self.closed = optim, Closed(optim.tables)
        self.counts = {table: occurrences(world_size, table) for table in DIMS}
        self.present: Mapping[str, set[int]] = {}

    def __call__(self, table: str, weights: Tensor, gradient: Tensor) -> None:
        config = self.optim.of_table(table, wide=table.startswith("wide_"))
        before = weights.numpy().copy()
        if config.name == "sgd":
            step = config.lr * gradient.numpy()
        else:
            self.closed(table, weights, gradient)
            step = before - weights.numpy()
        for row in range(len(before)):
            decay = np.zeros(before.shape[1])
            if row in self.present[table]:
                decay = config.lr * config.mini_batch_l2 / self.counts[table][row] * before[row]
            weights[row] = torch.from_numpy(before[row] - step[row] - decay)


CASES = {
    **{f"sgd, {plan}": (optim(), layout) for plan, layout in PLANS.items()},
    "another λ beside": (optim(mini_batch_l2=0.3), PLANS["table-wise"]),
    "none beside": (optim(mini_batch_l2=0.0), PLANS["row-wise"]),
    "decoupled, table-wise": (optim("rowwise_adagrad", 0.3), PLANS["table-wise"]),
    "decoupled, row-wise": (optim("adagrad", 0.3), PLANS["row-wise"]),
}


def count(optimizer: CombinedOptimizer, rank: int, world_size: int) -> None:
    own = [batches[rank] for batches in all_batches(world_size)]
    optimizer.mini_batch_aware.count(own, batches_per_round=3)


def _formula(rank: int, world_size: int) -> dict[str, int]:
    repeated: Counter[str] = Counter()
    for name, (config, layout) in CASES.items():
        model, plan = build(world_size, layout, config, sequence=True)
        update = Regularised(config, world_size)
        reference = Reference(all_tables(model, True), update, True)
        optimizer = CombinedOptimizer(model, plan, config, total_steps=STEPS, mask=unmasked())
        count(optimizer, rank, world_size)
        for step, batches in enumerate(all_batches(world_size)):
            found = {table: [set(ids_of(batch, table)) for batch in batches] for table in DIMS}
            update.present = {table: set().union(*ranks) for table, ranks in found.items()}
            reference.step(batches)
            repeated["on all ranks"] += len(set.intersection(*found["user"]))
            repeated["within one"] += len(ids_of(batches[0], "user")) - len(found["user"][0])
            train(model, optimizer, rank, world_size, range(step, step + 1))
            with torch.no_grad():
                model.eval()(batches[rank])  # evaluation decays nothing
            for table, values in all_tables(model, True).items():
                difference = float((values.double() - reference.tables[table]).abs().max())
                assert difference < (2e-6 if config.tables.name == "sgd" else 5e-5), (name, step, table, difference)
    return dict(repeated)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_update_is_equation_7_under_every_plan(world_size: int) -> None:
    for repeated in run_distributed(_formula, world_size):
        assert repeated["on all ranks"] > 20 and repeated["within one"] > 20


def _states(rank: int, world_size: int, folder: str, earlier: list[int]) -> None:
    """Counts are whole, exact and the same under every plan, and go from any plan and number of ranks to any other."""
    for number, (name, layout) in enumerate(PLANS.items()):
        model, plan = build(world_size, layout, optim(), sequence=True)
        optimizer = CombinedOptimizer(model, plan, optim(), total_steps=STEPS, mask=unmasked())
        pieces = optimizer.mini_batch_aware.pieces()
        count(optimizer, rank, world_size)
        state = assembled(pieces)
        assert set(state) == {"counts/user", "counts/item", "counts/clicked"}
        for table in ("user", "item", "clicked"):
            expected = occurrences(world_size, table)
            assert state[f"counts/{table}"][0].tolist() == [[expected[row]] for row in range(ROWS[table])], (
                name,
                table,
            )
        if rank == 0 and number == 0:
            torch.save(state, Path(folder) / f"{world_size}.pt")
        for other in earlier:
            saved = torch.load(Path(folder) / f"{other}.pt")
            load(pieces, saved)
            again = assembled(pieces)
            assert all(torch.equal(again[key][0], saved[key][0]) for key in saved)


def test_counts_are_exact_and_go_from_any_plan_and_number_of_ranks_to_any_other(tmp_path: Path) -> None:
    for number, world_size in enumerate((2, 1, 3)):
        run_distributed(_states, world_size, str(tmp_path), [2, 1][:number])


# A whole job.

JOB = ("model=din", "optim.tables.name=sgd", "optim.tables.mini_batch_l2=0.5", "optim.tables.lr=0.5")


def started(root: str, rank: int, world_size: int, overrides: list[str], *, counted: bool = True):
    config, layout, loader, built = built_job(root, rank, world_size, overrides)
    ranks = ranks_of(rank, world_size)
    _, manifest = build_train_loader(config.data, layout, config.batch_size, config.seed, ranks)
    if counted:
        count_ids(built.optimizer, config.data, layout, config.batch_size, manifest, ranks)
    return config, loader, built


def counts_of(built) -> dict[str, list[int]]:
    pieces = built.optimizer.mini_batch_aware.pieces()
    return {name: whole.flatten().tolist() for name, (whole, _) in assembled(pieces).items()}


def _trained(rank: int, world_size: int, root: str, plan: str) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    _, loader, built = started(root, rank, world_size, [*JOB, f"sharding.types=[{plan}]"])
    counts = counts_of(built)
    batches = batches_from(loader, Progress(), 8)
    curve(built, batches, 8)
    batches.close()
    return counts, {table.name: gather_table(built.task, table.name) for table in built.tables}


def _goes_on(rank: int, world_size: int, root: str, folder: str, plan: str) -> list[float]:
    """Steps 5 to 9, from the checkpoint of step 4 in ``folder``, or else on from a run that saves it there."""
    overrides, ranks = [*JOB, f"sharding.types=[{plan}]"], ranks_of(rank, world_size)
    saved = any(Path(folder).glob("step-*"))
    config, loader, built = started(root, rank, world_size, overrides, counted=not saved)
    progress = Progress()
    state = state_of(built, loader, ranks)
    checkpoints = Checkpoints(Path(folder), config.checkpoint, state, {}, ranks)
    if saved:
        facts = loading.load(newest_whole(Path(folder), "error", ranks), state, ranks)
        progress.load_state_dict(facts["progress"])
    batches = batches_from(loader, progress, 9)
    if not saved:
        for _ in range(4):
            progress.advance(built.pipeline.progress(batches).cursor)
        checkpoints.save(progress)
    losses = curve(built, batches, 5)
    batches.close()
    return losses


def _trained_and_gone_on(rank: int, world_size: int, root: str, folder: str, plan: str):
    first = _goes_on(rank, world_size, root, folder, plan)
    assert _goes_on(rank, world_size, root, folder, plan) == first
    return _trained(rank, world_size, root, plan), first


def test_a_job_counts_its_rows_trains_the_same_tables_and_goes_on_from_its_checkpoint(click_log, tmp_path) -> None:
    folder = str(tmp_path / "checkpoints")
    ((counts, tables), _), *_ = run_distributed(_trained_and_gone_on, 2, click_log, folder, "row_wise")
    ((alone, by_one), _), *_ = run_distributed(_trained_and_gone_on, 1, click_log, str(tmp_path / "own"), "table_wise")
    log = pq.read_table(Path(click_log) / "train").to_pydict()
    seen = Counter(i for name in ("clicked_categories", "category_id") for i in flat(log[name]))
    assert counts["counts/category"] == [seen[row] for row in range(20)]
    assert counts["counts/hour"] == [Counter(log["hour"])[row] for row in range(24)]
    assert alone == counts and sum(counts["counts/user"]) == len(log["hour"])
    for name, values in tables.items():
        torch.testing.assert_close(values, by_one[name], rtol=0, atol=1e-6)


def _counted(rank: int, world_size: int, root: str, overrides: list[str]) -> dict[str, list[int]]:
    return counts_of(started(root, rank, world_size, [*JOB, *overrides])[2])


def test_ids_of_rows_left_out_for_another_feature_are_not_counted(click_log) -> None:
    hours, prices = (pq.read_table(Path(click_log) / "train")[name].to_pylist() for name in ("hour", "price"))
    seen = Counter(hour for hour, price in zip(hours, prices, strict=True) if price is not None)
    assert 0 < seen.total() < len(hours)
    (counts,) = run_distributed(_counted, 1, click_log, ["data.schema.features.price.on_null=drop"])
    assert counts["counts/hour"] == [seen[row] for row in range(24)]


def test_a_run_counts_before_its_first_step_and_not_when_it_goes_on(click_log, tmp_path) -> None:
    first, second = (tiny.train(1, click_log, tmp_path / "run", *JOB, f"steps={steps}") for steps in (2, 3))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "Counting ids in 3,000 rows" in first.stderr
    assert "Counting ids" not in second.stderr and "Resumed from" in second.stderr


def flat(values: list) -> list[int]:
    return [i for value in values for i in (value if isinstance(value, list) else [value]) if i is not None]


# Mistakes.


def test_values_that_cannot_be_are_told_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"mini_batch_l2 is -0.1: it must not be negative"):
        TableOptimizerConfig(mini_batch_l2=-0.1)
    with pytest.raises(ValueError, match=r"mini_batch_l2 is nan"):
        TableOptimizerConfig(mini_batch_l2=float("nan"))
    with pytest.raises(ValueError, match=r"mini_batch_l2 is 3.0, which with lr=0.5 would .* give at most 2"):
        TableOptimizerConfig(lr=0.5, mini_batch_l2=3.0)
    with pytest.raises(ValueError, match=r"ftrl has mini_batch_l2=0.1.*use l2 instead"):
        TableOptimizerConfig("ftrl", mini_batch_l2=0.1)


def _data_parallel(rank: int, world_size: int) -> str:
    layout = ShardingConfig(["table_wise"], {"item": "data_parallel"})
    model, plan = build(world_size, layout, optim())
    with pytest.raises(ValueError) as caught:
        MiniBatchAware(fused_kernels(model), plan, unmasked())
    unregularised = [replace(table, optimizer=replace(table.optimizer, mini_batch_l2=0.0)) for table in plan]
    MiniBatchAware(fused_kernels(model), unregularised, unmasked())
    return str(caught.value)


def test_a_data_parallel_table_is_refused() -> None:
    (message,) = run_distributed(_data_parallel, 1)
    assert message.startswith("table 'item' is data_parallel and has mini_batch_l2=0.9") and "\n" not in message
    assert "sharding.by_table.item" in message
