"""Fused and data-parallel table updates against closed forms in float64, and a checkpoint of all optimizer state,
through the training pipeline on several ranks."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
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
from trainer.config import DenseOptimizerConfig, OptimConfig, ScheduleConfig, ShardingConfig, TableOptimizerConfig
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


# A checkpoint.

OPTIM = OptimConfig(
    tables=TableOptimizerConfig("rowwise_adagrad", lr=0.3),
    wide=TableOptimizerConfig("ftrl", lr=0.5, l1=0.05),
    by_table={"item": TableOptimizerConfig("adagrad", lr=0.2)},
    dense=DenseOptimizerConfig("adam", lr=0.1, clip_norm=0.05, schedule=ScheduleConfig(warmup_steps=2, decay="cosine")),
)
ROW_WISE, TABLE_WISE = ["row_wise"], ["table_wise"]
HERE = ShardingConfig(ROW_WISE, {"item": "data_parallel", "wide_item": "table_wise", "clicked": "table_wise"})
THERE = ShardingConfig(TABLE_WISE, {"item": "data_parallel", "wide_item": "row_wise", "clicked": "row_wise"})
TOTAL = 5


def _save_and_go_on(rank: int, world_size: int, folder: str) -> dict[str, object]:
    model, plan = build(world_size, HERE, OPTIM, sequence=True)
    optimizer = CombinedOptimizer(model, plan, OPTIM, total_steps=TOTAL)
    keys = sorted(optimizer.state_dict())
    train(model, optimizer, rank, world_size, range(3))
    assert sorted(optimizer.state_dict()) == keys
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    saved = _everything(model, optimizer)
    train(model, optimizer, rank, world_size, range(3, TOTAL))
    final = _everything(model, optimizer)

    resumed_model, resumed = _load(world_size, HERE, folder)
    assert resumed.steps == 3
    _assert_equal(_everything(resumed_model, resumed), saved)
    train(resumed_model, resumed, rank, world_size, range(3, TOTAL))
    _assert_equal(_everything(resumed_model, resumed), final)

    _assert_equal(_everything(*_load(world_size, THERE, folder)), saved)
    return {"keys": keys, "saved": saved}


def _load_alone(rank: int, world_size: int, folder: str) -> dict[str, Tensor]:
    return _everything(*_load(world_size, ShardingConfig(by_table={"item": "data_parallel"}), folder))


def _load(world_size: int, layout: ShardingConfig, folder: str) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """A fresh model with other values, whose optimizer never stepped, loaded."""
    model, plan = build(world_size, layout, OPTIM, sequence=True, seed=77)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("top.weight")).fill_(9.0)
    optimizer = CombinedOptimizer(model, plan, OPTIM, total_steps=TOTAL)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer


def _everything(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> dict[str, Tensor]:
    """All values of model and optimizer, whole, on every rank."""
    found: dict[str, Tensor] = {}
    for name, value in {**model.state_dict(), **optimizer.state_dict()}.items():
        if not isinstance(value, ShardedTensor):
            found[name] = value.detach().clone()
            continue
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, [(s.tensor.clone(), s.metadata.shard_offsets) for s in value.local_shards()])
        whole = torch.full(tuple(value.size()), math.nan)
        for tensor, offsets in (shard for part in parts for shard in part):
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))] = tensor
        found[name] = whole
    return found


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_checkpoint_holds_all_optimizer_state_bitwise(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    first, second = run_distributed(_save_and_go_on, 2, folder)
    assert (
        first["keys"]
        == second["keys"]
        == [
            "dense.head.top.weight.exp_avg",
            "dense.head.top.weight.exp_avg_sq",
            "dense.head.top.weight.step",
            "steps",
            "tables.bags.embedding_bags.item.weight.step",
            "tables.bags.embedding_bags.item.weight.sum",
            "tables.bags.embedding_bags.user.weight.momentum1",
            "tables.sequences.embeddings.clicked.weight.momentum1",
        ]
    )
    saved = first["saved"]
    assert saved["bags.embedding_bags.wide_user.weight"][:, 2].any()  # FTRL's sums are in the table
    assert saved["tables.bags.embedding_bags.user.weight.momentum1"].any()
    assert int(saved["steps"]) == 3 and float(saved["dense.head.top.weight.step"]) == 3.0
    _assert_equal(run_distributed(_load_alone, 1, folder)[0], saved)


def _refusal(rank: int, world_size: int) -> str:
    model, plan = build(world_size, HERE, OPTIM, sequence=True)
    optimizer = CombinedOptimizer(model, plan, OPTIM, total_steps=TOTAL)
    with pytest.raises(ValueError) as caught:
        optimizer.load_state_dict({**optimizer.state_dict(), "dense.gone.exp_avg": torch.zeros(1)})
    return str(caught.value)


def test_state_that_does_not_fit_is_refused() -> None:
    assert "unknown ['dense.gone.exp_avg']" in run_distributed(_refusal, 1)[0]
