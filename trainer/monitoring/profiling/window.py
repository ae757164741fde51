"""The window: so many steps under ``torch.profiler``, then a trace of each profiled rank and one summary in ``profile/``.

``torch.profiler`` warms up in the step before the window. It adds no synchronisation with a GPU to a step; at the window's end
it waits for the device once. Nothing that training computes depends on it.
"""

import contextlib
import gzip
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from data_loaders.messages import note, warn
from data_loaders.state_files import write_json, write_text
from trainer.config.monitoring import ProfilingConfig
from trainer.monitoring.profiling.parts import analyse
from trainer.monitoring.profiling.summary import as_text
from trainer.monitoring.slowdown import find_collapse
from trainer.runtime.distributed import Ranks, on_ranks
from trainer.runtime.watchdog import Watchdog

FOLDER = "profile"


@contextlib.contextmanager
def window(
    config: ProfilingConfig, folder: Path, ranks: Ranks, watchdog: Watchdog, outside: Callable[[float], None]
) -> Iterator[Callable[[int], None]]:
    """What to call before each step, with the number of steps made so far (over restarts); the window counts the steps
    from here on. ``outside`` gets the seconds that traces take to write."""
    opened = Window(config, folder, ranks, watchdog, outside)
    try:
        yield opened.before_step
    finally:
        opened.close()


class Window:
    """See ``window``. All ranks take part in its end, profiled or not."""

    def __init__(
        self, config: ProfilingConfig, folder: Path, ranks: Ranks, watchdog: Watchdog, outside: Callable[[float], None]
    ) -> None:
        self.config, self.folder, self.ranks = config, folder / FOLDER, ranks
        self._watchdog, self._outside = watchdog, outside
        self._begun = 0  # steps
        self._over = False
        self._times: list[float] = []  # when each step began
        self._first_step = 0
        self._profiler = self._make() if ranks.rank in config.ranks else None

    def before_step(self, step: int) -> None:
        if self._over:
            return
        now = time.perf_counter()
        self._advance()
        self._times.append(now if self._begun != self.config.after_steps else time.perf_counter())
        if self._begun == self.config.after_steps:
            self._first_step = step + 1
        self._begun += 1
        if self._begun > self.config.after_steps + self.config.steps:
            self._end(step)

    def close(self) -> None:
        if self._over:
            return
        if self._profiler is not None and self._begun:
            self._profiler.stop()
        if self.ranks.is_first:
            needed = self.config.after_steps + self.config.steps
            note(
                f"note: nothing was profiled: this process ended before it had made {needed} steps (profiling.after_steps="
                f"{self.config.after_steps}, profiling.steps={self.config.steps}): train longer, or begin the window earlier"
            )

    def _make(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if self.ranks.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        wait = self.config.after_steps - 1
        return profile(
            activities=activities, schedule=schedule(wait=wait, warmup=1, active=self.config.steps, repeat=1)
        )

    def _advance(self) -> None:
        if self._profiler is not None:
            if self._begun:
                self._profiler.step()
            else:
                self._profiler.start()

    def _end(self, step: int) -> None:
        """All ranks are before the same step."""
        self._over, began = True, time.perf_counter()
        with self._watchdog.paused():
            mine = None
            with self._unless_it_fails():
                mine = self._write_trace() if self._profiler is not None else None
            profiled = {str(rank): facts for rank, facts in enumerate(on_ranks(mine)) if facts is not None}
            if self.ranks.is_first and profiled:
                with self._unless_it_fails():
                    self._report(step, profiled)
        self._profiler = None
        self._outside(time.perf_counter() - began)

    @contextlib.contextmanager
    def _unless_it_fails(self) -> Iterator[None]:
        """A full disk, or a profiler whose buffers overflowed, is no reason to end a run."""
        try:
            yield
        except (OSError, ValueError) as error:
            warn(f"no profile of rank {self.ranks.rank}: {error}")

    def _write_trace(self) -> dict[str, Any]:
        assert self._profiler is not None
        self._profiler.stop()
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"rank-{self.ranks.rank}.json.gz"
        self._profiler.export_chrome_trace(str(path))
        with gzip.open(path, "rt") as file:
            found = analyse(json.load(file)["traceEvents"])
        wall = self._times[-1] - self._times[self.config.after_steps]
        facts = found._asdict() | {"wall_ms": 1e3 * wall / self.config.steps}
        return {**facts, "trace": path.name}

    def _report(self, step: int, ranks: dict[str, Any]) -> None:
        summary = {
            "first_step": self._first_step,
            "last_step": step,
            "unprofiled_step_ms": statistics.median(steps) if (steps := self._unprofiled_ms()) else None,
            "slowed": self._slowed(steps),
            "ranks": ranks,
        }
        text = as_text(summary)
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / "summary.json", summary)
        write_text(self.folder / "summary.txt", text)
        note(f"{text}Traces: {self.folder} (perfetto.dev, chrome://tracing)")

    def _unprofiled_ms(self) -> list[float]:
        """The steps before the profiler warmed up; the first one fills the pipeline."""
        before = self._times[1 : self.config.after_steps]
        return [1e3 * (end - begin) for begin, end in zip(before, before[1:])]

    def _slowed(self, steps_ms: list[float]) -> dict[str, float] | None:
        """Where these steps became slow for good: the step, and the median before and after it."""
        collapse = find_collapse([1 / milliseconds for milliseconds in steps_ms])
        if collapse is None:
            return None
        step = self._first_step - self.config.after_steps + 1 + collapse.place
        return {"step": step, "before_ms": 1 / collapse.before, "after_ms": 1 / collapse.after}
