"""When checkpoints are written, and how all ranks agree that one counts.

A save begins with a snapshot: each rank copies its pieces into memory of its own, which training waits for. From there a
thread of each rank writes and hashes them, while training goes on. At each step the ranks ask each other whether all have
written; then rank 0 adds the facts and the manifest and renames the folder, in a thread again, and its verdict is
told to all. At any instant one save is under way at most, and no thread communicates: collectives are called by training
alone, at the same steps on all ranks.

With ``asynchronous: false`` there is no snapshot: training waits until the checkpoint is there.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from data_loaders.errors import UserError
from data_loaders.messages import note, one_line, warn
from trainer.checkpoint import folder as folders
from trainer.checkpoint.format import Reader, write_commit_files, write_pieces
from trainer.checkpoint.manifest import FACTS, JOB_FACTS, check_identity, read_json
from trainer.checkpoint.paths import AnyPath, Attempt
from trainer.checkpoint.piece import Piece
from trainer.checkpoint.place import place_of
from trainer.checkpoint.tensor_file import place_tensors
from trainer.checkpoint.verification import newest_whole, verify_together
from trainer.config.checkpoint import CheckpointConfig
from trainer.runtime import fault_injection
from trainer.runtime.distributed import Ranks, from_first, on_all, on_all_ranks, on_ranks
from trainer.runtime.progress import Progress
from trainer.runtime.run_folder import now

CLOCK_STEPS = 16  # rank 0's clock is asked so often: it costs a broadcast
RETRY_STEPS = 32  # from a failed save to the next attempt
NICENESS = 10  # of the writing threads: training goes first
WORTH_TELLING = 100_000_000  # bytes of a snapshot
SNAPSHOT_SHARE = 0.8  # of the free memory that a snapshot may take


class State(Protocol):
    """What is saved. ``pieces`` are live memory that stays where it is; ``snapshot`` makes further ones for a save, all
    ranks together; ``facts`` are JSON, rank 0's count; ``restore`` gets the facts and the reader once the pieces are
    loaded."""

    pieces: Sequence[Piece]

    def snapshot(self) -> Sequence[Piece]: ...

    def facts(self) -> dict[str, Any]: ...

    def restore(self, facts: Mapping[str, Any], reader: Reader) -> None: ...


@dataclass
class _Job:
    """Work of a thread, whose outcome the ranks will ask for."""

    work: Callable[[], Any]
    result: Any = None
    error: BaseException | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        if hasattr(os, "setpriority") and hasattr(threading, "get_native_id"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self.result = self.work()
        except BaseException as error:  # noqa: BLE001 - told to all ranks by whoever asks
            self.error = error

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()

    @property
    def failure(self) -> tuple[str, bool] | None:
        """What went wrong, and whether another attempt may succeed."""
        return None if self.error is None else (_reason(self.error), isinstance(self.error, OSError))


@dataclass
class _Save:
    """One under way: first every rank writes, then rank 0 commits (``committing``; None elsewhere)."""

    step: int
    attempt: Attempt
    facts: dict[str, Any]
    writing: _Job
    committing: _Job | None = None
    written: bool = False
    is_there: bool = False  # whatever happens behind the commit

    def commit(self, work: Callable[[], None] | None) -> None:
        """All ranks have written; ``work`` is rank 0's."""
        self.written = True
        self.committing = _Job(work) if work is not None else None

    def published(self) -> None:
        self.is_there = True


class Checkpoints:
    """Saves at its own cadence and loads the newest whole checkpoint of a folder. All ranks call it at the same steps.

    ``identity`` is what must not change between saving and resuming (schema, model, batch size …), compared key by key;
    ``texts`` are further files of every checkpoint, by name (rank 0). ``before_commit`` runs on every rank of a save: what
    a checkpoint vouches for and does not hold itself must be on disk when it returns; an ``OSError`` fails the save.
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
    ) -> None:
        self.folder, self.config, self.state, self.identity, self.ranks = folder, config, state, identity, ranks
        self.place = place_of(folder)
        self.texts, self.before_commit = texts or {}, before_commit
        self.seconds = 0.0  # that training has waited
        self._save: _Save | None = None
        self._staging: list[Tensor] | None = None
        self._last_step, self._last_time = -1, time.monotonic()
        self._retry_step: int | None = None
        self._failures = 0
        self._best = from_first(lambda: folders.read_best(folder))
        self.asynchronous = config.asynchronous and self._memory_suffices()
        if self.asynchronous and ranks.is_first and self.bytes_per_rank >= WORTH_TELLING:
            note(f"A checkpoint's snapshot takes {self.bytes_per_rank / 1e6:,.0f} MB of rank 0's memory")

    @property
    def bytes_per_rank(self) -> int:
        """Of this rank's pieces, and so of its snapshot."""
        return sum(_bytes(piece) for piece in self._written())

    @property
    def under_way(self) -> bool:
        return self._save is not None

    def maybe_save(self, progress: Progress) -> None:
        """Goes on with the save under way, and begins one when ``every_steps`` or ``every_minutes`` is due."""
        with self._waiting():
            if self._save is not None:
                self._advance(wait=False)
            if self._is_due(progress.step):
                self._begin_or_save(progress)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """What it surrounds is waited for by training."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def save(self, progress: Progress) -> AnyPath:
        """Writes ``step-N``, and returns when it is there. A ``step-N`` that this run neither wrote nor loaded is a damaged
        one that was passed over: it is replaced. Raises ``OSError`` on every rank when any rank could not write, even
        when it tried again, and ``UserError`` where the state is not finite."""
        with self._waiting():
            for attempt in range(2):
                if self._last_step != progress.step and (self._save is None or self._save.step != progress.step):
                    self.begin(progress)
                failed = self.finish(last=attempt == 1)
                if not failed:
                    break
        return self.folder / f"step-{progress.step}"

    def consider(self, progress: Progress, split: str, metrics: Mapping[str, Any]) -> None:
        """Keeps the checkpoint of this step if it is the best one so far by ``config.best``."""
        where, _, name = (self.config.best or "").rpartition(".")
        value = metrics.get(name)
        if where != split or value is None:
            return
        sign = -1 if name in ("logloss", "ne") else 1
        known = self._best if self._best is not None and self._best["metric"] == self.config.best else None
        if known is not None and sign * value <= sign * known["value"]:
            return
        self._best = {"step": progress.step, "metric": self.config.best, "value": value}
        with self._waiting():
            if self._save is None and self._last_step == progress.step:
                self._name_best()
            elif self._save is None or self._save.step != progress.step:
                self._begin_or_save(progress)

    def finish(self, *, last: bool = False) -> bool:
        """Waits for the save under way; whether it failed. ``last``: a failure is an error, since nobody would retry."""
        return self._advance(wait=True, last=last) if self._save is not None else False

    def load(self, path: AnyPath, progress: Progress | None = None, *, verified: bool = False) -> dict[str, Any]:
        """Loads a committed checkpoint in place, strictly both ways, and returns its facts.

        With ``progress`` the whole job goes on from it; without, only what ``state`` names is read (scoring). ``verified``:
        its bytes have been hashed already (``newest_whole``). Raises ``UserError`` when it is damaged, belongs to another
        model, schema or data, or its names differ.
        """
        problem = None if verified else verify_together(path, self.ranks)
        if problem:
            raise UserError(f"checkpoint {path}: {problem}")
        facts = read_json(path, FACTS, JOB_FACTS)
        if progress is not None:
            check_identity(path, facts["identity"], self.identity)
        reader = Reader(path)
        self._read(reader, weights_only=progress is None)
        self.state.restore(facts, reader)
        if progress is not None:
            progress.load_state_dict(facts["progress"])
            self._last_step = progress.step
        return facts

    def _read(self, reader: Reader, *, weights_only: bool) -> None:
        problem, converted = None, []
        try:
            converted = reader.load(self.state.pieces, weights_only=weights_only)
        except ValueError as error:
            problem = str(error)
        problem = on_all_ranks(problem)
        if problem:
            raise UserError(problem)
        lines = sorted({line for told in on_ranks(converted) for line in told})
        if self.ranks.is_first:
            for line in lines:
                note(f"checkpoint {reader.path.name}: {line}")

    def newest(self) -> AnyPath | None:
        """The newest checkpoint that is whole; what happens to damaged ones is ``config.on_corrupt``."""
        return newest_whole(self.folder, self.config.on_corrupt, self.ranks)

    # When.

    def may_be_due(self, step: int) -> bool:
        """Whether ``maybe_save`` may begin a save at this step: it has yet to look at the clock."""
        return self._is_step_due(step) or self._is_clock_step(step)

    def _is_due(self, step: int) -> bool:
        if self._last_step == step or (self._save is not None and self._save.step == step):
            return False
        return self._is_step_due(step) or (self._is_clock_step(step) and from_first(self._is_time))

    def _is_step_due(self, step: int) -> bool:
        every, retry = self.config.every_steps, self._retry_step
        return (every is not None and step % every == 0) or (retry is not None and step >= retry)

    def _is_clock_step(self, step: int) -> bool:
        return self.config.every_minutes is not None and step % CLOCK_STEPS == 0

    def _is_time(self) -> bool:
        assert self.config.every_minutes is not None
        return time.monotonic() - self._last_time >= 60 * self.config.every_minutes

    # The steps of a save.

    def begin(self, progress: Progress) -> None:
        """Takes the snapshot of this step, and leaves it to be written; an earlier save is waited for."""
        self.finish()
        self._retry_step, self._last_time = None, time.monotonic()
        facts = {
            "progress": progress.state_dict(),
            "identity": self.identity,
            "world_size": self.ranks.world_size,
            "written": now(),
            **self.state.facts(),
        }
        further = list(self.state.snapshot())
        pieces = [*self._written(), *(piece for piece in further if piece.written)]
        attempt = from_first(lambda: self.place.attempt(self.folder, f"step-{progress.step}"))
        needed = sum(on_ranks(sum(map(_bytes, pieces))))
        fault_injection.at("before_snapshot", step=progress.step, rank=self.ranks.rank)
        ready, tensors = self._snapshot(pieces) if self.asynchronous else (lambda: None, None)
        spoilt = None
        try:
            self.before_commit()
        except OSError as error:
            spoilt = error
        work = _Writing(attempt, self.folder, self.ranks.rank, pieces, tensors, ready, needed, progress.step, spoilt)
        self._save = _Save(progress.step, attempt, facts, _Job(work))

    def _begin_or_save(self, progress: Progress) -> None:
        self.begin(progress)
        if not self.asynchronous:
            self.finish()

    def _snapshot(self, pieces: Sequence[Piece]) -> tuple[Callable[[], None], list[Tensor]]:
        """Copies in memory that is kept from save to save; for a GPU, what to wait for until they are there."""
        if self._staging is None:
            live = {str(number): piece.tensor for number, piece in enumerate(pieces)}
            placed = place_tensors(live, pinned=self.ranks.device.type == "cuda")
            self._staging = [placed[number] for number in live]
        for staged, piece in zip(self._staging, pieces, strict=True):
            staged.copy_(piece.tensor, non_blocking=True)
        if self.ranks.device.type != "cuda":
            return lambda: None, self._staging
        event = torch.cuda.Event()
        event.record()  # on the stream of training: the next step's updates come after the copies
        return event.synchronize, self._staging

    def _advance(self, *, wait: bool, last: bool = False) -> bool:
        """One question to all ranks, or (``wait``) as many as it takes. Whether the save failed."""
        save = self._save
        assert save is not None
        while self._save is save:
            job = save.committing if save.written else save.writing
            if job is not None and wait:
                job.thread.join()
            if not on_all(job is None or job.done):
                return False
            failures = on_ranks(job.failure if job is not None else None)
            for rank, failure in enumerate(failures):
                if failure is not None:
                    self._give_up(save, f"rank {rank}: {failure[0]}", last, transient=failure[1])
                    return True
            if save.written:
                self._succeeded(save)
            else:
                self._start_commit(save)
            if not wait:
                return False
        return False

    def _start_commit(self, save: _Save) -> None:
        parts = on_ranks(save.writing.result)
        save.commit((lambda: self._commit(save, parts)) if self.ranks.is_first else None)

    def _commit(self, save: _Save, parts: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Rank 0, in a thread."""

        def reached(phase: str) -> None:
            fault_injection.at(phase, step=save.step, rank=0)

        reached("before_manifest")
        self.place.clear(save.attempt)
        write_commit_files(save.attempt.part, parts, save.facts, self.texts)
        reached("before_rename")
        self.place.publish(save.attempt)
        reached("before_fsync")
        self.place.flush(self.folder)
        save.published()
        reached("during_prune")
        folders.prune(self.folder, self.config.keep)

    def _succeeded(self, save: _Save) -> None:
        self._save, self._failures = None, 0
        self._last_step = save.step
        if self._best is not None and self._best["step"] == save.step:
            self._name_best()

    def _name_best(self) -> None:
        try:
            from_first(lambda: folders.write_best(self.folder, self._best))
        except OSError as error:  # on all ranks alike
            if self.ranks.is_first:
                warn(f"{self.folder / folders.BEST} could not be written ({error})")

    def _give_up(self, save: _Save, reason: str, last: bool, *, transient: bool) -> None:
        """Nothing of it stays; a later attempt, or an error on every rank."""
        self._save = None
        self._failures += 1
        if self.ranks.is_first and not save.is_there:
            self.place.discard(save.attempt)
        message = f"checkpoint step-{save.step} could not be written to {self.folder} ({reason})"
        if not transient:
            raise UserError(f"{message}; earlier checkpoints are untouched")
        if last or self._failures > self.config.max_failures:
            raise OSError(f"{message}, failure {self._failures} in a row; earlier checkpoints are untouched")
        self._retry_step = save.step + RETRY_STEPS
        if self.ranks.is_first:
            warn(
                f"{message}; training goes on, earlier checkpoints are untouched, the next attempt comes soon "
                f"(failure {self._failures}, after {self.config.max_failures} the run ends)"
            )

    def _written(self) -> list[Piece]:
        return [piece for piece in self.state.pieces if piece.written]

    def _memory_suffices(self) -> bool:
        """The same answer on all ranks; where it is no, rank 0 says so."""
        needed, free = self.bytes_per_rank, psutil.virtual_memory().available
        share = SNAPSHOT_SHARE * free / self.ranks.local_world_size
        verdict = on_all(needed <= share)
        if not verdict and self.ranks.is_first:
            warn(
                f"a snapshot of {needed / 1e9:.2f} GB a rank does not fit into the memory that is free "
                f"({free / 1e9:.2f} GB for {self.ranks.local_world_size} rank(s)): training will wait for checkpoints "
                "(checkpoint.asynchronous=false says the same without this line)"
            )
        return verdict


@dataclass
class _Writing:
    """What a rank's thread does in a save: (file name, its entries)."""

    attempt: Attempt
    folder: AnyPath
    rank: int
    pieces: Sequence[Piece]
    tensors: Sequence[Tensor] | None
    ready: Callable[[], None]
    needed: int
    step: int
    spoilt: OSError | None = None

    def __call__(self) -> tuple[str, dict[str, Any]]:
        if self.spoilt is not None:
            raise self.spoilt
        place = place_of(self.folder)
        place.prepare(self.attempt)
        free = place.free_bytes(self.folder)
        if free is not None and free < self.needed:
            raise OSError(f"the disk is full: {self.needed:,} bytes are needed, {free:,} are free: make room")
        self.ready()
        fault_injection.at("during_write", step=self.step, rank=self.rank)
        name = self.attempt.file(self.rank)
        return name, write_pieces(self.attempt.part / name, self.pieces, self.tensors).to_dict()


def _bytes(piece: Piece) -> int:
    return piece.tensor.numel() * piece.tensor.element_size()


def _reason(error: BaseException) -> str:
    return one_line(error if isinstance(error, (OSError, UserError)) else f"{type(error).__name__}: {error}")
