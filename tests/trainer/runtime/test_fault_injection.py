"""The fault-injection hook: what it matches, what it does, and that it does nothing unless asked."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import warm
from tests.helpers.tiny import REPOSITORY
from trainer.runtime import fault_injection


@pytest.fixture
def rules(monkeypatch):
    return lambda text: monkeypatch.setattr(fault_injection, "RULES", fault_injection.parse(text))


def test_without_the_variable_nothing_happens():
    assert fault_injection.RULES == []
    assert not any(fault_injection.at(phase, step=1) for phase in fault_injection.PHASES)


def test_a_rule_acts_at_its_rank_step_phase_and_attempt_only(rules, monkeypatch):
    rules("rank=1,step=3,phase=forward,action=nan")
    places = [(p, s, r) for p in ("forward", "reader") for s in (None, 2, 3) for r in (0, 1)]
    assert [place for place in places if fault_injection.at(place[0], step=place[1], rank=place[2])] == [
        ("forward", 3, 1)
    ]
    rules("phase=forward,action=nan")
    assert (
        fault_injection.at("forward")
        and fault_injection.at("forward", step=7, rank=5)
        and not fault_injection.at("step_begin", step=7)
    )
    rules("phase=forward,attempt=1,action=nan")
    assert not fault_injection.at("forward")
    monkeypatch.setattr(fault_injection, "launch_id", lambda: ("id", 1))
    assert fault_injection.at("forward")


def test_rules_of_several_places(rules):
    rules(" rank=0,phase=reader,action=nan ; rank=1,phase=forward,action=nan;")
    assert fault_injection.at("reader", rank=0) and fault_injection.at("forward", rank=1)
    assert not fault_injection.at("reader", rank=1) and not fault_injection.at("forward", rank=0)


def test_errors_and_waits(rules):
    rules("phase=during_write,action=enospc;phase=reader,action=raise;phase=forward,action=sleep=0.2")
    with pytest.raises(OSError, match="No space left") as full:
        fault_injection.at("during_write", step=4)
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="fault injected at reader, step 4"):
        fault_injection.at("reader", step=4)
    began = time.monotonic()
    assert not fault_injection.at("forward", step=4)
    assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize(
    "wrong",
    ["phase=nowhere,action=nan", "phase=forward,action=no", "phase=forward", "phase=forward,action=nan,steps=3"],
)
def test_a_wrong_rule_is_refused(wrong):
    with pytest.raises(ValueError, match=f"'{wrong}' is no rule"):
        fault_injection.parse(wrong)


def test_ends_of_a_process_that_reads_the_variable():
    source = "from trainer.runtime import fault_injection as it\nfor n in range(4):\n    it.at('step_begin', step=n)\nprint('on')"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RANK": "1"}
    actions = {
        "kill9": -signal.SIGKILL,
        "exit=7": 7,
        "stop": -signal.SIGTERM,
        "kill9,rank=0": 0,
    }
    started = {
        action: subprocess.Popen(
            [sys.executable, "-c", source],
            env={**environment, "TRAINER_FAULTS": f"phase=step_begin,step=3,action={action}"},
            stdout=subprocess.DEVNULL,
        )
        for action in actions
    }
    assert {action: process.wait(timeout=warm.PATIENCE) for action, process in started.items()} == actions
