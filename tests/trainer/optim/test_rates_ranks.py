"""Learning rates of tables over a run, on one and two ranks, against closed forms in float64: each table's own schedule, and
what a plateau takes off all rates half-way, of fused, data-parallel and FTRL tables."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.helpers.ranks import run_distributed
from tests.helpers.reference_optimizers import DENSE, Reference
from tests.helpers.tables import CPU, LAYOUTS, all_tables, build, everywhere, make_batch, unmasked
from trainer.config.optim import OptimConfig, ScheduleConfig, TableOptimizerConfig
from trainer.optim.combined import CombinedOptimizer
from trainer.optim.dense import schedule_factor
from trainer.optim.ftrl import ftrl_update
from trainer.optim.rates import check_schedules
from trainer.sharding.table_plan import embedding_tables

STEPS, REDUCED_AT, REDUCTION = 6, 3, 0.25
WARM = ScheduleConfig(warmup_steps=2, decay="cosine", final=0.1)
FALLING = ScheduleConfig(decay="linear")
SGD = TableOptimizerConfig("sgd", lr=0.5, schedule=WARM)
OPTIM = OptimConfig(
    tables=SGD,
    by_table={"item": TableOptimizerConfig("sgd", lr=0.4, schedule=FALLING)},
    wide=TableOptimizerConfig("ftrl", lr=0.4, beta=0.5, l1=0.06, l2=0.1),
    dense=replace(DENSE, schedule=ScheduleConfig(decay="linear")),
)
WITHOUT_FTRL = replace(OPTIM, wide=SGD)
CASES = {
    "table-wise": (OPTIM, LAYOUTS["table_wise"]),
    "row-wise": (OPTIM, LAYOUTS["row_wise"]),
    "data-parallel": (WITHOUT_FTRL, everywhere("data_parallel")),
}


class AtRates:
    """Every table by the rate of the step; ``step`` and ``reduction`` are set from outside."""

    def __init__(self, optim: OptimConfig) -> None:
        self.optim, self.step, self.reduction = optim, 0, 1.0

    def __call__(self, table: str, weights: Tensor, gradient: Tensor) -> None:
        config = self.optim.of_table(table, wide=table.startswith("wide_"))
        if config.name == "ftrl":
            weights[:, 3] = -gradient[:, 0]
            weights.copy_(ftrl_update(weights, replace(config, lr=config.lr * self.reduction)))
        else:
            weights -= config.lr * schedule_factor(config.schedule, self.step, STEPS) * self.reduction * gradient


class AtDenseRates(Reference):
    def step(self, batches) -> float:
        factor = schedule_factor(OPTIM.dense.schedule, self.update.step, STEPS) * self.update.reduction
        before = self.top.detach().clone()
        loss = super().step(batches)
        with torch.no_grad():  # the whole step was made: take the part of the rate
            self.top.copy_(before + factor * (self.top - before))
        self.update.step += 1
        return loss


def _train(rank: int, world_size: int) -> int:
    zeros = 0
    for name, (optim, layout) in CASES.items():
        sequence = "data-parallel" not in name
        model, plan = build(world_size, layout, optim, sequence=sequence)
        reference = AtDenseRates(all_tables(model, sequence), AtRates(optim), sequence)
        optimizer = CombinedOptimizer(model, plan, optim, total_steps=STEPS, mask=unmasked())
        pipeline = TrainPipelineSparseDist(model, optimizer, CPU, execute_all_batches=True)
        batches = iter([make_batch(rank, world_size, step) for step in range(STEPS)])
        for step in range(STEPS):
            if step == REDUCED_AT:
                before = all_tables(model, sequence)
                optimizer.reduce_rates(REDUCTION)
                for table, values in all_tables(model, sequence).items():
                    assert torch.equal(values[:, 0], before[table][:, 0]), table  # no weight has moved
                    if table.startswith("wide_") and sequence:
                        _change_alpha(reference.tables[table], optim.wide, REDUCTION)
                reference.update.reduction = REDUCTION
            pipeline.progress(batches)
            reference.step([make_batch(r, world_size, step) for r in range(world_size)])
        for table, values in all_tables(model, sequence).items():
            difference = (values.double() - reference.tables[table].detach()).abs().max()
            assert difference < 5e-6, (name, table, difference)
            zeros += table.startswith("wide_") and int((values[:, 0] == 0).sum())
        top = next(p for n, p in model.named_parameters() if n.endswith("top.weight")).detach().double()
        assert float((top.flatten() - reference.top.detach()).abs().max()) < 1e-5, name
    return zeros


def _change_alpha(rows: Tensor, config: TableOptimizerConfig, reduction: float) -> None:
    """The z with which FTRL's closed form gives the same w under the new rate (exactly 0 stays within l1)."""
    with torch.no_grad():
        w, z, n = rows[:, 0].clone(), rows[:, 1].clone(), rows[:, 2]
        slope = (config.beta + n.sqrt()) / (config.lr * reduction) + config.l2
        sign = z.sign() * config.l1
        rows[:, 1] = torch.where(w != 0, sign - w * slope, z)


@pytest.mark.parametrize("world_size", [1, 2])
def test_tables_learn_at_the_rates_of_their_schedules_and_of_a_plateau(world_size: int) -> None:
    assert min(run_distributed(_train, world_size)) > 0


def test_tables_that_share_a_kernel_share_a_schedule() -> None:
    from tests.helpers.two_collections import TwoCollections

    def check(optim: OptimConfig, *, plateau: bool = False) -> None:
        check_schedules(embedding_tables(TwoCollections(), optim), plateau=plateau)

    same_rate = OptimConfig(tables=SGD, by_table={"item": replace(SGD, schedule=FALLING)})
    with pytest.raises(ValueError, match="'user' and 'item' have the same optimizer and lr=0.5.*such as 0.50005"):
        check(same_rate)
    check(replace(same_rate, by_table={"item": replace(SGD, lr=0.4, schedule=FALLING)}))
    # FTRL's tables collect gradients by SGD of rate 1, which no plateau may change.
    ftrl = OptimConfig(tables=TableOptimizerConfig("sgd", lr=1.0), wide=TableOptimizerConfig("ftrl"))
    check(ftrl)
    with pytest.raises(ValueError, match="give one of them another lr"):
        check(ftrl, plateau=True)
