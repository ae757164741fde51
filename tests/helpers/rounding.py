"""How far two float32 computations of the same value may lie apart, from the arithmetic and not from one machine.

CPUs and libraries add in different orders, with or without fused multiply-adds. To first order a result then moves by the sum
over its operations of (a rounding, relative 2^-24) x (the derivative by that operation's value): Higham, "Accuracy and
Stability of Numerical Algorithms", section 3. That sum is measured here: each parameter is moved by a relative +-2^-12,
which is large beside a rounding and small enough to be linear, and the results' movement is scaled.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

Change = Callable[[Iterable[Tensor]], None]

STEP = 2.0**-12  # relative size of a perturbation
UNIT = 2.0**-24  # relative size of a float32 rounding
BF16_UNIT = 2.0**-8
ROUNDINGS = 64.0  # that add up on the way to a result: random signs, so the square root of some thousand operations
BF16_ROUNDINGS = 4.0  # inputs, weights and outputs of some layers; their sums are float32
DRAWS = 4


def perturb(values: Iterable[Tensor], draw: int) -> None:
    """Moves every value in place by a relative +-STEP, with random signs that ``draw`` decides."""
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for value in values:
            signs = torch.randint(2, value.shape, generator=generator, dtype=torch.int8) * 2 - 1
            value.mul_(1 + STEP * signs.to(value.dtype))


def tolerance(results: Tensor, moved: Sequence[Tensor], rounding: float = ROUNDINGS * UNIT) -> float:
    """The largest absolute difference that rounding explains, from results and those of perturbed values."""
    distance = max(float((one - results).detach().abs().max()) for one in moved)
    return rounding / STEP * distance + UNIT * float(results.detach().abs().max())


def unchanged(values: Iterable[Tensor]) -> None:
    """The parameters of the computation itself."""


def measured_tolerance(
    compute: Callable[[Change], Sequence[Tensor]], rounding: float = ROUNDINGS * UNIT
) -> list[float]:
    """``tolerance`` of each result of ``compute(change)``, which passes its parameters to ``change`` before it uses them."""
    exact = compute(unchanged)
    moved = [compute(partial(perturb, draw=draw)) for draw in range(DRAWS)]
    return [tolerance(one, others, rounding) for one, *others in zip(exact, *moved, strict=True)]


def model_tolerance(model: nn.Module, compute: Callable[[], Tensor], rounding: float = ROUNDINGS * UNIT) -> float:
    """``tolerance`` of what ``compute`` makes of a model's parameters, which are the same again afterwards."""
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def changed(change: Change) -> list[Tensor]:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), before, strict=True):
                parameter.copy_(value)
        change(model.parameters())
        return [compute().detach()]

    (allowed,) = measured_tolerance(changed, rounding)
    changed(unchanged)
    return allowed
