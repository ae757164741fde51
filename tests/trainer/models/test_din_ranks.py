"""DIN on several ranks: Dice's statistics are those of the global batch, however its rows and events lie on the ranks, and
in evaluation every rank goes its own way."""

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_distributed
from tests.helpers.samples import Row, make_batch, random_rows, randomize, small_schema
from trainer import kernels
from trainer.models.din import Model
from trainer.modules.dice import Dice
from trainer.modules.execution import Execution, executed_by
from trainer.runtime.distributed import all_reduce_sum

ROWS, TOTAL = 11, 13  # the last rows are padding
HISTORY = ("clicked_items", "clicked_categories")


def rows() -> list[Row]:
    """The last rows have no history: with them a rank has tokens of nobody."""
    found = random_rows(small_schema(), ROWS, seed=5)
    for row in found[6:]:
        row |= dict.fromkeys(HISTORY, [])
    return [*found, *({} for _ in range(TOTAL - ROWS))]


def parts(world_size: int) -> list[range]:
    """Unequal: the second rank has a row without history, the third the rest, without a single event, and padding."""
    ends = {1: [TOTAL], 2: [9, TOTAL], 3: [4, 6, TOTAL]}[world_size]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def run(model: Model, mine: range) -> torch.Tensor:
    weights = [1.0 if i < ROWS else 0.0 for i in mine]
    batch = make_batch(small_schema(), model.layout, [rows()[i] for i in mine], weights=weights)
    return model(batch) * torch.tensor(weights)


def build() -> Model:
    model = Model(small_schema(), hidden_units=[8, 4], attention_units=[8, 4], device=torch.device("cpu"))
    randomize(model)
    return model.train()


def dices(model: Model) -> list[Dice]:
    return [module for module in model.modules() if isinstance(module, Dice)]


def _like_the_whole(rank: int, world_size: int, compiled: bool) -> int:
    whole, mine = build(), parts(world_size)[rank]
    with executed_by(Execution(all_reduce=all_reduce_sum, compiled=compiled)):
        part = build()
    assert all(attention.compiled == compiled for attention in part.head.attentions)
    assert len(dices(part)) == 4  # two in the activation unit, two in the network
    for _ in range(2):  # moving averages go from the first batch to the second
        whole.zero_grad(), part.zero_grad()
        expected, found = run(whole, range(TOTAL)), run(part, mine)
        torch.testing.assert_close(found, expected[mine.start : mine.stop], rtol=1e-4, atol=1e-5)
        expected.square().sum().backward(), found.square().sum().backward()
        for (name, one), other in zip(whole.named_parameters(), part.parameters(), strict=True):
            torch.testing.assert_close(all_reduce_sum(other.grad.clone()), one.grad, rtol=1e-3, atol=1e-4, msg=name)
    for (name, one), other in zip(whole.named_buffers(), part.buffers(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6, msg=name)
        everywhere = [torch.empty_like(other) for _ in range(world_size)]
        dist.all_gather(everywhere, other)
        assert all(torch.equal(each, other) for each in everywhere), name  # a checkpoint saves one rank's
    _evaluates_alone(whole.eval(), part.eval(), rank, mine)
    return sum(len(rows()[i].get("clicked_items", [])) for i in mine)


def _evaluates_alone(whole: Model, part: Model, rank: int, mine: range) -> None:
    """No rank waits for another: the first one scores its rows once more than the others."""
    before = [buffer.clone() for buffer in part.buffers()]
    for _ in range(2 if rank == 0 else 1):
        found = run(part, mine)
    torch.testing.assert_close(found, run(whole, range(TOTAL))[mine.start : mine.stop], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(before, part.buffers(), strict=True))


NEEDS_KERNELS = pytest.mark.skipif(
    not kernels.available(), reason="no kernels were compiled (python -m trainer.kernels)"
)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_KERNELS)], ids=["torch", "kernels"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_dice_sees_the_global_batch_with_unequal_rows_and_empty_histories(world_size: int, compiled: bool) -> None:
    events = run_distributed(_like_the_whole, world_size, compiled)
    assert events[0] > 0 and (world_size < 3 or events[2] == 0)
