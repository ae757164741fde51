"""Dense optimizers against torch.optim used plainly, clipping and schedules against their formulas."""

import math

import pytest
import torch
from torch import nn

from trainer.config.optim import DENSE_OPTIMIZERS, DenseOptimizerConfig, ScheduleConfig
from trainer.optim.dense import clip_gradients, make_dense_optimizer, schedule_factor

PLAIN = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adadelta": torch.optim.Adadelta,
}
OPTIONS = {
    "adam": {"betas": [0.8, 0.99], "amsgrad": True},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "rmsprop": {"centered": True, "momentum": 0.5},
    "adagrad": {"initial_accumulator_value": 0.3},
}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"layer.weight": (5, 3), "layer.bias": (5,), "prelu.weight": (1,)}
    values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: nn.Parameter(value) for name, value in values.items()}


def set_gradients(values: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in values.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", DENSE_OPTIMIZERS)
def test_every_optimizer_makes_torchs_steps_with_its_state_there_from_the_start(name: str) -> None:
    ours, theirs = parameters(), parameters()
    config = DenseOptimizerConfig(name, lr=0.05, weight_decay=0.1, options=OPTIONS.get(name, {}))
    optimizer = make_dense_optimizer(ours, config)
    undecayed = [theirs["layer.bias"], theirs["prelu.weight"]]
    groups = [{"params": [theirs["layer.weight"]]}, {"params": undecayed, "weight_decay": 0.0}]
    plain = PLAIN[name](groups, lr=0.05, weight_decay=0.1, foreach=False, **OPTIONS.get(name, {}))
    for parameter, start in zip(ours.values(), parameters().values(), strict=True):
        assert torch.equal(parameter, start) and parameter.grad is None
    keys = {key: {k: v.data_ptr() for k, v in optimizer.state[p].items() if v is not None} for key, p in ours.items()}
    for step in range(6):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        plain.step()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=1e-12)
    after = {key: {k: v.data_ptr() for k, v in optimizer.state[p].items() if v is not None} for key, p in ours.items()}
    assert after == keys  # the very tensors that a checkpoint holds


def test_weight_decay_is_for_layer_weights_only() -> None:
    values = parameters()
    before = {key: value.detach().clone() for key, value in values.items()}
    optimizer = make_dense_optimizer(values, DenseOptimizerConfig("sgd", lr=0.5, weight_decay=0.1))
    for parameter in values.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(values["layer.weight"].detach(), before["layer.weight"] * (1 - 0.5 * 0.1))
    assert torch.equal(values["layer.bias"], before["layer.bias"])
    assert torch.equal(values["prelu.weight"], before["prelu.weight"])


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="optim.dense.options for adam: 'beta' is not known; did you mean 'betas'"):
        make_dense_optimizer(parameters(), DenseOptimizerConfig("adam", options={"beta": [0.9, 0.99]}))
    with pytest.raises(ValueError, match="'lr' is not known"):
        make_dense_optimizer(parameters(), DenseOptimizerConfig("adam", options={"lr": 1.0}))
    with pytest.raises(ValueError, match="optim.dense.options .*Invalid beta parameter"):
        make_dense_optimizer(parameters(), DenseOptimizerConfig("adam", options={"betas": [1.5, 0.99]}))


def test_clipping_scales_all_gradients_together() -> None:
    values = parameters()
    set_gradients(values, 0)
    before = {key: value.grad.clone() for key, value in values.items()}
    norm = math.sqrt(sum(float((g * g).sum()) for g in before.values()))
    assert float(clip_gradients(list(values.values()), norm / 4)) == pytest.approx(norm)
    for key, value in values.items():
        torch.testing.assert_close(value.grad, before[key] / 4, rtol=1e-5, atol=0)
    clip_gradients(list(values.values()), norm)
    torch.testing.assert_close(values["layer.bias"].grad, before["layer.bias"] / 4, rtol=1e-5, atol=0)


def test_schedules() -> None:
    def factors(config: ScheduleConfig, steps: list[int], total: int = 14) -> list[float]:
        return [schedule_factor(config, step, total) for step in steps]

    assert factors(ScheduleConfig(), [0, 7, 14, 100]) == [1.0] * 4
    assert factors(ScheduleConfig(warmup_steps=4), [0, 1, 3, 4, 13]) == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear = ScheduleConfig(warmup_steps=4, decay="linear", final=0.2)
    assert factors(linear, [3, 4, 9, 14, 50]) == pytest.approx([1.0, 1.0, 0.6, 0.2, 0.2])
    cosine = ScheduleConfig(warmup_steps=4, decay="cosine", final=0.2)
    assert factors(cosine, [4, 9, 14, 50]) == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert factors(cosine, [6])[0] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 0.2)) / 2)
    assert factors(ScheduleConfig(warmup_steps=10, decay="linear"), [2, 4], total=5) == pytest.approx([0.3, 0.5])
