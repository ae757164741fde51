"""The guard: in the step of a loss that is not finite no table is touched on any rank, and the next one, or what would report or
save that step, ends all of them; one rank's wish to stop stops all."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_loaders.batch import Cursor
from data_loaders.errors import UserError
from tests.helpers.jobs import built_job, ranks_of
from tests.helpers.ranks import run_distributed
from tests.helpers.whole_tables import gather_table
from trainer.run import build, loop
from trainer.run.step_seeds import StepSeeds
from trainer.runtime import fault_injection
from trainer.runtime.progress import Progress
from trainer.runtime.restart_history import RestartHistory
from trainer.runtime.signals import STOP_SIGNALS
from trainer.runtime.step_guard import StepGuard
from trainer.runtime.step_mask import StepMask
from trainer.runtime.watchdog import Watchdog

CPU = torch.device("cpu")
SIGTERM, SIGINT, SIGUSR1 = 15, 2, 10


def guarded_job(root, rank, world_size, folder, asked):
    """A job whose steps are guarded, its batches, and the guard."""
    config, layout, loader, built = built_job(root, rank, world_size, ["model=deepfm", "model.hidden_units=[8]"])
    ranks = ranks_of(rank, world_size)
    manifest = build.scan(config.data, "train", layout)
    guard = StepGuard(ranks, asked, Watchdog(folder, ranks, 60), RestartHistory(folder), manifest, built.mask)
    return built, loop.batches_from(loader, Progress(), 9), guard


def run_loop(built, batches, guard, seen=lambda name, progress: None, save_at=()):
    """``loop.run`` with the rest left out; ``seen`` hears of each event. A save may be due after the steps ``save_at``."""
    progress = Progress()

    def hears(*names):
        return SimpleNamespace(**{name: lambda *_, name=name: seen(name, progress) for name in names})

    try:
        with contextlib.closing(batches):
            loop.run(
                batches=batches,
                pipeline=built.pipeline,
                progress=progress,
                guard=guard,
                watchdog=guard.watchdog,
                row_log=hears("record"),
                coverage=hears("look"),
                logger=SimpleNamespace(**vars(hears("update", "maybe_report", "outside")), is_due=lambda _: False),
                evaluator=hears("is_due"),
                early_stopping=SimpleNamespace(stopped=None),
                checkpoints=SimpleNamespace(
                    seconds=0.0,
                    may_be_due=lambda step: step in save_at,
                    maybe_save=lambda *_: seen("maybe_save", progress),
                ),
                grace=SimpleNamespace(look=lambda: None),
                profile=lambda step: None,
                seeds=StepSeeds(1, guard.ranks),
                redraw=SimpleNamespace(is_due=lambda progress: False),
            )
    except ValueError as error:
        return progress.step, str(error)
    return progress.step, None


def everything(built):
    """All tables whole, and the dense layers."""
    tables = {t.name: gather_table(built.task, t.name).clone() for t in built.tables}
    dense = {k: v.clone() for k, v in built.task.state_dict().items() if type(v) is torch.Tensor}
    return {**dense, **tables}


def nan_in_step_3(rank, world_size, root, folder, save_at):
    """What the loop says of a NaN on the last rank; which tables and layers the two steps before it have changed, and which
    that step; and the events."""
    fault_injection.RULES = fault_injection.parse(f"rank={world_size - 1},step=3,phase=forward,action=nan")
    built, batches, guard = guarded_job(root, rank, world_size, folder, lambda: 0)
    after, events = {}, []

    def remember(name, progress):
        events.append((name, progress.step))
        if name == "is_due":
            after[progress.step] = everything(built)

    ended = run_loop(built, batches, guard, remember, save_at)
    # The pipeline stands still within a step: its tables are read as they are.
    now = everything(built)
    changed = [name for name in now if not torch.equal(now[name], after[2][name])]
    trained = [name for name in now if not torch.equal(after[1][name], after[2][name])]
    fault_injection.RULES = []
    return ended, changed, trained, events


def asked_on_the_last_rank(rank, world_size, root, folder):
    """SIGTERM reaches the last rank between two steps."""
    events = []
    last = rank == world_size - 1
    job = guarded_job(root, rank, world_size, folder, lambda: SIGTERM if last and ("maybe_save", 2) in events else 0)
    ended = run_loop(*job, lambda name, progress: events.append((name, progress.step)))
    return ended, job[2].stop_signal, events


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_end_one_step_after_a_loss_that_is_not_finite(click_log, tmp_path, world_size):
    results = run_distributed(nan_in_step_3, world_size, click_log, tmp_path, ())
    for (step, message), changed, trained, events in results:
        assert message.startswith(
            f"rank {world_size - 1}: the loss of step 3 is nan, in batch 3 of epoch 0, where all "
        )
        assert "optim.tables.lr" in message
        assert step == 3 and ("look", 4) not in events, "the step after it is not trained"
        assert changed == [] and len(trained) > 3, "two steps did change tables and layers, the third none"
    assert len({message for (_, message), *_ in results}) == 1, "one message, so that it is printed once"


def test_before_a_save_it_ends_the_run_in_the_same_step(click_log, tmp_path):
    for (step, message), changed, _, events in run_distributed(nan_in_step_3, 2, click_log, tmp_path, (3,)):
        assert step == 3 and "the loss of step 3 is nan" in message and changed == []
        assert not {("maybe_report", 3), ("maybe_save", 3)} & {*events}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_stop_after_the_same_step(click_log, tmp_path, world_size):
    for ended, stop_signal, events in run_distributed(asked_on_the_last_rank, world_size, click_log, tmp_path):
        assert ended == (4, None) and stop_signal == SIGTERM
        assert events[-1] == ("maybe_report", 4) and ("maybe_save", 4) not in events, "neither saved nor evaluated"
        assert ("maybe_save", 3) in events


class Files:
    """A manifest of three files, the second one empty."""

    files = [SimpleNamespace(num_rows=rows, path=path) for path, rows in (("a", 10), ("none", 0), ("b", 5))]

    def relative(self, file):
        return file.path


def lone_guard(tmp_path, asked=lambda: 0):
    ranks = ranks_of(0, 1)
    guard = StepGuard(ranks, asked, Watchdog(tmp_path, ranks, 60), RestartHistory(tmp_path), Files(), StepMask(CPU))
    guard.begin(7)
    return guard


def cursor(origin=None):
    return Cursor(epoch=1, step=4, rows=4, local_rows=4, origin=None if origin is None else np.array(origin))


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr("trainer.runtime.step_guard.on_all_ranks", lambda complaint: complaint)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("logits", "origin", "place"),
    [
        ([0.0, NAN, 1.0, INF, NAN], [3, 9, 2, 10], "where 2 of this rank's 4 rows have logits that are not finite: a row 9, b "),
        ([NAN, NAN, NAN, NAN], [0, 9, 11, 14], ": a row 0, a row 9, b row 1 …."),
        ([0.0, 0.0, 0.0, 0.0], [1, 2, 3, 4], "where all logits are finite: a row 1, a row 2, a row 3 …."),
        ([0.0, NAN, 1.0, 0.0], None, "where 1 of this rank's 4 rows have logits that are not finite (debug.ledger=true names"),
    ],
)  # fmt: skip
def test_the_message_names_rows_by_file(alone, tmp_path, logits, origin, place):
    guard = lone_guard(tmp_path)
    guard.check(torch.tensor(INF), torch.tensor(logits), cursor(origin))
    guard.begin(8)
    with pytest.raises(ValueError, match="the loss of step 7 is inf, in batch 4 of epoch 1, ") as error:
        guard.check(torch.tensor(0.5), torch.zeros(4), cursor())
    assert place in str(error.value)


def test_what_is_settled_is_told_once(alone, tmp_path):
    guard = lone_guard(tmp_path)
    guard.settle()
    guard.check(torch.tensor(0.5), torch.zeros(4), cursor())
    guard.settle()
    guard.check(torch.tensor(-INF), torch.zeros(4), cursor())
    with pytest.raises(UserError, match="the loss of step 7 is -inf"):
        guard.over(7)
    guard.settle()


@pytest.mark.parametrize("signals", [[SIGTERM, 0, 0], [0, SIGINT, SIGINT], [SIGUSR1, SIGINT, SIGTERM], [0, 0, SIGUSR1]])
def test_of_several_signals_all_ranks_take_the_same_one(alone, tmp_path, monkeypatch, signals):
    """The ranks' numbers are summed: as if three ranks were asked."""
    sent, ranks = [], ranks_of(0, 3)

    def checked(asked, all_reduce):
        monkeypatch.setattr("trainer.runtime.step_guard.dist.all_reduce", all_reduce)
        watchdog, restarts = Watchdog(tmp_path, ranks, 60), RestartHistory(tmp_path)
        guard = StepGuard(ranks, lambda: asked, watchdog, restarts, Files(), StepMask(CPU))
        guard.check(torch.tensor(0.5), torch.zeros(4), cursor())
        return guard

    for asked in signals:
        checked(asked, lambda flag: sent.append(flag.clone()))
    guard = checked(0, lambda flag: flag.copy_(sum(sent)))
    guard.settle()
    assert guard.stop_signal == max(filter(None, signals), key=STOP_SIGNALS.index)


def test_one_rank_asks_nobody(alone, tmp_path, capsys):
    guard = lone_guard(tmp_path, lambda: SIGTERM)
    assert not guard.stop_requested
    guard.check(torch.tensor(0.5), torch.zeros(4), cursor())
    assert not guard.stop_requested
    guard.settle()
    assert guard.stop_requested and guard.stop_signal == SIGTERM
    assert capsys.readouterr().err == "Asked to stop by SIGTERM: after step 7\n"


def test_a_loss_that_is_not_finite_is_reported_even_where_another_rank_has_ended(tmp_path, monkeypatch):
    """Such as by an error of its storage, before it could ask."""

    def peer_gone(*_, **__):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")

    monkeypatch.setattr("trainer.runtime.step_guard.dist.all_reduce", peer_gone)
    ranks = ranks_of(1, 2)
    manifest = SimpleNamespace(files=[], relative=str)
    guard = StepGuard(
        ranks, lambda: 0, Watchdog(tmp_path, ranks, 60), RestartHistory(tmp_path), manifest, StepMask(CPU)
    )
    cursor = Cursor(epoch=0, step=3, rows=4, local_rows=2)
    guard.begin(4)
    with pytest.raises(UserError, match="rank 1: the loss of step 4 is nan, in batch 3 of epoch 0"):
        guard.check(torch.tensor(float("nan")), torch.tensor([0.5, float("nan")]), cursor)
    with pytest.raises(RuntimeError, match="Connection closed"):
        guard.check(torch.tensor(0.5), torch.zeros(2), cursor)
