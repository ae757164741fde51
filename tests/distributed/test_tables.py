"""Fused and data-parallel table updates against closed forms in float64, through the training pipeline on several
ranks. (What is saved of them: ``test_pieces``.)"""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from data_loaders.batch import Batch
from tests.distributed.helper import run_distributed
from tests.distributed.test_sharding import (
    CPU,
    LAYOUTS,
    TOP_WEIGHT,
    all_tables,
    build,
    everywhere,
    make_batch,
    reference_loss,
)
from trainer.config.optim import DenseOptimizerConfig, OptimConfig, TableOptimizerConfig
from trainer.optim.combined import CombinedOptimizer

STEPS = 4
DENSE = DenseOptimizerConfig("sgd", lr=0.1)
Update = Callable[[str, Tensor, Tensor], None]  # table, weights, gradient: in place


class Reference:
    """The tiny model in float64 on the global batch, its tables updated by ``update``, its dense layer by SGD."""

    def __init__(self, tables: Mapping[str, Tensor], update: Update, sequence: bool) -> None:
        self.tables = {name: table.double().requires_grad_() for name, table in tables.items()}
        self.top = TOP_WEIGHT.double().requires_grad_()
        self.update, self.sequence = update, sequence

    def step(self, batches: list[Batch]) -> float:
        losses = [reference_loss(self.tables, self.top, batch, self.sequence) for batch in batches]
        loss = torch.stack(losses).mean()  # equal batches: the mean over ranks is that over the global batch
        names = list(self.tables)
        gradients = torch.autograd.grad(loss, [*(self.tables[name] for name in names), self.top])
        with torch.no_grad():
            for name, gradient in zip(names, gradients, strict=False):
                self.update(name, self.tables[name], gradient)
            self.top -= DENSE.lr * gradients[-1]
        return float(loss)


def train(
    model: DistributedModelParallel, optimizer: CombinedOptimizer, rank: int, world_size: int, steps: range
) -> None:
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU, execute_all_batches=True)
    batches = iter([make_batch(rank, world_size, step) for step in steps])
    model.train()
    for _ in steps:
        pipeline.progress(batches)
    pipeline.detach()


class Closed:
    """The formulas of ``trainer.optim.tables``, with their state, for all tables but the wide ones (SGD there)."""

    def __init__(self, config: TableOptimizerConfig, cut: Mapping[str, int] | None = None) -> None:
        self.config, self.cut = config, cut or {}
        self.sums: dict[str, Tensor] = {}

    def __call__(self, table: str, weights: Tensor, gradient: Tensor) -> None:
        c = self.config
        if c.name == "sgd" or table.startswith("wide_"):
            weights -= c.lr * gradient
            return
        squares = gradient.square()
        if c.name == "rowwise_adagrad":  # one mean for each part of a row
            width = self.cut.get(table, squares.shape[1])
            squares = squares.unflatten(1, (-1, width)).mean(2).repeat_interleave(width, dim=1)
        self.sums[table] = self.sums.get(table, torch.zeros_like(squares)) + squares
        weights -= c.lr * gradient / (self.sums[table].sqrt() + c.eps)


HALVES = {"user": 4, "item": 8, "clicked": 4}
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
    "sgd, data-parallel": (TableOptimizerConfig("sgd", lr=0.5), everywhere("data_parallel"), {}),
    "adagrad, data-parallel": (TableOptimizerConfig("adagrad", lr=0.3), everywhere("data_parallel"), {}),
    "rowwise_adagrad, data-parallel": (TableOptimizerConfig(lr=0.3), everywhere("data_parallel"), {}),
}


def _updates(rank: int, world_size: int) -> float:
    """Every case on these ranks; the largest difference from the closed form."""
    largest = 0.0
    for name, (config, layout, cut) in CASES.items():
        sequence = "data-parallel" not in name
        optim = OptimConfig(tables=config, wide=TableOptimizerConfig("sgd", lr=config.lr), dense=DENSE)
        model, plan = build(world_size, layout, optim, sequence=sequence)
        reference = Reference(all_tables(model, sequence), Closed(config, cut), sequence)
        optimizer = CombinedOptimizer(model, plan, optim, total_steps=STEPS)
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


@pytest.mark.parametrize("world_size", [1, 2])
def test_table_updates_are_the_closed_forms(world_size: int) -> None:
    assert max(run_distributed(_updates, world_size)) > 0
