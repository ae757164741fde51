"""Faults in whole jobs, as torchrun starts them: what is killed, stopped or hung ends in time, says why in ``status.json``,
and goes on bit by bit. That it ends in time is seen by that it ends: what sleeps or waits in these jobs would do so for longer
than a test waits (``warm.PATIENCE``; gloo alone for 30 minutes). (Failure matrix, rows R1, R5 to R9, R21, R23, R29 and R33.)"""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from tests.helpers import warm
from tests.helpers.faulty import LAST, SLOWLY, Job
from trainer.checkpoint import Reader, newest, verify
from trainer.runtime import restart_history


def reference(job):
    return [job.launch()]


def rank_killed(job):
    """R1: SIGKILL of rank 1 in step 6; torchrun starts again by itself."""
    return [job.launch(faults="rank=1,step=6,attempt=0,phase=forward,action=kill9", restarts=1)]


def stopped(job):
    """R9, R6, R5, in a row: SIGKILL of the agent, SIGTERM to one worker, SIGTERM to the agent; and then to the end."""
    ends = []
    agent = job.start(faults=SLOWLY)
    job.reach(6, agent)
    workers = psutil.Process(agent.pid).children(recursive=True)
    agent.kill()
    gone, alive = psutil.wait_procs(workers, timeout=warm.PATIENCE)
    assert not alive and len(gone) >= 2, "no worker outlives its agent, nor what it has started itself"
    ends.append(job.end(agent))
    ends.append(job.launch(faults=f"rank=1,step=7,phase=step_begin,action=stop;{SLOWLY}"))
    agent = job.start(faults=SLOWLY)
    job.reach(10, agent)
    agent.send_signal(signal.SIGTERM)
    ends.append(job.end(agent))
    return [*ends, job.launch()]


def stopped_while_saving(job):
    """R7: SIGTERM while step 4 is saved; then, while step 8 is saved, two of them."""
    agent = job.start(faults="rank=0,step=4,phase=during_write,action=sleep=3")
    job.reach(4, agent)
    time.sleep(1)
    agent.send_signal(signal.SIGTERM)
    once = job.end(agent)
    agent = job.start(faults="rank=0,step=8,phase=during_write,action=sleep=99999")
    job.reach(8, agent)
    for _ in range(2):
        time.sleep(1.5)
        for worker in psutil.Process(agent.pid).children():
            worker.send_signal(signal.SIGTERM)
    return [once, job.end(agent), job.launch()]


def not_finite(job):
    """R21: the loss of step 6 is NaN on rank 1; then that of step 8, which is to be saved."""
    faults = [f"rank=1,step={step},phase=forward,action=nan" for step in (6, 8)]
    return [job.launch("debug.ledger=true", faults=each) for each in faults]


def hanging(job):
    """R23: rank 1 waits for a batch that does not come."""
    return [job.launch("hang_timeout_seconds=2", faults="rank=1,step=6,phase=reader,action=sleep=99999")]


def hanging_early(job):
    """R23: rank 0 does not come to shard the model."""
    return [job.launch("hang_timeout_seconds=1", faults="rank=0,phase=build,action=sleep=99999")]


def hanging_late(job):
    """R23: rank 1 does not come to the last evaluation."""
    return [job.launch("hang_timeout_seconds=2", faults="rank=1,phase=evaluation,action=sleep=99999")]


def peer_killed(job):
    """R8: rank 2 dies; rank 1 is asked by torchrun to stop while it is busy with other things."""
    job.ranks = 3
    busy = "rank=1,step=6,phase=step_begin,action=sleep=4"
    return [job.launch(faults=f"{busy};rank=2,step=6,phase=step_begin,action=kill9")]


def bug(job):
    """R29: an error on rank 0 alone."""
    return [job.launch(faults="rank=0,step=6,phase=step_begin,action=raise")]


def failing_again(job):
    """R33: rank 1 dies in step 6, whenever it gets there."""
    return [job.launch(faults="rank=1,step=6,phase=forward,action=kill9", restarts=3)]


@pytest.fixture(scope="module")
def jobs(click_log, tmp_path_factory):
    """{function: (job, how its launches ended)}. Two at a time."""
    folder = tmp_path_factory.mktemp("jobs")
    functions = (failing_again, stopped, stopped_while_saving, rank_killed, reference, not_finite, hanging, bug)
    functions = (*functions, peer_killed, hanging_early, hanging_late)
    made = {function: Job(click_log, folder / function.__name__) for function in functions}
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(lambda function: function(made[function]), functions)
        return {function: (made[function], end) for function, end in zip(functions, ends)}


def same_model(job, other):
    """Bit by bit, the state of all optimizers included; sums of metrics but for the order of adding up."""
    found, expected = (newest(one.run / "checkpoints") for one in (job, other))
    assert verify(found) is None and found.name == expected.name == f"step-{LAST}"
    found, expected = Reader(found), Reader(expected)
    assert sorted(found.names) == sorted(expected.names)
    exact = [name for name in expected.names if not name.startswith("metrics/")]
    for name in set(expected.names) - set(exact):
        torch.testing.assert_close(found.read(name), expected.read(name), rtol=1e-12, atol=1e-9)
    return len(exact) > 10 and all(torch.equal(found.read(name), expected.read(name)) for name in exact)


def test_an_undisturbed_run_finishes(jobs):
    job, (end,) = jobs[reference]
    assert end.code == 0, end.stderr
    assert (end.status["state"], end.status["step"]) == ("finished", LAST)
    assert [(a.step, a.state) for a in restart_history.read(job.run / restart_history.NAME)] == [(LAST, "finished")]


def test_a_killed_rank_is_made_up_for_by_a_restart(jobs):
    job, (end,) = jobs[rank_killed]
    assert end.code == 0 and end.status["state"] == "finished", end.stderr
    assert "Resumed from" in end.stderr and "step 4," in end.stderr
    assert same_model(job, jobs[reference][0])


def test_a_run_that_is_stopped_saves_and_goes_on(jobs):
    job, (agent_killed, worker_stopped, agent_stopped, finished) = jobs[stopped]
    assert agent_killed.steps[-1] == 4
    assert worker_stopped.code == 0, worker_stopped.stderr  # the new run got the lock
    assert worker_stopped.status["state"] == "preempted" and worker_stopped.status["retryable"]
    assert (worker_stopped.status["step"], worker_stopped.steps[-1]) == (7, 7)
    assert agent_stopped.status["state"] == "preempted" and agent_stopped.status["reason"] == "SIGTERM"
    assert agent_stopped.code != 0
    step = agent_stopped.status["step"]
    assert 10 <= step < LAST and agent_stopped.steps[-1] == step
    assert agent_stopped.stderr.count(f"Asked to stop by SIGTERM: after step {step}") == 1
    assert finished.code == 0 and finished.status["state"] == "finished", finished.stderr
    assert same_model(job, jobs[reference][0])


def test_a_signal_lets_a_save_finish_and_a_second_one_does_not(jobs):
    job, (once, twice, finished) = jobs[stopped_while_saving]
    assert once.status["state"] == "preempted" and once.steps == [4, once.status["step"]]
    assert twice.code != 0 and 8 not in twice.steps
    assert finished.code == 0 and finished.status["state"] == "finished", finished.stderr
    assert same_model(job, jobs[reference][0])


def test_a_loss_that_is_not_finite_ends_all_ranks_with_its_place(jobs):
    job, ends = jobs[not_finite]
    for end, step in zip(ends, (6, 8), strict=True):
        assert end.code != 0 and end.steps == [4]
        assert len(end.errors) == 1 and end.stderr.count("Traceback (most recent call last)") <= 1  # torchrun's own
        assert f"rank 1: the loss of step {step} is nan, in batch {step} of epoch 0" in end.errors[0]
        assert "train/" in end.errors[0] and " row " in end.errors[0]
        assert (end.status["state"], end.status["retryable"], end.status["step"]) == ("failed", False, step)
    saved = Reader(newest(job.run / "checkpoints"))
    assert all(torch.isfinite(saved.read(name)).all() for name in saved.names)


def test_a_rank_that_hangs_is_named_and_the_job_ends(jobs):
    job, (end,) = jobs[hanging]
    assert end.code != 0
    (line,) = end.errors
    assert line.startswith("error: rank 1 of 2 hangs: in _act (trainer/runtime/fault_injection.py:")
    assert "the others wait for it" in line
    assert (end.status["state"], end.status["retryable"], end.status["rank"]) == ("failed", True, 1)
    assert "_read" in (job.run / "stacks" / "rank-1.txt").read_text()


@pytest.mark.parametrize(
    ("how", "rank", "when", "steps"),
    [(hanging_early, 0, "before the first step", []), (hanging_late, 1, f"at step {LAST}", [12, LAST])],
)
def test_the_watchdog_sees_what_comes_before_and_after_the_steps(jobs, how, rank, when, steps):
    _, (end,) = jobs[how]
    assert end.code != 0 and end.steps == steps
    (line,) = end.errors
    assert line.startswith(f"error: rank {rank} of 2 hangs: in _act (trainer/runtime/fault_injection.py:")
    assert f" {when}; the others wait for it" in line
    assert (end.status["state"], end.status["retryable"], end.status["rank"]) == ("failed", True, rank)


def test_a_signal_that_follows_from_a_dead_rank_saves_nothing(jobs):
    job, (end,) = jobs[peer_killed]
    assert end.code != 0
    assert end.steps == [4] and "Asked to stop" not in end.stderr
    assert not list((job.run / "checkpoints").glob(".tmp-*")), "no save was begun"
    assert (end.status["state"], end.status["retryable"]) == ("failed", True)
    assert "lost contact with another rank" in end.stderr


def test_an_error_on_one_rank_ends_the_others(jobs):
    _, (end,) = jobs[bug]
    assert end.code != 0
    assert "RuntimeError: fault injected at step_begin, step 6" in end.stderr
    assert (end.status["state"], end.status["retryable"], end.status["rank"]) == ("failed", True, 0)
    assert end.status["reason"] == "fault injected at step_begin, step 6"


def test_a_run_that_keeps_failing_gives_up(jobs):
    job, (end,) = jobs[failing_again]
    assert end.code != 0
    assert [a.step for a in restart_history.read(job.run / restart_history.NAME)] == [6, 6, 6]
    assert end.status["state"] == "failed" and not end.status["retryable"]
    assert (end.status["rank"], end.status["step"]) == (None, 6)
    (line,) = end.errors
    assert "this run has failed 3 times in a row in step 6 (start 1: failed, step 6; start 2: failed, step 6" in line
