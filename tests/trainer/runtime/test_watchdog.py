"""Who hangs is found, named and ended."""

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_distributed
from tests.helpers.warm import PATIENCE
from trainer.runtime import watchdog
from trainer.runtime.distributed import Ranks
from trainer.runtime.read_back import to_host
from trainer.runtime.watchdog import Beat, Watchdog, hanging, verdict

CPU = torch.device("cpu")


def oversleep():
    time.sleep(10 * PATIENCE)


def hang(rank, world_size, folder):
    """Three steps; in the last one rank 1 oversleeps before the collective."""
    report = Path(folder) / "report"
    guard = Watchdog(
        Path(folder),
        Ranks(rank, world_size, rank, world_size, CPU),
        1.0,
        lambda *facts: report.write_text(json.dumps([rank, *facts])),
    )
    with guard:
        for step in (1, 2, 3):
            guard.beat(step, "begin")
            if (rank, step) == (1, 3):
                oversleep()
            dist.barrier()
            guard.beat(step, "end")


def test_the_rank_that_hangs_is_named_and_all_end(tmp_path, capfd):
    with pytest.raises(AssertionError, match="exit code 1"):  # which no rank has before it has slept
        run_distributed(hang, 2, str(tmp_path))
    reported_by, rank, step, message = json.loads((tmp_path / "report").read_text())
    assert (reported_by, rank, step) == (0, 1, 3)
    assert message.startswith("rank 1 of 2 hangs: in oversleep (tests/trainer/runtime/test_watchdog.py:")
    assert message.endswith(" s at step 3; the others wait for it")
    lines = [line for line in capfd.readouterr().err.splitlines() if "hang" in line]
    assert lines == [f"error: {message}; stacks: {tmp_path}/stacks/rank-*.txt"]
    assert "in oversleep" in (tmp_path / "stacks" / "rank-1.txt").read_text()
    assert "in barrier" in (tmp_path / "stacks" / "rank-0.txt").read_text()


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """A watchdog of half a second that only notes that it would end the process."""
    ended = []
    monkeypatch.setattr(Watchdog, "_end", lambda self: (ended.append(self), self._stop.set()))
    dog = Watchdog(tmp_path, Ranks(0, 1, 0, 1, CPU), 0.5)
    dog.folder.mkdir(exist_ok=True)
    dog.ended = ended
    return dog


def idle_seconds(watch):
    """For how long nothing may be heard of training from now on: it looks every tenth of a second."""
    looks = 0
    while not watch.ended:
        watch.look(0.1)
        looks += 1
    return round((looks - 1) / 10, 1)  # at the first look there was a sign of life


def test_it_bites_after_the_time_without_beats(watch):
    watch.beat(1, "end")
    for _ in range(10):
        watch.look(0.1)
        watch.beat(2, "begin")
    assert not watch.ended
    assert 0.5 <= idle_seconds(watch) <= 0.6


def test_a_first_step_may_take_longer(watch):
    watch.beat(1, "begin")
    assert 12 * 0.5 <= idle_seconds(watch) <= 12 * 0.5 + 0.1


def test_a_pause_may_take_longer(watch):
    watch.beat(1, "end")
    with watch.paused():
        for _ in range(50):
            watch.look(0.1)
        assert not watch.ended
    assert 0.5 <= idle_seconds(watch) <= 0.6


def test_a_process_that_was_stopped_has_not_been_idle(watch):
    watch.beat(1, "end")
    for elapsed in (0.1, 0.1, 3600.0):  # SIGSTOP, SIGCONT
        watch.look(elapsed)
    assert not watch.ended


def test_it_looks_by_itself(watch):
    with watch:
        watch.beat(1, "end")
        assert watch._stop.wait(PATIENCE)
    assert watch.ended


def test_nothing_is_left_behind(watch, tmp_path):
    with watch:
        assert json.loads((tmp_path / "stacks" / "beat-0.json").read_text())["rank"] == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("beats", "ranks"),
    [
        ([Beat(0, 5, "guard"), Beat(1, 5, "begin")], [1]),
        ([Beat(0, 5, "begin"), Beat(1, 4, "end")], [1]),
        ([Beat(0, 5, "begin", waiting=True), Beat(1, 5, "begin"), Beat(2, 5, "guard")], [1]),
        ([Beat(0, 5, "begin", waiting=True), Beat(1, 5, "begin", waiting=True)], [0, 1]),
        ([Beat(0, 5, "begin", waiting=True), Beat(1)], [1]),
    ],
)
def test_furthest_behind_and_not_waiting_is_who_hangs(beats, ranks):
    assert [beat.rank for beat in hanging(beats)] == ranks


def test_a_rank_without_a_sign_is_named():
    assert verdict([Beat(0, 5), Beat(1)]) == "rank 1 of 2 gives no sign of life; the others wait for it"
    alone = Beat(0, 5, seconds=35.2, where="f (a.py:3)")
    assert verdict([alone]) == "rank 0 of 1 hangs: in f (a.py:3) since 35 s at step 5"


def test_signs_of_life_while_paused_keep_it_quiet(watch):
    watch.beat(1, "end")
    with watch.paused():
        for _ in range(100):
            watch.alive()
            watch.look(0.1)
        assert not watch.ended
        assert 12 * 0.5 <= idle_seconds(watch) <= 12 * 0.5 + 0.1


def test_it_knows_whether_training_waits(watch):
    assert watch.waits() is None, "nothing is known before the first step's end"
    watch.beat(1, "end")
    assert watch.waits() is False and watch.steps == 1
    watch.beat(2, "guard")
    assert watch.waits() is True
    watch.beat(2, "backward")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    seen, never = [], threading.Event()
    looks = threading.Thread(target=lambda: [seen.append(watch.waits()) for _ in range(500) if not never.wait(0.001)])
    looks.start()
    while looks.is_alive():
        dist.barrier()
    dist.destroy_process_group()
    assert True in seen, "within torch.distributed"
    with watch.paused():
        assert watch.waits() is None


def test_waiting_for_a_gpu_is_waiting(watch, monkeypatch):
    """As ranks wait on CUDA: within ``torch.cuda``'s synchronize, where reports read a number back, in what a collective
    calls, and in the guard."""
    code = torch.cuda.Event.synchronize.__code__
    made = {}
    exec(compile(f"def {code.co_name}(look): look()\ndef set_device(look): look()", code.co_filename, "exec"), made)
    exec(compile("def operator(look): look()", torch._ops.__file__, "exec"), made)
    exec(compile("def collective(look, call): call(look)", dist.distributed_c10d.__file__, "exec"), made)
    here = [
        (made["synchronize"], True),
        (made["set_device"], False),
        (made["operator"], False),
        (lambda look: made["collective"](look, made["operator"]), True),
        (lambda look: made["collective"](look, lambda look: look()), False),  # a hook of ours
        (lambda look: to_host(SimpleNamespace(cpu=look)), True),
        (lambda look: look(), False),
    ]
    watch.beat(1, "end")
    for call, waits in here:
        seen = []

        def look(seen=seen):
            frame = sys._getframe(1)
            monkeypatch.setattr(watchdog.sys, "_current_frames", lambda: {watch._watched: frame})
            seen.append((watch.waits(), watchdog.place(frame)[1]))
            monkeypatch.undo()

        call(look)
        assert seen == [(waits, waits)]
    for phase in ("begin", "guard"):
        watch.beat(2, phase)
        watch._publish()
        assert watch._read(0).waiting is (phase == "guard")


def test_before_the_first_step_is_said_so():
    assert verdict([Beat(0, 0, seconds=3, where="f (a.py:3)")]).endswith("since 3 s before the first step")


def test_one_rank_reports_also_where_each_believes_it_is_the_first(tmp_path):
    """On a machine under load a rank may give up waiting before another has noticed."""
    dogs = [Watchdog(tmp_path, Ranks(rank, 2, 0, 2, CPU), 0.5) for rank in range(2)]
    for _ in range(2):  # a later attempt in the same run folder starts afresh
        with dogs[0]:
            assert [dog._reports() for dog in dogs] == [True, False]
        dogs = [Watchdog(tmp_path, Ranks(rank, 2, 0, 2, CPU), 0.5) for rank in range(2)]


def test_it_waits_for_the_others_to_notice(tmp_path, monkeypatch):
    dog, other = (Watchdog(tmp_path, Ranks(rank, 2, 0, 2, CPU), 0.5) for rank in range(2))
    dog.folder.mkdir()
    for each in (dog, other):
        each._publish(hung=each is dog)
    monkeypatch.setattr(time, "sleep", lambda _: other._publish(hung=True))
    assert all(beat.hung for beat in dog._wait_for_others())
