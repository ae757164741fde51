"""The row clock: the last step of each row by a plain count, on every kind of sharding, and what interval decay makes of it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.model_states import LAYOUTS, assembled
from tests.helpers.ranks import run_distributed
from tests.helpers.reference_optimizers import DENSE, Reference, train
from tests.helpers.tables import DIMS, FEATURES, ROWS, all_tables, build, make_batch, unmasked
from trainer.config.optim import OptimConfig, TableOptimizerConfig
from trainer.config.sharding import ShardingConfig
from trainer.optim.combined import CombinedOptimizer

STEPS, EARLIER = 4, 100
ALPHA = 0.3  # so that a row that slept four steps is gone


def ids_of(rank: int, world_size: int, step: int, table: str) -> list[int]:
    batch = make_batch(rank, world_size, step)
    jagged = [(batch.sequence if key == "clicks" else batch.sparse)[key] for key in FEATURES[table]]
    return [i for each in jagged for i in each.values().tolist()]


def expected(world_size: int, table: str, steps: int = STEPS) -> Tensor:
    last = torch.zeros(ROWS[table], 1, dtype=torch.int32)
    for step in range(steps):
        for rank in range(world_size):
            for i in ids_of(rank, world_size, step, table):
                last[i] = EARLIER + step + 1
    return last


def optim(**of_tables: float) -> OptimConfig:
    rows = TableOptimizerConfig("sgd", lr=0.5)
    return OptimConfig(tables=replace(rows, **of_tables), wide=rows, dense=DENSE)


def optimizer_of(model, plan, config: OptimConfig) -> CombinedOptimizer:
    made = CombinedOptimizer(model, plan, config, total_steps=STEPS, mask=unmasked())
    made.restore(0, clock_steps=EARLIER)
    return made


def _counts(rank: int, world_size: int) -> None:
    for name, sharding in LAYOUTS.items():
        model, plan = build(world_size, sharding, optim(), sequence=True)
        optimizer = optimizer_of(model, plan, optim())
        train(model, optimizer, rank, world_size, range(STEPS))
        with torch.no_grad():
            model.eval()(make_batch(rank, world_size, STEPS))  # evaluation trains nothing
        found = assembled(optimizer.pieces())
        for table in DIMS:
            assert torch.equal(found[f"clock/{table}"][0], expected(world_size, table)), (name, table)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_row_has_the_last_step_of_its_id_on_every_plan(world_size: int) -> None:
    assert any(len(expected(world_size, table).unique()) > 1 for table in DIMS), "rows should differ"
    run_distributed(_counts, world_size)


def _off(rank: int, world_size: int) -> list[str]:
    """One table of a kernel without a clock."""
    config = replace(optim(), by_table={"user": replace(optim().tables, clock=False)})
    model, plan = build(world_size, ShardingConfig(["table_wise"]), config, sequence=True)
    optimizer = optimizer_of(model, plan, config)
    train(model, optimizer, rank, world_size, range(STEPS))
    found = assembled(optimizer.pieces())
    for table in set(DIMS) - {"user"}:
        assert torch.equal(found[f"clock/{table}"][0], expected(world_size, table)), table
    return sorted(found)


def test_a_table_can_do_without() -> None:
    assert "clock/user" not in run_distributed(_off, 1)[0]


class Decayed:
    """w -= lr g after w *= 1 - min(1, α n), row by row."""

    def __init__(self, config: OptimConfig, world_size: int) -> None:
        self.config, self.world_size, self.step = config, world_size, 0

    def __call__(self, table: str, weights: Tensor, gradient: Tensor) -> None:
        config: TableOptimizerConfig = self.config.of_table(table, wide=table.startswith("wide_"))
        before = expected(self.world_size, table, self.step)
        for row in {i for rank in range(self.world_size) for i in ids_of(rank, self.world_size, self.step, table)}:
            last = int(before[row])
            slept = EARLIER + self.step + 1 - last if last else 0
            weights[row] *= 1 - min(1.0, config.interval_decay * slept)
        weights -= config.lr * gradient


def _decays(rank: int, world_size: int) -> None:
    wide = dict.fromkeys(("wide_user", "wide_item"), "table_wise")
    for kind in ("table_wise", "row_wise", "column_wise"):
        config = optim(interval_decay=ALPHA)
        model, plan = build(world_size, ShardingConfig([kind], wide), config, sequence=True)
        update = Decayed(config, world_size)
        reference = Reference(all_tables(model, True), update, True)
        optimizer = optimizer_of(model, plan, config)
        for step in range(STEPS):
            update.step = step
            reference.step([make_batch(each, world_size, step) for each in range(world_size)])
            train(model, optimizer, rank, world_size, range(step, step + 1))
            for table, values in all_tables(model, True).items():
                difference = float((values.double() - reference.tables[table]).abs().max())
                assert difference < 2e-6, (kind, step, table, difference)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_row_forgets_by_the_steps_that_it_slept(world_size: int) -> None:
    run_distributed(_decays, world_size)
