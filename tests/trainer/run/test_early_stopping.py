"""What evaluations decide, against PyTorch's ReduceLROnPlateau and by hand; resumed in the middle."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from trainer.config.evaluation import EarlyStoppingConfig
from trainer.config.job import TrainConfig
from trainer.config.optim import PlateauConfig
from trainer.run.early_stopping import EarlyStopping
from trainer.runtime.progress import Progress

VALUES = [0.6, 0.7, 0.69, 0.705, 0.7049, None, 0.72, 0.71, 0.715, 0.71, 0.7, 0.7, 0.7]


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def rates():
    found = SimpleNamespace(reduction=1.0, history=[])

    def reduce_rates(reduction):
        found.reduction = reduction
        found.history.append(reduction)

    found.reduce_rates = reduce_rates
    return found


OFF = EarlyStoppingConfig(), PlateauConfig()


def judge(values, early=OFF[0], plateau=OFF[1], resume_after=None):
    """(reductions, the evaluation after which training stopped, the judge)"""
    held = rates()
    found = EarlyStopping(early, plateau, held)
    for number, value in enumerate(values):
        found.consider(Progress(step=10 * (number + 1)), "test", {"auc": 1.0, "logloss": 0.0})  # not watched
        found.consider(Progress(step=10 * (number + 1)), "valid", {"auc": value, "logloss": value})
        if number == resume_after:
            facts, found = found.facts(), EarlyStopping(early, plateau, held)
            found.restore(facts)
        if found.stopped:
            return held.history, number, found
    return held.history, None, found


def test_training_stops_after_so_many_evaluations_without_improvement():
    for resume_after in (None, 2, 7, 8):
        _, number, found = judge(VALUES, EarlyStoppingConfig(patience=3), resume_after=resume_after)
        assert number == 9
        assert found.stopped == "valid.auc did not improve on 0.72 of step 70 in 3 evaluations"
    # 0.705 and 0.7049 are too little above 0.7; None says nothing.
    _, number, found = judge(VALUES, EarlyStoppingConfig(patience=3, min_delta=0.01))
    assert number == 4 and "step 20" in found.stopped


def test_a_loss_is_to_fall():
    assert judge([0.5, 0.4, 0.3, 0.31], EarlyStoppingConfig("valid.logloss", patience=1))[1] == 3
    assert judge([0.5, 0.4, 0.3, 0.31], EarlyStoppingConfig("valid.auc", patience=1))[1] == 1


def test_an_evaluation_counts_once_and_a_patience_raised_afterwards_goes_on():
    _, _, found = judge([0.7, 0.6, 0.6], EarlyStoppingConfig(patience=2))
    for _ in range(3):
        found.consider(Progress(step=30), "valid", {"auc": 0.5})
    assert "in 2 evaluations" in found.stopped
    longer = EarlyStopping(EarlyStoppingConfig(patience=3), PlateauConfig(), rates())
    longer.restore(found.facts())
    assert longer.stopped is None
    longer.consider(Progress(step=40), "valid", {"auc": 0.6})
    assert longer.stopped


def test_rates_fall_as_those_of_torch_do():
    values = [value for value in VALUES if value is not None] + [0.6] * 9
    for patience, resume_after in ((1, None), (2, None), (2, 3), (3, 6)):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        # PyTorch waits for one evaluation more than its patience.
        expected = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            "max",
            factor=0.3,
            patience=patience - 1,
            threshold=0.002,
            threshold_mode="abs",
            min_lr=0.01,
            eps=0,
        )
        history = [1.0]
        for value in values:
            expected.step(value)
            if optimizer.param_groups[0]["lr"] != history[-1]:
                history.append(optimizer.param_groups[0]["lr"])
        plateau = PlateauConfig(factor=0.3, patience=patience, min_delta=0.002, min_factor=0.01)
        assert judge(values, plateau=plateau, resume_after=resume_after)[0] == pytest.approx(history[1:])


def test_contradictions_are_told_before_the_run(click_log):
    from tests.helpers import tiny

    for overrides, message in (
        (["early_stopping={patience: 0}"], "early_stopping.patience is 0"),
        (["early_stopping={metric: valid.acu}"], "did you mean 'valid.auc'"),
        (["early_stopping={patience: 1}", "checkpoint.best=valid.ne"], "give both the same metric"),
        (["early_stopping={patience: 1}", "data.valid=[]"], "data.valid is empty"),
        (["optim.plateau={patience: 1}", "data.valid=[]"], "data.valid is empty"),
        (["optim.plateau={patience: 1, factor: 1.5}"], "optim.plateau.factor is 1.5"),
        (["accumulate_steps=4"], "set batch_size to 960 instead"),
        (["checkpoint.restore_best=true"], "checkpoint.best is null"),
        (["optim.wide={name: ftrl, schedule: {decay: linear}}"], "optim.wide.schedule"),
    ):
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            tiny.job(click_log, *overrides)
    config = tiny.job(click_log, "early_stopping={metric: valid.logloss, patience: 1}").config
    assert isinstance(config, TrainConfig)
    assert config.checkpoint.best == "valid.logloss" and config.checkpoint.restore_best
