"""Batches added several at a time: the same sums, bit by bit, as one after the other."""

import pytest
import torch

from trainer.metrics.click_metrics import ClickMetrics
from trainer.metrics.scored_rows import AT_ONCE, CollectedRows


def batches(count, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = 3 * torch.randn(rows, generator=generator)
        labels = (torch.rand(rows, generator=generator) < 0.3).float()
        yield logits, labels, torch.rand(rows, generator=generator)  # weights that no sum holds exactly


def added_singly(each, num_bins):
    metrics = ClickMetrics(num_bins)
    for batch in each:
        metrics.update(*batch)
    return metrics.sums


@pytest.mark.parametrize("flushed_after", [(), (5,), (1, 2, 17, 30)])
def test_the_sums_do_not_depend_on_how_many_batches_are_added_at_once(flushed_after):
    each = list(batches(2 * AT_ONCE + 3, 70))
    window, epoch = ClickMetrics(64), ClickMetrics(1 << 10)
    rows = CollectedRows(window.add, epoch.add)
    for number, batch in enumerate(each, 1):
        rows.update(*batch)
        if number in flushed_after:
            rows.flush()
    rows.flush()
    for metrics in (window, epoch):
        assert torch.equal(metrics.sums, added_singly(each, metrics.num_bins))


def test_a_batch_is_added_by_a_later_one_only():
    """What came last may be a batch whose loss was not finite, which nobody knows yet."""
    metrics = ClickMetrics(64)
    rows = CollectedRows(metrics.add)
    each = list(batches(AT_ONCE, 8))
    for batch in each:
        rows.update(*batch)
    assert not metrics.sums.any()
    rows.update(torch.full((8,), float("nan")), torch.ones(8), torch.ones(8))
    assert torch.equal(metrics.sums, added_singly(each, 64))
    rows.clear()
    rows.flush()
    assert metrics.compute()["rows"] == 8 * AT_ONCE


def test_batches_of_another_size_are_added_by_themselves():
    each = [*batches(3, 8), *batches(2, 5, seed=1)]
    metrics = ClickMetrics(64)
    rows = CollectedRows(metrics.add)
    for batch in each:
        rows.update(*batch)
    rows.flush()
    assert torch.equal(metrics.sums, added_singly(each, 64))
