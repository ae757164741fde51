"""Fused and data-parallel table updates against closed forms in float64, through the training pipeline on several
ranks. (What is saved of them: ``test_pieces``.)"""

import pytest

from tests.helpers.compiled import compiled_kernels
from tests.helpers.ranks import run_distributed
from tests.helpers.reference_optimizers import DENSE, HALVES, STEPS, Closed, Reference, train
from tests.helpers.tables import LAYOUTS, all_tables, build, everywhere, make_batch, unmasked
from trainer.config.optim import OptimConfig, TableOptimizerConfig
from trainer.optim.combined import CombinedOptimizer

CASES = {
    "sgd, table-wise": (TableOptimizerConfig("sgd", lr=0.5), LAYOUTS["table_wise"], {}),
    "sgd, row-wise": (TableOptimizerConfig("sgd", lr=0.5), LAYOUTS["row_wise"], {}),
    "adagrad, table-wise": (TableOptimizerConfig("adagrad", lr=0.3), LAYOUTS["table_wise"], {}),
    "adagrad, row-wise": (TableOptimizerConfig("adagrad", lr=0.3), LAYOUTS["row_wise"], {}),
    "adagrad, column-wise": (TableOptimizerConfig("adagrad", lr=0.3), LAYOUTS["column_wise"], {}),
    "rowwise_adagrad, table-wise": (TableOptimizerConfig(lr=0.3), LAYOUTS["table_wise"], {}),
    "rowwise_adagrad, row-wise": (TableOptimizerConfig(lr=0.3), LAYOUTS["row_wise"], {}),
    "rowwise_adagrad, mixed": (TableOptimizerConfig(lr=0.3, eps=0.1), LAYOUTS["mixed"], {}),
    "rowwise_adagrad, column-wise": (TableOptimizerConfig(lr=0.3), LAYOUTS["column_wise"], HALVES),
    "adam, table-wise": (TableOptimizerConfig("adam", lr=0.1, eps=1e-3), LAYOUTS["table_wise"], {}),
    "adam, row-wise": (TableOptimizerConfig("adam", lr=0.1, eps=1e-3, beta1=0.5), LAYOUTS["row_wise"], {}),
    "adam, column-wise": (TableOptimizerConfig("adam", lr=0.1, eps=1e-3, beta2=0.9), LAYOUTS["column_wise"], {}),
    "sgd, data-parallel": (TableOptimizerConfig("sgd", lr=0.5), everywhere("data_parallel"), {}),
    "adagrad, data-parallel": (TableOptimizerConfig("adagrad", lr=0.3), everywhere("data_parallel"), {}),
    "rowwise_adagrad, data-parallel": (TableOptimizerConfig(lr=0.3), everywhere("data_parallel"), {}),
}


def _updates(rank: int, world_size: int, compiled: bool) -> float:
    """Every case on these ranks; the largest difference from the closed form."""
    largest = 0.0
    for name, (config, layout, cut) in CASES.items():
        sequence = "data-parallel" not in name
        optim = OptimConfig(tables=config, wide=TableOptimizerConfig("sgd", lr=config.lr), dense=DENSE)
        model, plan = build(world_size, layout, optim, sequence=sequence, compiled=compiled)
        reference = Reference(all_tables(model, sequence), Closed(config, cut), sequence)
        optimizer = CombinedOptimizer(model, plan, optim, total_steps=STEPS, mask=unmasked())
        train(model, optimizer, rank, world_size, range(STEPS))
        for step in range(STEPS):
            reference.step([make_batch(r, world_size, step) for r in range(world_size)])
        for table, values in all_tables(model, sequence).items():
            difference = float((values.double() - reference.tables[table]).abs().max())
            # AdaGrad's first steps divide a gradient by itself, and so magnify what cancellation left of it.
            assert difference < (2e-6 if config.name == "sgd" else 5e-5), (name, table, difference)
            largest = max(largest, difference)
        top = next(p for n, p in model.named_parameters() if n.endswith("top.weight")).detach().double()
        assert float((top.flatten() - reference.top.detach()).abs().max()) < 5e-5, name
    return largest


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=compiled_kernels)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_table_updates_are_the_closed_forms(world_size: int, compiled: bool) -> None:
    assert max(run_distributed(_updates, world_size, compiled)) > 0
