"""Saving while training goes on: which steps are saved, and how all ranks agree that a checkpoint counts.

A save begins with a snapshot: each rank copies its pieces into memory of its own, which training waits for. The rest goes on
beside training (``save``): at each step the ranks ask each other how far it is. At any instant one save is under way at
most. With ``asynchronous: false`` there is no snapshot: training waits until the checkpoint is there.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from data_loaders.errors import UserError
from data_loaders.messages import warn
from trainer.checkpoint.best import Best
from trainer.checkpoint.cadence import Cadence
from trainer.checkpoint.paths import AnyPath
from trainer.checkpoint.piece import Piece
from trainer.checkpoint.place import place_of
from trainer.checkpoint.save import Save
from trainer.checkpoint.snapshot import Snapshot, bytes_of, has_room
from trainer.config.checkpoint import CheckpointConfig
from trainer.runtime import fault_injection
from trainer.runtime.distributed import Ranks, from_first, on_ranks
from trainer.runtime.progress import Progress
from trainer.runtime.run_folder import now


class State(Protocol):
    """What is saved. ``pieces`` are live memory that stays where it is; ``snapshot`` makes further ones for a save, all
    ranks together; ``facts`` are JSON, rank 0's count."""

    pieces: Sequence[Piece]

    def snapshot(self) -> Sequence[Piece]: ...

    def facts(self) -> dict[str, Any]: ...


class Checkpoints:
    """Saves at its own cadence. All ranks call it at the same steps.

    ``identity`` is what must not change between saving and resuming (schema, model, batch size …); ``texts`` are further
    files of every checkpoint, by name (rank 0). ``before_commit`` runs on every rank of a save: what a checkpoint vouches
    for and does not hold itself must be on disk when it returns; an ``OSError`` fails the save. ``saved_step``: of the
    checkpoint that the run resumes from.
    """

    def __init__(
        self,
        folder: AnyPath,
        config: CheckpointConfig,
        state: State,
        identity: Mapping[str, Any],
        ranks: Ranks,
        *,
        texts: Mapping[str, str] | None = None,
        before_commit: Callable[[], None] = lambda: None,
        saved_step: int | None = None,
    ) -> None:
        self.folder, self.config, self.state, self.identity, self.ranks = folder, config, state, identity, ranks
        self.texts, self.before_commit = texts or {}, before_commit
        self.seconds = 0.0  # that training has waited
        self._save: Save | None = None
        self._saved_step, self._failures = saved_step, 0
        self._cadence, self._best = Cadence(config), Best(folder, config.best, ranks)
        fits = config.asynchronous and has_room(state.pieces, ranks)
        self._snapshot = Snapshot(ranks.device) if fits else None

    @property
    def asynchronous(self) -> bool:
        return self._snapshot is not None

    @property
    def under_way(self) -> bool:
        return self._save is not None

    def may_be_due(self, step: int) -> bool:
        """Whether ``maybe_save`` may begin a save at this step: it has yet to look at the clock."""
        return self._cadence.may_be_due(step)

    def maybe_save(self, progress: Progress) -> None:
        """Goes on with the save under way, and begins one when ``every_steps`` or ``every_minutes`` is due."""
        with self._waiting():
            self._advance(wait=False)
            if not self._has(progress.step) and self._cadence.is_due(progress.step):
                self._begin_or_save(progress)

    def save(self, progress: Progress) -> AnyPath:
        """Writes ``step-N``, and returns when it is there. A ``step-N`` that this run neither wrote nor loaded is a damaged
        one that was passed over: it is replaced. Raises ``OSError`` on every rank when any rank could not write, even
        when it tried again, and ``UserError`` where the state is not finite."""
        with self._waiting():
            for last in (False, True):
                if not self._has(progress.step):
                    self.begin(progress)
                if not self._advance(wait=True, last=last):
                    break
        return self.folder / f"step-{progress.step}"

    def consider(self, progress: Progress, split: str, metrics: Mapping[str, Any]) -> None:
        """Keeps the checkpoint of this step if it is the best one so far by ``config.best``."""
        if not self._best.is_improved_by(progress.step, split, metrics):
            return
        with self._waiting():
            if not self._has(progress.step):
                self._begin_or_save(progress)
            elif self._save is None:
                self._best.committed(progress.step)

    def finish(self) -> None:
        """Waits for the save under way."""
        self._advance(wait=True)

    def begin(self, progress: Progress) -> None:
        """Takes the snapshot of this step, and leaves it to be written; an earlier save is waited for."""
        self.finish()
        self._cadence.begun()
        facts = {
            "progress": progress.state_dict(),
            "identity": self.identity,
            "world_size": self.ranks.world_size,
            "written": now(),
            **self.state.facts(),
        }
        pieces = [piece for piece in (*self.state.pieces, *self.state.snapshot()) if piece.written]
        attempt = from_first(lambda: place_of(self.folder).attempt(self.folder, f"step-{progress.step}"))
        needed = sum(on_ranks(bytes_of(pieces)))
        fault_injection.at("before_snapshot", step=progress.step, rank=self.ranks.rank)
        self._save = Save(
            attempt=attempt,
            pieces=pieces,
            tensors=self._snapshot.take(pieces) if self._snapshot is not None else lambda: None,
            needed=needed,
            spoilt=self._spoilt(),
            facts=facts,
            texts=self.texts,
            keep=self.config.keep,
            ranks=self.ranks,
        )

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """What it surrounds is waited for by training."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def _has(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is there, or under way."""
        return step == self._saved_step or (self._save is not None and self._save.step == step)

    def _begin_or_save(self, progress: Progress) -> None:
        self.begin(progress)
        if not self.asynchronous:
            self.finish()

    def _spoilt(self) -> OSError | None:
        try:
            self.before_commit()
        except OSError as error:
            return error
        return None

    def _advance(self, *, wait: bool, last: bool = False) -> bool:
        """Whether the save under way, if any, has failed. ``last``: that is an error, since nobody would retry."""
        save = self._save
        if save is None or not save.advance(wait=wait):
            return False
        self._save = None
        if save.failure is not None:
            self._failed(save, *save.failure, last=last)
            return True
        self._failures, self._saved_step = 0, save.step
        self._best.committed(save.step)
        return False

    def _failed(self, save: Save, reason: str, transient: bool, *, last: bool) -> None:
        """Nothing of it stays; a later attempt, or an error on every rank."""
        self._failures += 1
        if self.ranks.is_first:
            save.discard()
        message = f"checkpoint step-{save.step} could not be written to {self.folder} ({reason})"
        if not transient:
            raise UserError(f"{message}; earlier checkpoints are untouched")
        if last or self._failures > self.config.max_failures:
            raise OSError(f"{message}, failure {self._failures} in a row; earlier checkpoints are untouched")
        self._cadence.failed(save.step)
        if self.ranks.is_first:
            warn(
                f"{message}; training goes on, earlier checkpoints are untouched, the next attempt comes soon "
                f"(failure {self._failures}, after {self.config.max_failures} the run ends)"
            )
