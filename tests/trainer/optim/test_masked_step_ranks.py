"""A step whose loss is NaN on one rank changes nothing on any: training is bit by bit what it would be without that batch, for
every optimizer, those included that move at a gradient of zero."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.ranks import run_distributed
from tests.helpers.tables import CPU, LAYOUTS, all_tables, build, everywhere, make_batch
from trainer.config.optim import DenseOptimizerConfig, OptimConfig, TableOptimizerConfig
from trainer.optim.combined import CombinedOptimizer
from trainer.runtime.distributed import all_reduce_sum
from trainer.runtime.step_mask import StepMask
from trainer.sharding.pipeline import StepPipeline

BAD = 2  # the step whose loss is NaN
ADAM = DenseOptimizerConfig("adam", lr=0.1)


def touched(name, **keys):
    return TableOptimizerConfig(name, lr=0.3, **keys)


def everywhere_decayed(name):
    return touched(name, weight_decay=0.1, weight_decay_rows="all")


TABLES = {
    "sgd": (touched("sgd"), "table_wise"),
    "adagrad": (touched("adagrad"), "row_wise"),
    "rowwise_adagrad": (touched("rowwise_adagrad"), "column_wise"),
    "rowwise_adagrad, mixed": (touched("rowwise_adagrad"), "mixed"),
    "adam": (touched("adam"), "row_wise"),
    "adam with decay of touched rows": (touched("adam", weight_decay=0.1), "column_wise"),
    "decay of touched rows": (touched("sgd", weight_decay=0.1), "row_wise"),
    "mini-batch aware": (touched("adagrad", mini_batch_l2=0.5), "table_wise"),
    "data-parallel adam": (everywhere_decayed("adam"), "data_parallel"),
    "data-parallel adagrad": (everywhere_decayed("adagrad"), "data_parallel"),
    "data-parallel rowwise_adagrad": (touched("rowwise_adagrad"), "data_parallel"),
}
DENSE = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adam": {"amsgrad": True},
    "adamw": {},
    "adagrad": {},
    "rmsprop": {"momentum": 0.9, "centered": True},
    "adamax": {},
    "nadam": {},
    "radam": {},
    "adadelta": {},
}


def trained(rank, world_size, optim, layout, *, bad):
    """Tables, dense layers and states after four steps; a fifth among them has a NaN label on the last rank where ``bad``."""
    sharding = LAYOUTS.get(layout) or everywhere(layout)
    sequence = layout != "data_parallel"
    model, plan = build(world_size, sharding, optim, sequence=sequence)
    mask = StepMask(CPU)
    optimizer = CombinedOptimizer(model, plan, optim, total_steps=9, mask=mask)
    batches = [make_batch(rank, world_size, step) for step in range(4)]
    if bad:
        spoilt = make_batch(rank, world_size, 9)
        batches.insert(BAD, replace(spoilt, labels=spoilt.labels + (float("nan") if rank == world_size - 1 else 0.0)))

    def between(batch, outputs):
        mask.set(all_reduce_sum((batch.labels * 0).sum()))
        skipped.append(bool(mask.skip))

    skipped = []
    pipeline, data = StepPipeline(model, optimizer, CPU), iter(batches)
    model.train()
    for _ in batches:
        pipeline.step(data, between)
        if skipped[-1]:
            optimizer.restore(optimizer.steps - 1)  # the count, by which an average's rate goes
    assert skipped == ([step == BAD for step in range(5)] if bad else [False] * 4)
    kept = [
        piece for piece in optimizer.pieces() if not piece.name.startswith("clock/")
    ]  # it is written: nothing is saved
    found = {f"{piece.name} {piece.offset}": piece.tensor for piece in kept} | all_tables(model, sequence)
    dense = {name: value for name, value in model.state_dict().items() if type(value) is torch.Tensor}
    return {name: value.detach().clone() for name, value in {**found, **dense}.items()}


def check(rank, world_size, optim, layout):
    plain, masked = (trained(rank, world_size, optim, layout, bad=bad) for bad in (False, True))
    assert plain.keys() == masked.keys() and len(plain) > 4
    for name, value in plain.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, masked[name]), (optim, layout, name)


def check_tables(rank, world_size):
    ftrl = TableOptimizerConfig("ftrl", lr=0.2, l1=0.01)
    for config, layout in TABLES.values():
        wide = config if layout == "data_parallel" else ftrl
        check(rank, world_size, OptimConfig(tables=config, wide=wide, dense=ADAM), layout)


def check_dense(rank, world_size):
    for name, options in DENSE.items():
        dense = DenseOptimizerConfig(name, lr=0.1, weight_decay=0.1, options=options, ema_decay=0.9, clip_norm=1.0)
        check(rank, world_size, OptimConfig(tables=touched("sgd"), dense=dense), "table_wise")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_tables_are_what_they_would_be_without_the_masked_step(world_size):
    run_distributed(check_tables, world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_so_are_dense_layers_their_states_and_averages(world_size):
    run_distributed(check_dense, world_size)
