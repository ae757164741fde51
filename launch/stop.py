"""Signals to a command that runs ranks, from its first moment to its last: the first one stops the run, a second one ends it at
once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
from torch.distributed.elastic.multiprocessing import SignalException

from data_loaders.messages import note
from launch.children import HEARD, is_under_nohup

SAVED_AFTER = HEARD[:3]  # by the ranks (trainer.runtime.process)


class Stop:
    """While entered. ``before_end(reason)`` is called before the process is ended from here.

    While ``passed_on()`` is entered, a first signal is raised as torchrun's ``SignalException``, which its agent passes on to
    the ranks. Any other signal ends the ranks by SIGKILL and this process with 128 + n, without an exception: whatever was
    being done may have been the handling of the first one. SIGHUP that is ignored, as under ``nohup``, stays ignored.
    """

    def __init__(self, before_end: Callable[[str], None] = lambda reason: None) -> None:
        self.number = 0
        self._passed_on = False
        self._before_end = before_end

    def __enter__(self) -> "Stop":
        here = threading.current_thread() is threading.main_thread()  # no other one hears signals
        heard = [number for number in HEARD if here and not is_under_nohup(number)]
        self._old = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        self._passed_on = True
        try:
            yield
        finally:
            self._passed_on = False

    def _hear(self, number: int, _: object) -> None:
        first, self.number = not self.number, self.number or number
        if first and self._passed_on:
            passed_on = number if number in SAVED_AFTER else signal.SIGTERM
            raise SignalException(f"{signal.Signals(number).name} to the launcher", sigval=signal.Signals(passed_on))
        for other in self._old:
            signal.signal(other, signal.SIG_IGN)
        end_workers()
        name = signal.Signals(self.number).name
        self._before_end(
            f"{name} while nothing could be saved" if first else f"{name} twice, so it ended without saving"
        )
        say_stopped(self.number)
        sys.stdout.flush()
        os._exit(128 + self.number)


def say_stopped(number: int) -> None:
    note(f"launch: stopped by {signal.Signals(number).name}")


def end_workers() -> None:
    """Kills what is left of the processes below this one."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
