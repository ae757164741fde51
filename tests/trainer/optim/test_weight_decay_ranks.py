"""Weight decay of tables, of touched rows and of all, against closed forms in float64, on one rank and two."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_distributed
from tests.helpers.reference_optimizers import DENSE, STEPS, Closed, Reference, train
from tests.helpers.tables import LAYOUTS, all_tables, build, everywhere, make_batch, unmasked
from trainer.config.optim import OptimConfig, TableOptimizerConfig
from trainer.optim.combined import CombinedOptimizer

DECAY = 0.3
TOUCHED = [
    (TableOptimizerConfig(name, lr=0.3, weight_decay=DECAY), layout, "touched")
    for name in ("sgd", "adagrad", "rowwise_adagrad")
    for layout in ("table_wise", "row_wise")
]
ALL = [
    (TableOptimizerConfig(name, lr=0.05, eps=1e-3, weight_decay=DECAY, weight_decay_rows="all"), "data_parallel", "all")
    for name in ("sgd", "adagrad", "rowwise_adagrad", "adam")
]


class Decayed(Closed):
    """Touched rows shrink beside the optimizer's step; an L2 term of all rows is part of every gradient. Wide tables, by SGD,
    are not decayed."""

    def __init__(self, config: TableOptimizerConfig) -> None:
        super().__init__(replace(config, weight_decay=0.0))
        self.rows = config.weight_decay_rows
        self.moments: dict[str, list[Tensor]] = {}

    def __call__(self, table: str, weights: Tensor, gradient: Tensor) -> None:
        if table.startswith("wide_"):
            return super().__call__(table, weights, gradient)
        if self.rows == "all":
            gradient = gradient + DECAY * weights
        else:
            weights[gradient.any(1)] *= 1 - self.config.lr * DECAY
        if self.config.name == "adam":
            return self._adam(table, weights, gradient)
        return super().__call__(table, weights, gradient)

    def _adam(self, table: str, weights: Tensor, gradient: Tensor) -> None:
        c = self.config
        m, v, step = self.moments.setdefault(
            table, [torch.zeros_like(weights), torch.zeros_like(weights), torch.zeros(())]
        )
        step += 1
        m.lerp_(gradient, 1 - c.beta1)
        v.lerp_(gradient.square(), 1 - c.beta2)
        weights -= c.lr * (m / (1 - c.beta1**step)) / ((v / (1 - c.beta2**step)).sqrt() + c.eps)


def _decays(rank: int, world_size: int) -> None:
    for config, layout, rows in [*TOUCHED, *ALL]:
        optim = OptimConfig(tables=config, wide=TableOptimizerConfig("sgd", lr=config.lr), dense=DENSE)
        sequence = rows == "touched"
        model, plan = build(world_size, LAYOUTS.get(layout) or everywhere(layout), optim, sequence=sequence)
        before = all_tables(model, sequence)
        reference = Reference(before, Decayed(config), sequence)
        optimizer = CombinedOptimizer(model, plan, optim, total_steps=STEPS, mask=unmasked())
        train(model, optimizer, rank, world_size, range(STEPS))
        for step in range(STEPS):
            reference.step([make_batch(r, world_size, step) for r in range(world_size)])
        for table, values in all_tables(model, sequence).items():
            difference = float((values.double() - reference.tables[table].detach()).abs().max())
            assert difference < 5e-5, (config.name, layout, table, difference)
            if not table.startswith("wide_"):
                assert rows == "touched" or not (values == before[table]).all(1).any(), (config.name, table)


@pytest.mark.parametrize("world_size", [1, 2])
def test_weight_decay_is_the_closed_form_of_touched_rows_and_of_all(world_size: int) -> None:
    run_distributed(_decays, world_size)
