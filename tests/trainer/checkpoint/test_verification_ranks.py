"""Verifying together: every byte is read once, whoever finds damage tells all, and nobody waits for ever."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.jobs import ranks_of
from tests.helpers.made_checkpoints import commit, whole
from tests.helpers.ranks import run_distributed
from trainer.checkpoint import Reader, local, read_manifest, verification
from trainer.checkpoint.loading import load
from trainer.checkpoint.paths import Unreachable
from trainer.checkpoint.verification import newest_whole, shares, verify_together
from trainer.runtime.distributed import on_ranks

FACTS = {"progress": {"step": 0, "rows": 0, "epoch": 0, "epoch_step": 0}, "identity": {}}


class State:
    """The tables that ``saved`` writes, and the step of the facts they came with."""

    def __init__(self) -> None:
        self.tables = [torch.zeros(100 * (n + 1), 4) for n in range(3)]
        self.pieces = [whole(f"tables/t{n}/weight", table) for n, table in enumerate(self.tables)]
        self.step = None

    def restore(self, facts: dict, reader: Reader) -> None:
        self.step = facts["progress"]["step"]


def saved(folder, step):
    """Of three ranks, files of unequal sizes."""
    tables = [[whole(f"tables/t{n}/weight", torch.full((100 * (n + 1), 4), float(step)))] for n in range(3)]
    facts = {**FACTS, "progress": {**FACTS["progress"], "step": step}}
    return commit(folder / f"step-{step}", *tables, facts=facts, texts={"data.json": "{}"})


def hashed_while(work):
    """(name, bytes) of every file that any rank has hashed meanwhile."""
    real, mine = local.Local.chunks, []

    def chunks(self, path):
        for chunk in real(self, path):
            mine.append((f"{path.parent.name}/{path.name}", len(chunk)))
            yield chunk

    local.Local.chunks = chunks
    try:
        work()
    finally:
        local.Local.chunks = real
    return [portion for found in on_ranks(mine) for portion in found]


def check_all(rank, world_size, folder):
    folder, ranks = Path(folder), ranks_of(rank, world_size)
    verification.ROUND_SECONDS = 0.0  # every portion is a round: ranks with more of them do not lose the others
    if ranks.is_first:
        first, second = saved(folder, 1), saved(folder, 2)
    dist.barrier()
    first, second = folder / "step-1", folder / "step-2"
    state = State()

    def resume():
        path = newest_whole(folder, "fallback", ranks, lambda: signs.append(1))
        load(path, state, ranks, verified=True)

    signs = []
    read = hashed_while(resume)
    sizes = {f"step-2/{name}": entry["bytes"] for name, entry in read_manifest(second).items()}
    assert sorted(read) == sorted(sizes.items()), "each byte once, by whatever rank; no second time to load it"
    assert signs and state.step == 2 and all((table == 2).all() for table in state.tables)
    falls_back(folder, ranks, state)
    one_rank_cannot_read(first, ranks)


def falls_back(folder, ranks, state):
    """Damage in a file that the last rank hashes: the one before, with its own facts; or an error, on every rank."""
    name = shares(read_manifest(folder / "step-2"), ranks.world_size)[-1][0]
    if ranks.is_first:
        path = folder / "step-2" / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    dist.barrier()
    damage = f"rank {ranks.world_size - 1}: {name} differs from MANIFEST.json: damaged or replaced"
    assert verify_together(folder / "step-2", ranks) == damage
    path = newest_whole(folder, "fallback", ranks)
    assert path.name == "step-1"
    load(path, state, ranks, verified=True)
    assert state.step == 1 and all((table == 1).all() for table in state.tables)
    with pytest.raises(ValueError, match=r"step-2: rank .* differs .*checkpoint.on_corrupt=fallback"):
        newest_whole(folder, "error", ranks)
    with pytest.raises(ValueError, match=r"step-2: rank .* differs"):
        load(folder / "step-2", state, ranks)


class _Unsendable(Exception):
    """It cannot be unpickled: its constructor needs more than its message."""

    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


def one_rank_cannot_read(path, ranks):
    real = local.Local.chunks

    def failing(self, path):
        if ranks.rank == ranks.world_size - 1:
            raise error
        return real(self, path)

    local.Local.chunks = failing
    try:
        error = OSError(5, "Input/output error")
        assert f"rank {ranks.world_size - 1}: " in (problem := verify_together(path, ranks))
        assert "cannot be read ([Errno 5] Input/output error)" in problem
        for error in (Unreachable("the store does not answer"), KeyError("a bug")):
            with pytest.raises(type(error)):
                verify_together(path, ranks)
        error = _Unsendable(1, 2)
        with pytest.raises(RuntimeError, match="_Unsendable: "):
            verify_together(path, ranks)
    finally:
        local.Local.chunks = real
    assert verify_together(path, ranks) is None


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_resume_hashes_once_together_and_falls_back(tmp_path, world_size):
    run_distributed(check_all, world_size, str(tmp_path))


def test_shares_are_even_and_whole():
    manifest = {f"rank-{n:05}": {"bytes": size} for n, size in enumerate([70, 10, 50, 40, 30, 5, 5])}
    found = shares(manifest, 3)
    assert sorted(name for names in found for name in names) == sorted(manifest)
    assert sorted(sum(manifest[name]["bytes"] for name in names) for names in found) == [70, 70, 70]
    assert shares({"a": {"bytes": 3}}, 2) == [["a"], []] and json.dumps(found) == json.dumps(shares(manifest, 3))
