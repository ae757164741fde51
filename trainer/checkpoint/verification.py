"""Whether a checkpoint is whole, asked of all ranks together: each hashes its share of the bytes, so that every byte is read
once.

The ranks meet every ``ROUND_SECONDS``, however long the hashing takes: no collective waits for longer than that, and no
watchdog takes hashing for a hang.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from trainer.checkpoint.folder import committed, first_whole
from trainer.checkpoint.format import verify
from trainer.checkpoint.manifest import hashing, read_manifest
from trainer.checkpoint.paths import AnyPath
from trainer.runtime.distributed import Ranks, from_first, on_ranks, sendable

ROUND_SECONDS = 5.0


def newest_whole(
    folder: AnyPath, on_corrupt: str, ranks: Ranks, alive: Callable[[], None] = lambda: None
) -> AnyPath | None:
    """As ``folder.newest``, on all ranks together. ``alive`` is called now and then."""
    paths = from_first(lambda: committed(folder))
    return first_whole(paths, on_corrupt, lambda path: verify_together(path, ranks, alive), say=ranks.is_first)


def verify_together(path: AnyPath, ranks: Ranks, alive: Callable[[], None] = lambda: None) -> str | None:
    """As ``format.verify``: the same answer on all ranks, which call it together. What keeps one of them from reading is
    an answer, too; a store that does not answer (``Unreachable``) is an error on all of them."""
    problem, manifest = from_first(lambda: _outline(path))
    if problem is not None:
        return problem
    mine = shares(manifest, ranks.world_size)[ranks.rank]
    return _in_rounds(hashing(path, {name: manifest[name] for name in mine}), alive)


def shares(manifest: Mapping[str, Mapping[str, Any]], world_size: int) -> list[list[str]]:
    """The files that each rank hashes: the largest first, each to the rank that has the fewest bytes until then."""
    names: list[list[str]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for name in sorted(manifest, key=lambda name: (-manifest[name]["bytes"], name)):
        rank = loads.index(min(loads))
        names[rank].append(name)
        loads[rank] += manifest[name]["bytes"]
    return names


def _outline(path: AnyPath) -> tuple[str | None, dict[str, Any]]:
    """All but the bytes, on rank 0."""
    problem = verify(path, hashes=False)
    return problem, {} if problem else read_manifest(path)


def _in_rounds(work: Iterator[str | None], alive: Callable[[], None]) -> str | None:
    """Carries on ``work`` until all ranks are done or one has found something: the first finding, by rank. An exception of
    any rank is raised on all of them."""
    found, error, done = None, None, False
    while True:
        try:
            done, found = _one_round(work)
        except Exception as raised:  # noqa: BLE001 - handed on to every rank, so that none waits for this one
            error = sendable(raised)
        alive()
        state = torch.tensor([not done, found is not None or error is not None], dtype=torch.int32)
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        working, over = state.tolist()
        if over or not working:
            break
    outcomes = on_ranks((found, error))
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return next((f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(outcomes) if problem), None)


def _one_round(work: Iterator[str | None]) -> tuple[bool, str | None]:
    """Whether the work is done, and what it found."""
    until = time.monotonic() + ROUND_SECONDS
    for found in work:
        if found is not None or time.monotonic() > until:
            return found is not None, found
    return True, None
