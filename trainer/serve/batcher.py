"""One thread that scores whatever waits: requests that came while it was busy are merged, nothing is waited for.

What a request costs is mostly decoding, whatever its rows: 16 merged ones take a third of the time of 16 single ones.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.serve.scorer import Request, Scorer


class Overloaded(Exception):
    """More requests wait than may."""


class TooLate(Exception):
    """The request's time was over before it was scored."""


@dataclass(frozen=True)
class Scored:
    """``logits`` [N] of one request, all by ``scorer``, together with ``merged`` requests."""

    logits: NDArray[np.float32]
    scorer: Scorer
    merged: int


@dataclass(frozen=True)
class Job:
    """``make`` reads the request for a scorer, as another one may have other columns. ``deadline``: of time.monotonic()."""

    make: Callable[[Scorer], Request]
    deadline: float
    answer: "asyncio.Future[Scored]"
    loop: asyncio.AbstractEventLoop

    def resolve(self, result: Scored | Exception) -> None:
        """From any thread; a client that has gone meanwhile wants no answer."""

        def set_it() -> None:
            if not self.answer.done():
                if isinstance(result, Exception):
                    self.answer.set_exception(result)
                else:
                    self.answer.set_result(result)

        self.loop.call_soon_threadsafe(set_it)


class Batcher:
    """``score`` from the event loop; ``swap`` from any thread. Every answer is wholly of one model."""

    def __init__(self, scorer: Scorer, *, max_rows: int, max_waiting: int) -> None:
        self.scorer, self.max_rows, self.max_waiting = scorer, max_rows, max_waiting
        self._waiting: deque[Job] = deque()
        self._arrived = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def swap(self, scorer: Scorer) -> None:
        self.scorer = scorer

    async def score(self, make: Callable[[Scorer], Request], deadline: float) -> Scored:
        """Raises ``Overloaded``, ``TooLate``, and ``UserError`` for a request that cannot be scored."""
        loop = asyncio.get_running_loop()
        job = Job(make, deadline, loop.create_future(), loop)
        with self._arrived:
            if len(self._waiting) >= self.max_waiting:
                raise Overloaded
            self._waiting.append(job)
            self._arrived.notify()
        return await job.answer

    def close(self) -> None:
        """Ends the thread once it has answered all that waits."""
        with self._arrived:
            self._closed = True
            self._arrived.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._waiting or self._closed)
                jobs = list(self._waiting)
                self._waiting.clear()
            if not jobs:
                return
            scorer = self.scorer
            for batch in self._batches(self._read(jobs, scorer)):
                self._answer(batch, scorer)

    def _read(self, jobs: Iterable[Job], scorer: Scorer) -> Iterable[tuple[Job, Request]]:
        for job in jobs:
            if time.monotonic() > job.deadline:
                job.resolve(TooLate())
                continue
            try:
                yield job, job.make(scorer)
            except Exception as error:  # noqa: BLE001 - it is the client's answer
                job.resolve(error)

    def _batches(self, read: Iterable[tuple[Job, Request]]) -> Iterable[list[tuple[Job, Request]]]:
        """Requests with the same columns, up to ``max_rows`` candidates."""
        open_batches: dict[tuple[tuple[str, ...], tuple[str, ...]], list[tuple[Job, Request]]] = {}
        rows: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
        for job, request in read:
            key = tuple(request.context.column_names), tuple(request.candidates.column_names)
            count = request.candidates.num_rows
            if key in open_batches and rows[key] + count > self.max_rows:
                yield open_batches.pop(key)
            if key not in open_batches:
                open_batches[key], rows[key] = [], 0
            open_batches[key].append((job, request))
            rows[key] += count
        yield from open_batches.values()

    def _answer(self, batch: Sequence[tuple[Job, Request]], scorer: Scorer) -> None:
        try:
            found = scorer.logits([request for _, request in batch])
        except Exception as error:  # noqa: BLE001 - it is the client's answer
            if len(batch) == 1:
                batch[0][0].resolve(error)
                return
            for each in batch:  # one of them is at fault, and no other shall bear it
                self._answer([each], scorer)
            return
        for (job, _), logits in zip(batch, found):
            job.resolve(Scored(logits, scorer, len(batch)))
