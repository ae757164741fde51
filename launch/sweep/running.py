"""Trials as processes: started as shares of the machine become free, watched, stopped where hopeless, and recorded."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from data_loaders.messages import note
from launch.children import Children
from launch.sweep.shares import Share
from launch.sweep.trials import OUTPUT, Trial, evaluations, outcome

SECONDS = 1.0  # between two looks at the trials
Command = Callable[[Trial, Share], list[str]]


class Search(Protocol):
    """What gives out trials: ``Grid``, ``study.Search``."""

    def next(self) -> Trial | None: ...

    def hopeless(self, trial: Trial, course: Sequence[float]) -> bool: ...

    def tell(self, trial: Trial) -> None: ...  # as Optuna calls it

    def trials(self) -> list[Trial]: ...


@dataclass
class Running:
    """``pruned``: it was asked to stop, as hopeless."""

    trial: Trial
    share: Share
    process: subprocess.Popen
    started: float = field(default_factory=time.monotonic)
    pruned: bool = False
    course: list[float] = field(default_factory=list)

    def advanced(self, course: list[float]) -> bool:
        """Whether there are more evaluations than at the last look."""
        more = len(course) > len(self.course)
        self.course = course if more else self.course
        return more

    def prune(self) -> None:
        self.pruned = True
        self.process.terminate()


class Runner:
    """Runs what ``search`` gives out, on each of ``shares`` one at a time."""

    def __init__(self, search: Search, shares: Sequence[Share], command: Command, metric: str) -> None:
        self.search, self.command, self.metric = search, command, metric
        self.free, self.running = list(shares), []
        self.children = Children()

    @property
    def stopped(self) -> int:
        """The signal that ended it, or 0."""
        return self.children.stopped

    def run(self, seconds: float = SECONDS) -> None:
        """Until no trial is left, or a signal has ended those that run: none is started any more."""
        with self.children:
            while True:
                self._start_some()
                if not self.running:
                    return
                time.sleep(seconds)
                for running in list(self.running):
                    self._look(running)

    def _start_some(self) -> None:
        while self.free and not self.stopped and (trial := self.search.next()) is not None:
            ended = outcome(trial, self.metric, code=None, pruned=False)
            if ended.state == "open":
                self._start(trial)
            else:  # its run was at its end before its sweep could record it
                self._record(ended)

    def _start(self, trial: Trial) -> None:
        share = self.free.pop(0)
        trial.folder.mkdir(parents=True, exist_ok=True)
        self.search.tell(replace(trial, state="open"))
        note(f"sweep: {trial}: started")
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(share.gpus)} if share.gpus else {})}
        with open(trial.folder / OUTPUT, "ab") as output:
            process = self.children.start(
                self.command(trial, share),
                ",".join(map(str, share.cores)) or "any",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self.running.append(Running(trial, share, process))

    def _look(self, running: Running) -> None:
        code = running.process.poll()
        course = evaluations(running.trial.folder, self.metric)
        if running.advanced(course):
            hopeless = self.search.hopeless(running.trial, course)
            if hopeless and code is None and not self.stopped and not running.pruned:
                running.prune()
        if code is None:
            return
        self.running.remove(running)
        self.free.append(running.share)
        seconds = (running.trial.seconds or 0.0) + time.monotonic() - running.started
        trial = replace(running.trial, seconds=round(seconds, 2))
        self._record(outcome(trial, self.metric, 128 - code if code < 0 else code, running.pruned))

    def _record(self, trial: Trial) -> None:
        self.search.tell(trial)
        figure = "" if trial.value is None else f" {self.metric} {trial.value:.5f}"
        note(f"sweep: {trial}: {trial.state}{figure}{f' ({trial.reason})' if trial.reason else ''}")
