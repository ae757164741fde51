"""Which rank holds the others up.

Ranks train in step: one that is slow, by a busy processor or a bad disk, shows in everyone's samples/s and nowhere else. So
a thread looks at this rank's training ``SAMPLES_PER_SECOND`` times a second, whether it works or waits for other ranks;
that costs no collective. With each line of training metrics the ranks hold their own work side by side.

It is the host that is looked at: where a GPU alone is slow, its own rank waits for it as all others do.
"""

import threading
import time
from statistics import median_low
from types import TracebackType
from typing import Any

import torch

from data_loaders.loader import Loader
from data_loaders.messages import warn
from trainer.runtime.distributed import Ranks, all_reduce_sum
from trainer.runtime.watchdog import Watchdog

SAMPLES_PER_SECOND = 50
ENOUGH_SAMPLES = 15  # for a number to mean anything
SLOW = 1.5  # times the median's own work
WORTH_TELLING = 0.1  # of a step, that a slow rank costs
REPORTS = 3  # in a row that name the same rank


class StragglerMeter:
    """Looks while entered. One rank alone has nobody to wait for: nothing is looked at or reported."""

    def __init__(self, watchdog: Watchdog, loader: Loader, ranks: Ranks) -> None:
        self.watchdog, self.loader, self.ranks = watchdog, loader, ranks
        self._own = self._total = 0.0  # seconds since the last report
        self._samples = 0
        self._lock = threading.Lock()
        self._steps, self._input_wait = 0, 0.0  # at the last report
        self._suspect, self._times, self._warned = -1, 0, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="stragglers", daemon=True)

    def __enter__(self) -> "StragglerMeter":
        if self.ranks.world_size > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def report(self) -> dict[str, Any]:
        """``ranks``: the slowest rank, its own work in a step against the median rank's, and how much of it was waiting
        for input. Empty where too little was seen since the last one. All ranks call it together."""
        if self.ranks.world_size == 1:
            return {}
        table = torch.zeros(self.ranks.world_size, 4, dtype=torch.float64)  # [ranks, own, total, input wait, samples]
        table[self.ranks.rank] = torch.tensor(self._measured(), dtype=torch.float64)
        own, total, input_wait, samples = all_reduce_sum(table).T.tolist()
        if min(samples) < ENOUGH_SAMPLES:
            return {}
        self._begin_window()
        slowest, median = own.index(max(own)), median_low(own)
        ratio = own[slowest] / max(median, 1e-9)
        facts = {
            "slowest": slowest,
            "ratio": ratio,
            "own_seconds": own[slowest],
            "median_own_seconds": median,
            "input_wait_seconds": input_wait[slowest],
        }
        self._consider(facts, (own[slowest] - median) / max(total[slowest], 1e-9))
        return {"ranks": facts}

    def _measured(self) -> tuple[float, float, float, int]:
        """Seconds a step: this rank's own work, all, waiting for input; and the number of samples behind them."""
        steps = max(1, self.watchdog.steps - self._steps)
        input_wait = self.loader.wait_seconds - self._input_wait
        with self._lock:
            return self._own / steps, self._total / steps, input_wait / steps, self._samples

    def _begin_window(self) -> None:
        self._steps, self._input_wait = self.watchdog.steps, self.loader.wait_seconds
        with self._lock:
            self._own, self._total, self._samples = 0.0, 0.0, 0

    def _look(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(1 / SAMPLES_PER_SECOND):
            now = time.monotonic()
            elapsed, last = now - last, now
            waits = self.watchdog.waits()
            if waits is not None:
                with self._lock:
                    self._own += 0.0 if waits else elapsed
                    self._total += elapsed
                    self._samples += 1

    def _consider(self, facts: dict[str, Any], cost: float) -> None:
        """Warns, once. ``cost``: the share of a step that the slowest rank works longer than the median."""
        slow = facts["ratio"] > SLOW and cost > WORTH_TELLING
        self._times = self._times + 1 if slow and facts["slowest"] == self._suspect else int(slow)
        self._suspect = facts["slowest"]
        if self._times < REPORTS or self._warned:
            return
        self._warned = True
        if self.ranks.is_first:
            warn(
                f"rank {facts['slowest']} of {self.ranks.world_size} holds the others up: {REPORTS} reports in a "
                f"row its own work has taken more than {SLOW} times that of the median rank (now "
                f"{1000 * facts['own_seconds']:.0f} ms a step against {1000 * facts['median_own_seconds']:.0f}, "
                f"{1000 * facts['input_wait_seconds']:.0f} of them waiting for input): look at its machine's processor, disk "
                "and other jobs"
            )
