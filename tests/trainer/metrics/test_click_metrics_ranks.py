"""The same rows give the same metrics however they are dealt to ranks."""

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_distributed
from trainer.metrics.click_metrics import ClickMetrics

ROWS = 3_000


def rows():
    generator = torch.Generator().manual_seed(11)
    logits = 2 * torch.randn(ROWS, generator=generator) - 1
    labels = (torch.rand(ROWS, generator=generator) < torch.sigmoid(logits)).float()
    return logits, labels, torch.randint(1, 4, (ROWS,), generator=generator).float()


def values_of_rank(rank, world_size, unequal):
    """Rank r takes every world_size-th row, or (``unequal``) the last rank takes all and the others none."""
    metrics = ClickMetrics()
    mine = slice(rank, None, world_size)
    if unequal:
        mine = slice(0, ROWS if rank == world_size - 1 else 0)
    part = [column[mine] for column in rows()]
    for batch in zip(*(column.split(100) for column in part)):
        metrics.update(*batch)
    return metrics.compute(dist.all_reduce)


def nan_on_last_rank(rank, world_size):
    metrics = ClickMetrics(num_bins=8)
    logit = float("nan") if rank == world_size - 1 else 0.0
    metrics.update(torch.tensor([logit]), torch.ones(1), torch.ones(1))
    try:
        metrics.compute(dist.all_reduce)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("world_size", "unequal"), [(1, False), (2, False), (3, False), (2, True)])
def test_same_values_on_any_number_of_ranks(world_size, unequal):
    alone = ClickMetrics()
    alone.update(*rows())
    expected = alone.compute()
    for values in run_distributed(values_of_rank, world_size, unequal):
        # Integer weights: the histograms are exact whatever the order of addition.
        assert (values["auc"], values["auc_error_bound"]) == (expected["auc"], expected["auc_error_bound"])
        assert values == pytest.approx(expected, rel=1e-13)


def test_nan_raises_on_every_rank():
    reports = run_distributed(nan_on_last_rank, 2)
    assert all(report and "1 of 2 logits are NaN" in report for report in reports)
