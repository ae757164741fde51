"""One save, from the ranks' files to the commit.

A thread of each rank writes and hashes its pieces while training goes on. Then rank 0 adds the facts and the manifest and
renames the folder, in a thread again. No thread communicates: training asks all ranks for the outcome, at the same steps
on each (``advance``).
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from data_loaders.errors import UserError
from data_loaders.messages import one_line
from trainer.checkpoint.folder import prune, step_of
from trainer.checkpoint.format import write_commit_files, write_pieces
from trainer.checkpoint.paths import Attempt
from trainer.checkpoint.piece import Piece
from trainer.checkpoint.place import place_of
from trainer.runtime import fault_injection
from trainer.runtime.distributed import Ranks, on_all, on_ranks

NICENESS = 10  # of the writing threads: training goes first


class _Work:
    """Work of a thread: its result, or what went wrong and whether another attempt may succeed."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self.outcome: tuple[Any, tuple[str, bool] | None] = None, None
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        if hasattr(os, "setpriority") and hasattr(threading, "get_native_id"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self.outcome = self._work(), None
        except BaseException as error:  # noqa: BLE001 - told to all ranks by whoever asks
            reason = error if isinstance(error, (OSError, UserError)) else f"{type(error).__name__}: {error}"
            self.outcome = None, (one_line(reason), isinstance(error, OSError))


@dataclass(kw_only=True)
class Save:
    """``tensors()``: copies of ``pieces``, to write in place of the live ones. ``needed``: bytes of all ranks. ``spoilt``: why
    this rank must not write. ``failure``: once it has failed, of which rank and why, and whether another attempt may
    succeed."""

    attempt: Attempt
    pieces: Sequence[Piece]
    tensors: Callable[[], Sequence[Tensor] | None]
    needed: int
    spoilt: OSError | None
    facts: Mapping[str, Any]
    texts: Mapping[str, str]
    keep: int
    ranks: Ranks
    failure: tuple[str, bool] | None = None

    def __post_init__(self) -> None:
        self.step, self._folder = step_of(self.attempt.final), self.attempt.final.parent
        self._place = place_of(self._folder)
        self._committing = self._published = False
        self._work: _Work | None = _Work(self._write)

    def advance(self, *, wait: bool) -> bool:
        """One question to all ranks, or (``wait``) as many as it takes: whether it is over, with or without a
        ``failure``."""
        while True:
            if wait and self._work is not None:
                self._work.thread.join()
            if not on_all(self._work is None or not self._work.thread.is_alive()):
                return False
            outcomes = on_ranks(self._work.outcome if self._work is not None else (None, None))
            failures = [(f"rank {rank}: {why[0]}", why[1]) for rank, (_, why) in enumerate(outcomes) if why is not None]
            self.failure = next(iter(failures), None)
            if failures or self._committing:
                return True
            self._committing, commit = True, partial(self._commit, [part for part, _ in outcomes])
            self._work = _Work(commit) if self.ranks.is_first else None
            if not wait:
                return False

    def discard(self) -> None:
        """Nothing of a failed one stays, unless it failed after its commit (rank 0)."""
        if not self._published:
            self._place.discard(self.attempt)

    def _write(self) -> tuple[str, dict[str, Any]]:
        """This rank's file: its name and its entries."""
        if self.spoilt is not None:
            raise self.spoilt
        self._place.prepare(self.attempt)
        free = self._place.free_bytes(self._folder)
        if free is not None and free < self.needed:
            raise OSError(f"the disk is full: {self.needed:,} bytes are needed, {free:,} are free: make room")
        tensors = self.tensors()
        fault_injection.at("during_write", step=self.step, rank=self.ranks.rank)
        name = self.attempt.file(self.ranks.rank)
        return name, write_pieces(self.attempt.part / name, self.pieces, tensors).to_dict()

    def _commit(self, parts: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        def reached(phase: str) -> None:
            fault_injection.at(phase, step=self.step, rank=0)

        reached("before_manifest")
        self._place.clear(self.attempt)
        write_commit_files(self.attempt.part, parts, self.facts, self.texts)
        reached("before_rename")
        self._place.publish(self.attempt)
        reached("before_fsync")
        self._place.flush(self._folder)
        self._published = True
        reached("during_prune")
        prune(self._folder, self.keep)
