"""The moving average of dense parameters against its recursion, and against PyTorch's own."""

import pytest
import torch
from torch import nn

from trainer.config.optim import DenseOptimizerConfig
from trainer.optim.average import DenseAverage


def module() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def walk(linear: nn.Linear, average: DenseAverage, steps: int) -> None:
    for step in range(steps):
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        average.update(step)


def test_the_average_is_the_recursion() -> None:
    linear = module()
    average = DenseAverage(dict(linear.named_parameters()), decay=0.7)
    expected = {name: p.detach().double().clone() for name, p in linear.named_parameters()}
    for step in range(40):
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        average.update(step)
        decay = min(0.7, (1 + step) / (10 + step))
        for name, parameter in linear.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    for name, value in average.values.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_it_is_pytorchs_once_it_is_warm() -> None:
    linear = module()
    average = DenseAverage(dict(linear.named_parameters()), decay=0.9)
    theirs = torch.optim.swa_utils.AveragedModel(linear, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(linear)  # the first is taken as it is
    for step in range(1000, 1020):
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter += torch.randn(parameter.shape)
        average.update(step)
        theirs.update_parameters(linear)
    for name, parameter in theirs.module.named_parameters():
        torch.testing.assert_close(average.values[name], parameter, rtol=1e-5, atol=1e-6)


def test_in_place_and_back_also_after_an_error() -> None:
    linear = module()
    average = DenseAverage(dict(linear.named_parameters()), decay=0.9)
    walk(linear, average, 5)
    own = {name: p.detach().clone() for name, p in linear.named_parameters()}
    kept = {name: value.clone() for name, value in average.values.items()}
    with pytest.raises(KeyError), average.in_place():
        for name, parameter in linear.named_parameters():
            assert torch.equal(parameter, kept[name]) and torch.equal(average.values[name], own[name])
        raise KeyError
    for name, parameter in linear.named_parameters():
        assert torch.equal(parameter, own[name]) and torch.equal(average.values[name], kept[name])
    average.restart()
    assert all(torch.equal(average.values[name], own[name]) for name in own)


def test_a_decay_out_of_range_is_refused() -> None:
    for decay in (0.0, 1.0):
        with pytest.raises(ValueError, match="optim.dense.ema_decay"):
            DenseOptimizerConfig(ema_decay=decay)
