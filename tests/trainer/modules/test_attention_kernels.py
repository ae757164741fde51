"""DIN's attention unit by compiled kernels and by PyTorch: the paper's formula in float64, over random shapes."""

import itertools

import pytest
import torch

from tests.helpers.attention import computed, reference
from tests.helpers.samples import randomize
from trainer import kernels
from trainer.modules.attention import TargetAttention
from trainer.modules.execution import Execution, executed_by

needs_kernels = pytest.mark.skipif(
    not kernels.available(), reason="no kernels were compiled (python -m trainer.kernels)"
)
FORMS = pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_kernels)], ids=["torch", "kernels"])
ALL_OPTIONS = {"softmax": True, "cosine": True, "positions": 300, "intensity": True}
RANDOM = [3, 0, 1, 50, 7, 0, 12]
CASES = {  # lengths of the histories, options
    "paper": (RANDOM, {}),
    "softmax": (RANDOM, {"softmax": True}),
    "cosine, few positions": (RANDOM, {"cosine": True, "positions": 5}),
    "intensity": (RANDOM, {"intensity": True}),
    "one event": ([1], ALL_OPTIONS),
    "one sample": ([9], ALL_OPTIONS),
    "no event": ([0, 0, 0], ALL_OPTIONS),
    "longest": ([200, 1], ALL_OPTIONS),
}


def made(activation, units=(8, 4), width=6, compiled=False, std=0.5, **options):
    with executed_by(Execution(compiled=compiled)):
        unit = TargetAttention(width, units, activation=activation, **options)
    randomize(unit, std=std)
    assert unit.compiled == compiled
    return unit


def inputs_of(lengths, width=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    query, tokens, upstream = (
        torch.randn(rows, width, generator=draw) for rows in (len(lengths), sum(lengths), len(lengths))
    )
    return query, tokens, torch.tensor([0, *itertools.accumulate(lengths)]), upstream


def check(found, wanted, rtol, atol):
    """Of each tensor, in units of its largest entry."""
    assert list(found) == list(wanted)
    for name, want in wanted.items():
        scale = want.abs().max().clamp(min=1.0).item() if want.numel() else 1.0
        torch.testing.assert_close(
            found[name].double(), want, rtol=rtol, atol=atol * scale, msg=lambda m: f"{name}: {m}"
        )


@FORMS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["relu", "prelu", "dice"])
@pytest.mark.parametrize("case", CASES)
def test_the_unit_equals_the_paper_with_gradients(case, activation, training, compiled):
    lengths, options = CASES[case]
    unit = made(activation, compiled=compiled, **options).train(training)
    inputs = inputs_of(lengths)
    # Of one event the variance is 0, and 1 / sqrt(eps) makes 1e4 times as much of float32's rounding of the mean.
    rough = 100 if case == "one event" and activation == "dice" and training else 1
    check(computed(unit, *inputs), reference(unit, *inputs), rtol=2e-4 * rough, atol=2e-5 * rough)


@FORMS
@pytest.mark.parametrize("width, units", [(1, (1,)), (4, (3,)), (32, (64, 32)), (17, (33, 20, 7))], ids=str)
@pytest.mark.parametrize("activation", ["prelu", "dice"])
def test_all_widths_and_depths(activation, width, units, compiled):
    unit = made(activation, units, width, compiled, cosine=width > 1, positions=3).train()
    inputs = inputs_of([5, 31, 0, 64], width)
    check(computed(unit, *inputs), reference(unit, *inputs), rtol=1e-3, atol=1e-4)


@FORMS
@pytest.mark.parametrize("activation", ["prelu", "dice"])
def test_products_in_bf16(activation, compiled):
    unit = made(activation, (64, 32), 32, compiled, std=0.1, **ALL_OPTIONS).train()
    inputs = inputs_of([5, 31, 0, 64], 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = computed(unit, *inputs)
    for name, want in reference(unit, *inputs).items():
        # bf16 keeps 2^-8 of each hidden value; the gradient of PReLU jumps where the sign of a small one changes.
        share = 0.25 if activation == "prelu" and name != "output" else 0.05
        assert (found[name] - want).norm() <= share * want.norm() + 1e-3, name


@needs_kernels
def test_values_that_are_not_finite_stay_so():
    """A loss that is not finite ends a run: a rounding to bf16, or an activation, must not hide it."""
    for activation, value in itertools.product(("relu", "prelu", "dice"), (torch.nan, torch.inf)):
        unit = made(activation, compiled=True).eval()
        query, tokens, offsets, _ = inputs_of([3, 2])
        tokens[1, 0] = value
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found = unit(query, tokens, offsets)
            assert not found[0].isfinite().all() and found[1].isfinite().all()


@needs_kernels
def test_kernels_repeat_themselves_bit_for_bit():
    units = [made("dice", (64, 32), 32, True, **ALL_OPTIONS).train() for _ in range(2)]
    inputs = inputs_of([40, 0, 99, 7] * 20, 32)
    for _ in range(2):
        one, other = (computed(unit, *inputs) for unit in units)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(*pair) for pair in zip(units[0].buffers(), units[1].buffers(), strict=True))


@needs_kernels
def test_moving_averages_are_those_of_the_torch_form():
    unit = made("dice", (8, 4), compiled=True, positions=3).train()
    plain = made("dice", (8, 4), positions=3).train()
    for seed in range(3):
        inputs = inputs_of([5, 31, 0, 64], seed=seed)
        computed(unit, *inputs), computed(plain, *inputs)
    for (name, found), wanted in zip(unit.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_an_activation_without_kernels_is_computed_by_torch():
    with executed_by(Execution(compiled=True)):
        unit = TargetAttention(4, [3], activation="tanh")
    assert not unit.compiled and unit(*inputs_of([2, 1], 4)[:3]).isfinite().all()
