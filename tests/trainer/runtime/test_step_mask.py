"""What a masked step leaves as it is, bit by bit, whatever the bits."""

import pytest
import torch

from trainer.runtime.step_mask import Rollback, StepMask

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def masked(flag):
    mask = StepMask(CPU)
    mask.set(torch.tensor(flag))
    return mask


@pytest.mark.parametrize("flag", [0.0, 3.0, 25.0])
def test_a_step_with_a_finite_flag_counts(flag):
    mask = masked(flag)
    assert bool(mask.counts) and mask.skip == 0
    gradient = torch.tensor([1.0, NAN, -0.0])
    assert torch.equal(mask.zeroed(gradient).view(torch.int32), gradient.view(torch.int32))
    assert not mask.masked_only(torch.tensor([3, 4])).any()


def test_a_masked_step_has_no_gradient_even_where_it_is_nan():
    mask = masked(NAN)
    assert mask.skip == 1 and not mask.counts
    for dtype in (torch.float16, torch.float32):
        zeroed = mask.zeroed(torch.tensor([1.0, NAN, INF], dtype=dtype))
        assert zeroed.dtype == dtype and torch.equal(zeroed, torch.zeros(3, dtype=dtype))
    assert torch.equal(mask.masked_only(torch.tensor([3, 4])), torch.tensor([3, 4]))


@pytest.mark.parametrize("flag", [0.0, NAN])
def test_rollback_restores_every_bit_or_none(flag):
    before = {
        "float32": torch.tensor([1e-45, -0.0, 3.4e38, NAN, INF, -1.5]),
        "float16": torch.tensor([6e-8, -0.0, 65504.0], dtype=torch.float16),
        "float64": torch.tensor([[2.0, NAN]], dtype=torch.float64),
        "step": torch.tensor(7.0),
    }
    live = {name: value.clone() for name, value in before.items()}
    after = {name: torch.full_like(value, NAN) for name, value in before.items()}
    rollback = Rollback(list(live.values()), mask := masked(flag))
    rollback.keep()
    for name, value in live.items():
        value.copy_(after[name])
    rollback.restore()
    for name, value in live.items():
        expected = (after if bool(mask.counts) else before)[name]
        assert value.numpy().tobytes() == expected.numpy().tobytes(), name
