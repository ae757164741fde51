"""A commit on two ranks: what must be on disk first, and what happens where one rank cannot write it."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.helper import run_distributed
from tests.distributed.test_contract import ranks_of
from trainer.checkpoint import Checkpoints, committed, verify
from trainer.config import CheckpointConfig
from trainer.progress import Progress


class Part:
    def __init__(self, value: float) -> None:
        self.tensor = torch.full((3,), value)

    def state_dict(self):
        return {"tensor": self.tensor}

    def load_state_dict(self, state):
        self.tensor = state["tensor"]


def commits(rank, world_size, folder):
    folder, written = Path(folder), Path(folder) / f"ledger-of-rank-{rank}"

    def write() -> None:
        assert not list(folder.glob("step-*")) or written.exists()
        if broken:
            raise OSError("no space left")
        written.write_text("here")

    broken = False
    part, text = Part(1.0), {"data.json": json.dumps({"files": ["ä"]})}
    texts = text if rank == 0 else {}
    checkpoints = Checkpoints(
        folder, CheckpointConfig(), {"part": part}, {}, ranks_of(rank, world_size), texts=texts, before_commit=write
    )
    first = checkpoints.save(Progress(step=1))
    assert all((folder / f"ledger-of-rank-{r}").exists() for r in range(world_size))
    assert verify(first) is None and (first / "data.json").read_text() == text["data.json"]
    assert "data.json" in json.loads((first / "MANIFEST.json").read_text())

    broken = rank == 1
    with pytest.raises(OSError, match="rank 1: no space left"):
        checkpoints.save(Progress(step=2))
    torch.distributed.barrier()
    assert committed(folder) == [first] and verify(first) is None
    torch.distributed.barrier()
    broken = False
    second = checkpoints.save(Progress(step=2))
    assert committed(folder) == [second, first]


def replaces(rank, world_size, folder):
    """A damaged checkpoint that a run has passed over does not stand in the way of a whole one of the same step."""
    folder, part = Path(folder), Part(2.0)
    one = Checkpoints(folder, CheckpointConfig(), {"part": part}, {}, ranks_of(rank, world_size))
    damaged = one.save(Progress(step=7))
    torch.distributed.barrier()
    if rank == 0:
        (damaged / "state.json").write_text("{")
    torch.distributed.barrier()
    part.tensor = torch.full((3,), 5.0)
    again = Checkpoints(folder, CheckpointConfig(), {"part": part}, {}, ranks_of(rank, world_size))
    assert again.save(Progress(step=7)) == damaged
    assert verify(damaged) is None
    fresh = Part(0.0)
    Checkpoints(folder, CheckpointConfig(), {"part": fresh}, {}, ranks_of(rank, world_size)).load(damaged)
    assert fresh.tensor.tolist() == [5.0] * 3
    assert [path.name for path in folder.iterdir()] == ["step-7"]


def both(rank, world_size, folder):
    for name, check in (("commits", commits), ("replaces", replaces)):
        if rank == 0:
            (Path(folder) / name).mkdir()
        torch.distributed.barrier()
        check(rank, world_size, f"{folder}/{name}")


def test_a_commit_comes_after_what_it_vouches_for_and_on_all_ranks_or_none(tmp_path):
    run_distributed(both, 2, str(tmp_path))
