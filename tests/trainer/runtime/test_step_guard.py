"""The guard: a loss that is not finite stops all ranks before any table is touched; one rank's wish to stop stops all."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_loaders.batch import Cursor
from data_loaders.errors import UserError
from tests.helpers.jobs import built_job, ranks_of
from tests.helpers.ranks import run_distributed
from trainer.run import build, loop
from trainer.runtime import fault_injection
from trainer.runtime.progress import Progress
from trainer.runtime.restart_history import Attempts
from trainer.runtime.step_guard import StepGuard
from trainer.runtime.watchdog import Watchdog
from trainer.sharding import initialize

SIGTERM = 15


def guarded_job(root, rank, world_size, folder, asked):
    """A job whose steps are guarded, its batches, and the guard."""
    config, layout, loader, built = built_job(root, rank, world_size, ["model=deepfm", "model.hidden_units=[8]"])
    ranks = ranks_of(rank, world_size)
    manifest = build.scan(config.data, "train", layout)
    guard = StepGuard(ranks, asked, Watchdog(folder, ranks, 60), Attempts(folder), manifest)
    return built, loop.batches_from(loader, Progress(), 9), guard


def run_loop(built, batches, guard, seen=lambda name, progress: None):
    """``loop.run`` with the rest left out; ``seen`` hears of each event."""
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
                logger=hears("update", "maybe_report", "outside"),
                evaluator=hears("is_due"),
                early_stopping=SimpleNamespace(stopped=None),
                checkpoints=SimpleNamespace(seconds=0.0, maybe_save=lambda *_: seen("maybe_save", progress)),
                grace=SimpleNamespace(look=lambda: None),
                profile=lambda step: None,
                seed=1,
                ranks=guard.ranks,
            )
    except ValueError as error:
        return progress.step, str(error)
    return progress.step, None


def everything(built):
    """All tables whole, and the dense layers."""
    tables = {t.name: initialize.gather_table(built.task, t.name).clone() for t in built.tables}
    dense = {k: v.clone() for k, v in built.task.state_dict().items() if type(v) is torch.Tensor}
    return {**dense, **tables}


def check_guard(rank, world_size, root, folder):
    fault_injection.RULES = fault_injection.parse("rank=1,step=3,phase=forward,action=nan")
    built, batches, guard = guarded_job(root, rank, world_size, folder, lambda: 0)
    after = {}

    def remember(name, progress):
        if name == "is_due":
            after[progress.step] = everything(built)

    stopped = run_loop(built, batches, guard, remember)
    # The pipeline stands still within a step: its tables are read as they are.
    now = everything(built)
    changed = [name for name in now if not torch.equal(now[name], after[2][name])]
    trained = [name for name in now if not torch.equal(after[1][name], after[2][name])]

    fault_injection.RULES = []
    events = []
    job = guarded_job(root, rank, world_size, folder, lambda: SIGTERM if rank == 1 and asked_after(events) else 0)
    ended = run_loop(*job, lambda name, progress: events.append((name, progress.step)))
    return stopped, changed, trained, ended, job[2].stop_signal, events


def asked_after(events):
    return ("maybe_save", 2) in events


def test_two_ranks_stop_together_for_a_loss_or_a_signal_of_one(click_log, tmp_path):
    results = run_distributed(check_guard, 2, click_log, tmp_path)
    for (step, message), changed, trained, ended, stop_signal, events in results:
        assert step == 2 and message.startswith("rank 1: the loss of step 3 is nan, in batch 3 of epoch 0, where all ")
        assert "optim.tables.lr" in message
        assert changed == [] and len(trained) > 3, "two steps did change tables and layers, the third none"
        assert ended == (3, None) and stop_signal == SIGTERM
        assert events[-4:] == [("look", 2), ("record", 3), ("update", 3), ("maybe_report", 3)], (
            "neither saved nor evaluated"
        )
        assert ("is_due", 2) in events
    assert results[0][0] == results[1][0], "one message, so that it is printed once"


class Files:
    """A manifest of three files, the second one empty."""

    files = [SimpleNamespace(num_rows=rows, path=path) for path, rows in (("a", 10), ("none", 0), ("b", 5))]

    def relative(self, file):
        return file.path


def lone_guard(tmp_path, asked=lambda: 0):
    ranks = ranks_of(0, 1)
    guard = StepGuard(ranks, asked, Watchdog(tmp_path, ranks, 60), Attempts(tmp_path), Files())
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
    with pytest.raises(ValueError, match="the loss of step 7 is inf, in batch 4 of epoch 1, ") as error:
        lone_guard(tmp_path).check(torch.tensor(INF), torch.tensor(logits), cursor(origin))
    assert place in str(error.value)


def test_one_rank_asks_nobody(alone, tmp_path, capsys):
    guard = lone_guard(tmp_path, lambda: SIGTERM)
    assert not guard.stop_requested
    guard.check(torch.tensor(0.5), torch.zeros(4), cursor())
    assert guard.stop_requested and guard.stop_signal == SIGTERM
    assert capsys.readouterr().err == "Asked to stop by SIGTERM: after step 7\n"


def test_a_loss_that_is_not_finite_is_told_even_where_another_rank_has_ended(tmp_path, monkeypatch):
    """Such as by an error of its storage, before it could ask."""

    def peer_gone(*_, **__):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")

    monkeypatch.setattr("trainer.runtime.step_guard.dist.all_reduce", peer_gone)
    ranks = ranks_of(1, 2)
    manifest = SimpleNamespace(files=[], relative=str)
    guard = StepGuard(ranks, lambda: 0, Watchdog(tmp_path, ranks, 60), Attempts(tmp_path), manifest)
    cursor = Cursor(epoch=0, step=3, rows=4, local_rows=2)
    guard.begin(4)
    with pytest.raises(UserError, match="rank 1: the loss of step 4 is nan, in batch 3 of epoch 0"):
        guard.check(torch.tensor(float("nan")), torch.tensor([0.5, float("nan")]), cursor)
    with pytest.raises(RuntimeError, match="Connection closed"):
        guard.check(torch.tensor(0.5), torch.zeros(2), cursor)
