"""Who holds the others up, from what each rank measured."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.jobs import ranks_of
from trainer.monitoring import stragglers
from trainer.monitoring.stragglers import ENOUGH_SAMPLES, REPORTS, StragglerMeter

STEPS = 10


@pytest.fixture
def reports(monkeypatch):
    """Of rank 0 of several: a report for each table {rank: (own, all, input wait) a step} of the others."""

    def make(*tables, samples=ENOUGH_SAMPLES):
        watchdog, loader = SimpleNamespace(steps=0), SimpleNamespace(wait_seconds=0.0)
        meter = StragglerMeter(watchdog, loader, ranks_of(0, len(tables[0])))
        told = []
        for table in tables:
            watchdog.steps += STEPS
            own, total, wait = table[0]
            meter._own, meter._total, meter._samples = own * STEPS, total * STEPS, meter._samples + samples
            loader.wait_seconds += wait * STEPS

            def add(mine, table=table):
                return mine + torch.tensor([[0.0] * 4, *([*row, 99.0] for row in table[1:])], dtype=torch.float64)

            monkeypatch.setattr(stragglers, "all_reduce_sum", add)
            told.append(meter.report())
        return told

    return make


EVEN = [(0.08, 0.1, 0.0), (0.07, 0.1, 0.0), (0.09, 0.1, 0.01)]
UNEVEN = [(0.02, 0.1, 0.0), (0.09, 0.1, 0.05), (0.03, 0.1, 0.0)]


def test_the_slowest_rank_is_told_against_the_median(reports):
    (facts,) = reports(UNEVEN)
    expected = {"slowest": 1, "ratio": 3, "own_seconds": 0.09, "median_own_seconds": 0.03, "input_wait_seconds": 0.05}
    assert facts == {"ranks": pytest.approx(expected)}
    (facts,) = reports([(0.09, 0.1, 0.04), (0.01, 0.1, 0.0)])
    assert facts["ranks"]["slowest"] == 0 and facts["ranks"]["ratio"] == pytest.approx(9), "of two, against the other"
    assert facts["ranks"]["input_wait_seconds"] == pytest.approx(0.04)


def test_what_was_told_is_not_counted_again(reports):
    first, second = reports(UNEVEN, [(0.05, 0.1, 0.0), (0.1, 0.1, 0.0), (0.02, 0.1, 0.0)])
    assert second["ranks"]["median_own_seconds"] == pytest.approx(0.05)


def test_too_few_looks_say_nothing(reports):
    first, second = reports(UNEVEN, UNEVEN, samples=ENOUGH_SAMPLES - 5)
    assert first == {} and second["ranks"]["slowest"] == 1


@pytest.mark.parametrize(
    ("tables", "warned"),
    [
        ([UNEVEN] * (REPORTS - 1), 0),
        ([UNEVEN] * REPORTS, 1),
        ([UNEVEN] * 3 * REPORTS, 1),
        ([EVEN] * 3 * REPORTS, 0),
        ([UNEVEN, EVEN] * REPORTS, 0),
        ([UNEVEN, [UNEVEN[1], UNEVEN[0], UNEVEN[2]]] * REPORTS, 0),  # now one, now another
        ([[(0.001, 0.1, 0.0), (0.003, 0.1, 0.0)]] * 3 * REPORTS, 0),  # that costs nothing
    ],
)
def test_it_is_said_once_of_a_rank_that_stays_slow(reports, capsys, tables, warned):
    reports(*tables)
    told = capsys.readouterr().err
    assert told.count("warning: rank 1 of 3 holds the others up") == warned and told.count("warning") == warned


def test_one_rank_has_nobody_to_wait_for():
    with StragglerMeter(SimpleNamespace(steps=3), SimpleNamespace(wait_seconds=0.0), ranks_of(0, 1)) as meter:
        assert meter.report() == {} and not meter._thread.is_alive()
