"""What a step draws is a function of (seed, rank, step); a run that draws nothing is not seeded for long."""

import pytest
import torch

from tests.helpers.jobs import ranks_of
from trainer.run.step_seeds import WATCHED, StepSeeds


@pytest.fixture(autouse=True)
def same_generator_afterwards():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def drawn(steps, seed=1, rank=0, draws=lambda step: True):
    """What each of ``steps`` draws, where it does."""
    seeds, found = StepSeeds(seed, ranks_of(rank, 2)), {}
    for step in steps:
        seeds.begin(step)
        if draws(step):
            found[step] = torch.rand(3).tolist()
    return found


def test_a_resumed_run_draws_what_the_first_one_would_have():
    whole, resumed = drawn(range(60)), drawn(range(23, 60))
    assert resumed == {step: whole[step] for step in range(23, 60)}
    assert len({tuple(values) for values in whole.values()}) == 60
    assert whole[5] not in (drawn([5], rank=1)[5], drawn([5], seed=2)[5])


def test_steps_that_draw_now_and_then_are_seeded_all_along():
    def now_and_then(step):
        return step % (WATCHED - 1) == 0

    whole = drawn(range(80), draws=now_and_then)
    assert drawn(range(40, 80), draws=now_and_then) == {step: values for step, values in whole.items() if step >= 40}


def test_where_nothing_draws_the_generator_is_left_alone():
    seeds = StepSeeds(1, ranks_of(0, 1))
    for step in range(WATCHED + 1):
        seeds.begin(step)
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    seeds.begin(WATCHED + 1)
    assert torch.equal(torch.rand(2), expected)
