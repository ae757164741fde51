"""Table optimizers, written once more in NumPy."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from data_loaders.batch import Batch
from tests.helpers.tables import CPU, TOP_WEIGHT, make_batch, reference_loss
from trainer.config.optim import DenseOptimizerConfig, TableOptimizerConfig
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


class Moments:
    """Adam's of a table, of the rows that a step touches."""

    def __init__(self, weights: Tensor) -> None:
        self.first, self.second, self.steps = torch.zeros_like(weights), torch.zeros_like(weights), 0

    def step(self, c: TableOptimizerConfig, weights: Tensor, gradient: Tensor) -> None:
        self.steps += 1
        rows = gradient.any(1)
        self.first[rows] += (1 - c.beta1) * (gradient - self.first)[rows]
        self.second[rows] += (1 - c.beta2) * (gradient.square() - self.second)[rows]
        root = (self.second / (1 - c.beta2**self.steps)).sqrt()
        weights -= torch.where(rows.unsqueeze(1), c.lr / (1 - c.beta1**self.steps) * self.first / (root + c.eps), 0)


class Closed:
    """The formulas of ``trainer.optim.tables``, with their state, for all tables but the wide ones (SGD there)."""

    def __init__(self, config: TableOptimizerConfig, cut: Mapping[str, int] | None = None) -> None:
        self.config, self.cut = config, cut or {}
        self.sums: dict[str, Tensor] = {}
        self.moments: dict[str, Moments] = {}

    def __call__(self, table: str, weights: Tensor, gradient: Tensor) -> None:
        c = self.config
        if c.name == "sgd" or table.startswith("wide_"):
            weights -= c.lr * gradient
            return
        if c.name == "adam":
            self.moments.setdefault(table, Moments(weights)).step(c, weights, gradient)
            return
        squares = gradient.square()
        if c.name == "rowwise_adagrad":  # one mean for each part of a row
            width = self.cut.get(table, squares.shape[1])
            squares = squares.unflatten(1, (-1, width)).mean(2).repeat_interleave(width, dim=1)
        self.sums[table] = self.sums.get(table, torch.zeros_like(squares)) + squares
        weights -= c.lr * gradient / (self.sums[table].sqrt() + c.eps)


HALVES = {"user": 4, "item": 8, "clicked": 4}
