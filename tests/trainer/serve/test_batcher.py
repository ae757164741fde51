"""Requests that wait are merged, too many are refused, late ones are not scored, and every answer is of one model."""

import asyncio
import threading
import time

import numpy as np
import pyarrow as pa
import pytest

from data_loaders.errors import UserError
from trainer.serve.batcher import Batcher, Overloaded, TooLate
from trainer.serve.scorer import Request


class FakeScorer:
    """Scores a candidate by its column x plus ``offset``; x < 0 is a mistake. ``gate``: holds the first batch."""

    def __init__(self, offset=0.0):
        self.offset, self.batches, self.gate = offset, [], threading.Event()
        self.gate.set()

    def logits(self, requests):
        self.gate.wait()
        self.batches.append(len(requests))
        found = [request.candidates.column("x").to_numpy() for request in requests]
        if any((x < 0).any() for x in found):
            raise UserError("x is negative")
        return [x + np.float32(self.offset) for x in found]


def asks(*values, context=()):
    candidates = pa.table({"x": pa.array(values, pa.float32())})
    return lambda scorer: Request(pa.table({name: [1] for name in context}), candidates)


@pytest.fixture
def scorer():
    return FakeScorer()


@pytest.fixture
def batcher(scorer):
    made = Batcher(scorer, max_rows=10, max_waiting=5)
    yield made
    scorer.gate.set()
    made.close()


async def held(batcher, scorer, *more):
    """Tasks of ``more`` requests that all wait while a first one is scored."""
    scorer.gate.clear()
    later = time.monotonic() + 60
    first = asyncio.create_task(batcher.score(asks(0.0), later))
    await asyncio.sleep(0)
    while batcher.waiting:  # until the thread has it
        await asyncio.sleep(0)
    tasks = [asyncio.create_task(batcher.score(make, deadline or later)) for make, deadline in more]
    while batcher.waiting < sum(not task.done() for task in tasks):
        await asyncio.sleep(0)
    return first, tasks


def test_what_waits_is_merged_by_columns_and_by_rows(batcher, scorer):
    async def run():
        more = [(asks(1.0, 2.0), None), (asks(3.0), None), (asks(4.0, context=["u"]), None), (asks(*[5.0] * 8), None)]
        first, tasks = await held(batcher, scorer, *more)
        scorer.gate.set()
        return await asyncio.gather(first, *tasks)

    answers = asyncio.run(run())
    assert [answer.logits.tolist() for answer in answers[1:]] == [[1.0, 2.0], [3.0], [4.0], [5.0] * 8]
    assert [answer.merged for answer in answers] == [1, 2, 2, 1, 1]  # 3 + 8 rows are more than 10


def test_too_many_are_refused_and_the_rest_answered(batcher, scorer):
    async def run():
        first, tasks = await held(batcher, scorer, *[(asks(float(i)), None) for i in range(5)])
        with pytest.raises(Overloaded):
            await batcher.score(asks(9.0), time.monotonic() + 60)
        scorer.gate.set()
        return await asyncio.gather(first, *tasks)

    assert [answer.logits.tolist() for answer in asyncio.run(run())[1:]] == [[0.0], [1.0], [2.0], [3.0], [4.0]]


def test_a_late_request_is_not_scored(batcher, scorer):
    async def run():
        first, (late, good) = await held(batcher, scorer, (asks(1.0), time.monotonic() - 1), (asks(2.0), None))
        scorer.gate.set()
        await first
        with pytest.raises(TooLate):
            await late
        return await good

    assert asyncio.run(run()).logits.tolist() == [2.0]
    assert scorer.batches == [1, 1]


def test_one_mistake_does_not_fail_its_neighbours(batcher, scorer):
    async def run():
        _, tasks = await held(batcher, scorer, (asks(1.0), None), (asks(-1.0), None), (asks(3.0), None))
        scorer.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = asyncio.run(run())
    assert (first.logits.tolist(), third.logits.tolist()) == ([1.0], [3.0]) and isinstance(second, UserError)


def test_a_new_model_answers_from_the_next_batch_on(batcher, scorer):
    async def run():
        first, (waiting,) = await held(batcher, scorer, (asks(1.0, 1.0), None))
        batcher.swap(FakeScorer(offset=100.0))
        scorer.gate.set()
        return await asyncio.gather(first, waiting)

    first, second = asyncio.run(run())
    assert first.scorer is scorer and first.logits.tolist() == [0.0]
    assert second.scorer is not scorer and second.logits.tolist() == [101.0, 101.0]


def test_it_closes_after_the_last_answer(scorer):
    batcher = Batcher(scorer, max_rows=10, max_waiting=5)

    async def run():
        scorer.gate.clear()
        task = asyncio.create_task(batcher.score(asks(7.0), time.monotonic() + 60))
        await asyncio.sleep(0)
        closing = asyncio.get_running_loop().run_in_executor(None, batcher.close)
        scorer.gate.set()
        answer = await task
        await closing
        return answer

    assert asyncio.run(run()).logits.tolist() == [7.0]
