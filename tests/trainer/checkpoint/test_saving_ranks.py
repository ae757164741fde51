"""Saving on two ranks: what must be on disk before a commit, that training goes on meanwhile, and what happens where one
rank cannot write."""

import json
import threading
from pathlib import Path

import pytest
import torch

from tests.helpers import warm
from tests.helpers.jobs import ranks_of
from tests.helpers.ranks import run_distributed
from tests.helpers.saving import Part, table
from trainer.checkpoint import committed, read_best, verify
from trainer.checkpoint import save as save_module
from trainer.checkpoint.loading import load
from trainer.checkpoint.saving import Checkpoints
from trainer.config.checkpoint import CheckpointConfig
from trainer.runtime.progress import Progress


def commits(folder, ranks):
    """What a checkpoint vouches for is on disk before it is there, on all ranks; and none is there where one failed."""

    def write() -> None:
        assert not list(folder.glob("step-*")) or written.exists()
        if broken:
            raise OSError("no space left")
        written.write_text("here")

    written, broken = folder / f"ledger-of-rank-{ranks.rank}", False
    texts = {"data.json": json.dumps({"files": ["ä"]})}
    part = Part(1.0, ranks)
    checkpoints = Checkpoints(folder, CheckpointConfig(), part, {}, ranks, texts=texts, before_commit=write)
    first = checkpoints.save(Progress(step=1))
    assert all((folder / f"ledger-of-rank-{r}").exists() for r in range(ranks.world_size))
    assert verify(first) is None and (first / "data.json").read_text() == texts["data.json"]
    assert "data.json" in json.loads((first / "MANIFEST.json").read_text())
    assert table(first) == [1.0, 2.0]

    broken = ranks.rank == 1
    with pytest.raises(OSError, match="rank 1: no space left"):
        checkpoints.save(Progress(step=2))
    torch.distributed.barrier()
    assert committed(folder) == [first] and verify(first) is None
    torch.distributed.barrier()
    broken = False
    second = checkpoints.save(Progress(step=2))
    assert committed(folder) == [second, first]


def replaces(folder, ranks):
    """A damaged checkpoint that a run has passed over does not stand in the way of a whole one of the same step."""
    part = Part(2.0, ranks)
    damaged = Checkpoints(folder, CheckpointConfig(), part, {}, ranks).save(Progress(step=7))
    torch.distributed.barrier()
    if ranks.is_first:
        (damaged / "state.json").write_text("{")
    torch.distributed.barrier()
    part.fill(5.0)
    assert Checkpoints(folder, CheckpointConfig(), part, {}, ranks).save(Progress(step=7)) == damaged
    assert verify(damaged) is None
    fresh = Part(0.0, ranks)
    load(damaged, fresh, ranks)
    assert fresh.row.tolist() == [[5.0] * 4] and fresh.dense.tolist() == [5.0] * 3 and fresh.restored == 7
    assert [path.name for path in folder.iterdir()] == ["step-7"]


def goes_on(folder, ranks):
    """While a snapshot is written training changes the tensors; the next save waits for the one under way."""
    part, gate = Part(1.0, ranks), threading.Event()
    real = save_module.write_pieces

    def slow(*arguments):
        assert gate.wait(warm.PATIENCE)
        return real(*arguments)

    save_module.write_pieces = slow
    try:
        checkpoints = Checkpoints(folder, CheckpointConfig(every_steps=10), part, {}, ranks)
        for step in range(10, 20):
            checkpoints.maybe_save(Progress(step=step))
            part.fill(-step)
            assert committed(folder) == []
        threading.Timer(0.5 * ranks.rank, gate.set).start()  # rank 1 is later than rank 0
        checkpoints.maybe_save(Progress(step=20))
        assert committed(folder)[-1].name == "step-10"
        checkpoints.finish()
    finally:
        save_module.write_pieces = real
    torch.distributed.barrier()
    assert [path.name for path in committed(folder)] == ["step-20", "step-10"]
    assert table(folder / "step-10") == [1.0, 2.0] and table(folder / "step-20") == [-19.0, -19.0]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def tries_again(folder, ranks):
    """Failures are told and tried again so many times; then the run ends on every rank, its checkpoints as they were."""
    part, failures = Part(1.0, ranks), 2
    real = save_module.write_pieces

    def failing(*arguments):
        nonlocal failures
        if ranks.rank == 1 and failures:
            failures -= 1
            raise OSError(28, "No space left on device")
        return real(*arguments)

    save_module.write_pieces = failing
    try:
        checkpoints = Checkpoints(folder, CheckpointConfig(every_steps=1000, max_failures=2), part, {}, ranks)
        for step in range(1000, 1100):
            checkpoints.maybe_save(Progress(step=step))
            if checkpoints._save is not None and checkpoints._save._work is not None:
                checkpoints._save._work.thread.join()
        assert [path.name for path in committed(folder)] == ["step-1064"]  # two failures, 32 steps apart
        failures = 100
        with pytest.raises(OSError, match=r"rank 1: .*No space left on device.*failure 3 in a row"):
            for step in range(2000, 3000):
                checkpoints.maybe_save(Progress(step=step))
        for asynchronous in (True, False):
            config = CheckpointConfig(asynchronous=asynchronous, max_failures=2)
            checkpoints = Checkpoints(folder, config, part, {}, ranks)
            with pytest.raises(OSError, match=r"rank 1: .*No space left on device.*failure 2 in a row"):
                checkpoints.save(Progress(step=3000))  # the last one of a run: nobody would retry later
    finally:
        save_module.write_pieces = real
    torch.distributed.barrier()
    assert [path.name for path in folder.iterdir()] == ["step-1064"] and verify(folder / "step-1064") is None


def refuses_nan(folder, ranks):
    part = Part(1.0, ranks)
    checkpoints = Checkpoints(folder, CheckpointConfig(), part, {}, ranks)
    first = checkpoints.save(Progress(step=1))
    if ranks.rank == 1:
        part.row[0, 2] = float("nan")
    with pytest.raises(ValueError, match=r"rank 1: .*tables/t/weight"):
        checkpoints.save(Progress(step=2))
    torch.distributed.barrier()
    assert committed(folder) == [first]


def keeps_the_best(folder, ranks):
    part = Part(1.0, ranks)
    checkpoints = Checkpoints(folder, CheckpointConfig(best="valid.auc"), part, {}, ranks)
    for step, auc in enumerate((0.6, 0.9, 0.7, None, 0.8), 1):
        checkpoints.consider(Progress(step=step), "valid", {"auc": auc})
        checkpoints.consider(Progress(step=step), "test", {"auc": 1.0})
        checkpoints.save(Progress(step=step))
    torch.distributed.barrier()
    assert [path.name for path in committed(folder)] == ["step-5", "step-4", "step-2"]
    assert read_best(folder) == {"step": 2, "metric": "valid.auc", "value": 0.9}
    again = Checkpoints(folder, CheckpointConfig(best="valid.auc"), part, {}, ranks)  # a resumed run knows it
    again.consider(Progress(step=6), "valid", {"auc": 0.85})
    again.save(Progress(step=7))
    torch.distributed.barrier()
    assert [path.name for path in committed(folder)] == ["step-7", "step-5", "step-2"]


CASES = (commits, replaces, goes_on, tries_again, refuses_nan, keeps_the_best)


def all_cases(rank, world_size, folder):
    for case in CASES:
        own = Path(folder) / case.__name__
        if rank == 0:
            own.mkdir()
        torch.distributed.barrier()
        case(own, ranks_of(rank, world_size))
        torch.distributed.barrier()


def test_saving_on_two_ranks(tmp_path):
    run_distributed(all_cases, 2, str(tmp_path))
