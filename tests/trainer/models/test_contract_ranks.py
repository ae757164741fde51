"""What every model of conf/model promises, on two ranks: sharded equals unsharded, pipelined, gradients everywhere,
a checkpoint round trip that goes on bit by bit, and the same loss curve on any number of ranks."""

from pathlib import Path

import pytest
import torch

import conf
from tests.helpers.jobs import built_job, check_against_unsharded, check_round_trip, curve
from tests.helpers.ranks import run_distributed
from trainer.run import loop
from trainer.runtime.progress import Progress

MODELS = sorted(path.stem for path in (Path(conf.__file__).parent / "model").glob("*.yaml"))


def train_curve(rank, world_size, root, overrides, steps):
    _, _, loader, built = built_job(root, rank, world_size, overrides)
    batches = loop.batches_from(loader, Progress(), steps)
    losses = curve(built, batches, steps)
    built.pipeline.check_pipelined()
    batches.close()
    return losses


def train_curves(rank, world_size, root):
    return {model: train_curve(rank, world_size, root, [f"model={model}", "epochs=2"], 16) for model in MODELS}


def check_models(rank, world_size, root, folder):
    """Every model in one launch, told apart by the folder that a failure names."""
    for model in MODELS:
        overrides = [f"model={model}", "sharding.types=[row_wise]"]
        check_against_unsharded(rank, world_size, root, overrides)
        check_round_trip(rank, world_size, root, overrides, Path(folder) / model)


def check_round_trip_alone(rank, world_size, root, folder):
    check_round_trip(rank, world_size, root, ["model=din"], Path(folder))


def test_sharded_equals_unsharded_and_a_checkpoint_goes_on_bit_by_bit(click_log, tmp_path):
    run_distributed(check_models, 2, click_log, str(tmp_path / "checkpoints"))


def test_a_checkpoint_goes_on_bit_by_bit_on_three_ranks(click_log, tmp_path):
    """Where the order in which gradients are added up depends on how DistributedDataParallel has sorted them."""
    run_distributed(check_round_trip_alone, 3, click_log, str(tmp_path / "checkpoints"))


@pytest.fixture(scope="module")
def curves(click_log):
    """The loss curves of every model by world size, a launch each."""
    return {n: run_distributed(train_curves, n, click_log)[0] for n in (1, 2, 3)}


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_curve_is_the_same_on_1_2_and_3_ranks(model, curves):
    """Same global batches; across the epoch's end and its padded last batch (3000 rows by 240). Dividing by 3 rounds where
    dividing by 2 does not, and AdaGrad's first step, the sign of the gradient, magnifies that: hence the wider bound."""
    own = {n: found[model] for n, found in curves.items()}
    assert own[1][-1] < own[1][0]
    for world_size, bound in ((2, 1e-5), (3, 5e-3)):
        torch.testing.assert_close(torch.tensor(own[world_size]), torch.tensor(own[1]), rtol=0, atol=bound)
        torch.testing.assert_close(own[world_size][0], own[1][0], rtol=0, atol=1e-6)
