"""How long saves take, seen between steps, against what a launcher grants."""

from types import SimpleNamespace

import pytest

from tests.helpers.jobs import ranks_of
from trainer.monitoring import grace_period
from trainer.monitoring.grace_period import GraceCheck


@pytest.fixture
def saves(monkeypatch):
    """A clock, and checkpoints that are what the test says."""
    made = SimpleNamespace(now=100.0, seconds=0.0, under_way=False)
    monkeypatch.setattr(grace_period.time, "monotonic", lambda: made.now)
    return made


def looks(saves, check, *states):
    """A look for each (seconds since the last one, waited of them, under way)."""
    for elapsed, waited, under_way in states:
        saves.now, saves.seconds, saves.under_way = saves.now + elapsed, saves.seconds + waited, under_way
        check.look()


BESIDE = [(1, 0, False), (1, 0.5, True), (5, 0, True), (6, 0, False)]  # 0.5 of a snapshot, then 11 seconds
WAITED = [(1, 0, False), (11.5, 11.5, False), (1, 0, False)]


@pytest.mark.parametrize("states", [BESIDE, WAITED])
@pytest.mark.parametrize(("granted", "warned"), [(None, False), (12, False), (11, True)])
def test_a_save_is_measured_from_its_beginning(saves, capsys, states, granted, warned):
    looks(saves, GraceCheck(saves, granted, ranks_of(0, 1)), *states)
    said = capsys.readouterr().err
    assert (said != "") == warned
    if warned:
        assert "the last checkpoint took 12 s" in said and "gets 11 s" in said and "--grace 33" in said


def test_it_is_said_once_by_one_rank_and_saves_do_not_add_up(saves, capsys):
    looks(saves, GraceCheck(saves, 8, ranks_of(0, 2)), (5, 5, False), (5, 5, False), (9, 9, False), (9, 9, False))
    looks(saves, GraceCheck(saves, 8, ranks_of(1, 2)), (9, 9, False))
    assert capsys.readouterr().err.count("warning") == 1
