"""FTRL on sharded tables against the same model trained in float64, through the training pipeline."""

import pytest
import torch
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.helpers.compiled import compiled_kernels
from tests.helpers.ranks import run_distributed
from tests.helpers.reference_optimizers import DENSE, Reference
from tests.helpers.tables import CPU, LAYOUTS, all_tables, build, make_batch, unmasked
from trainer.config.optim import OptimConfig, TableOptimizerConfig
from trainer.optim.combined import CombinedOptimizer
from trainer.optim.ftrl import ftrl_update
from trainer.sharding.kernels import fused_kernels

STEPS = 6
FTRL = TableOptimizerConfig("ftrl", lr=0.4, beta=0.5, l1=0.06, l2=0.1)
# SGD of rate 1 is what FTRL's tables have, too: FBGEMM then keeps tables of width 4 and 8 in one kernel.
ONE_KERNEL = OptimConfig(tables=TableOptimizerConfig("sgd", lr=1.0), wide=FTRL, dense=DENSE)
OWN_KERNEL = OptimConfig(tables=TableOptimizerConfig("sgd", lr=0.5), wide=FTRL, dense=DENSE)
CASES = {
    "one kernel, table-wise": (ONE_KERNEL, LAYOUTS["table_wise"]),
    "one kernel, row-wise": (ONE_KERNEL, LAYOUTS["row_wise"]),
    "own kernel, table-wise": (OWN_KERNEL, LAYOUTS["table_wise"]),
    "own kernel, row-wise": (OWN_KERNEL, LAYOUTS["row_wise"]),
    "own kernel, mixed": (OWN_KERNEL, LAYOUTS["mixed"]),
}


def _update(optim: OptimConfig):
    def update(table: str, weights: Tensor, gradient: Tensor) -> None:
        if table.startswith("wide_"):
            weights[:, 3] = -gradient[:, 0]  # the reference reads slot 0, so its gradient is there
            weights.copy_(ftrl_update(weights, FTRL))  # itself checked against the paper in tests/trainer/optim
        else:
            weights -= optim.tables.lr * gradient

    return update


def _train(rank: int, world_size: int, compiled: bool) -> dict[str, object]:
    found: dict[str, object] = {"zeros": 0, "weights": 0, "mixed kernels": 0}
    for name, (optim, layout) in CASES.items():
        model, plan = build(world_size, layout, optim, sequence=True, compiled=compiled)
        reference = Reference(all_tables(model, True), _update(optim), True)
        optimizer = CombinedOptimizer(model, plan, optim, total_steps=STEPS, mask=unmasked())
        for _, shards in fused_kernels(model):
            widths = [shard.local_cols for shard in shards if len(shards) > 1]
            found["mixed kernels"] += 4 in widths and 8 in widths
        pipeline = TrainPipelineSparseDist(model, optimizer, CPU, execute_all_batches=True)
        batches = iter([make_batch(rank, world_size, step) for step in range(STEPS)])
        for step in range(STEPS):
            pipeline.progress(batches)
            reference.step([make_batch(r, world_size, step) for r in range(world_size)])
            tables = all_tables(model, True)
            for table, values in tables.items():
                difference = (values.double() - reference.tables[table].detach()).abs().max()
                assert difference < 3e-6, (name, table, difference)
            if step == 2:
                _evaluate(model, pipeline, rank, world_size, tables)
                assert not any(kernel.lookups for kernel in optimizer._ftrl._kernels)
        for table in ("wide_user", "wide_item"):
            touched = tables[table][:, 2] > 0
            found["weights"] += int((tables[table][touched, 0] != 0).sum())
            found["zeros"] += int((tables[table][touched, 0] == 0).sum())
            assert not tables[table][:, 3].any()
    return found


def _evaluate(model, pipeline, rank: int, world_size: int, before: dict[str, Tensor]) -> None:
    """A forward pass in evaluation, between two training steps whose inputs are under way, touches nothing."""
    pipeline.detach()
    model.eval()
    with torch.no_grad():
        model(make_batch(rank, world_size, 99))
    model.train()
    pipeline.attach(sparse_dist=False)
    for table, values in all_tables(model, True).items():
        assert torch.equal(values, before[table]), table


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=compiled_kernels)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sharded_ftrl_is_the_dense_reference(world_size: int, compiled: bool) -> None:
    for found in run_distributed(_train, world_size, compiled):
        assert found["zeros"] > 0 and found["weights"] > 0
    if world_size == 1:
        assert found["mixed kernels"] == 2
