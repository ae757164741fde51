"""Signals to `launch.run`, from its first moment to its last: the first one stops the run, a second one ends it at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable

import psutil

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)

SAVED_AFTER = HEARD[:3]  # by the ranks (trainer.runtime.process)


class Stop:
    """While entered. ``on_end(reason)`` is called before the process is ended from here.

    While ``armed`` holds, a first signal is raised as torchrun's ``SignalException``, which its agent passes on to the ranks.
    Any other signal ends the ranks by SIGKILL and this process with 128 + n, without an exception: whatever was being done
    may have been the handling of the first one. SIGHUP that is ignored, as under ``nohup``, stays ignored.
    """

    def __init__(self) -> None:
        self.number = 0
        self.armed = False
        self.on_end: Callable[[str], None] = lambda reason: None

    def __enter__(self) -> "Stop":
        here = threading.current_thread() is threading.main_thread()  # no other one hears signals
        heard = [number for number in HEARD if here and not is_under_nohup(number)]
        self._old = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: object) -> None:
        first, self.number = not self.number, self.number or number
        if first and self.armed:
            # Imported by then: the agent runs.
            from torch.distributed.elastic.multiprocessing import SignalException

            passed_on = number if number in SAVED_AFTER else signal.SIGTERM
            raise SignalException(f"{signal.Signals(number).name} to the launcher", sigval=signal.Signals(passed_on))
        for other in self._old:
            signal.signal(other, signal.SIG_IGN)
        end_workers()
        name = signal.Signals(self.number).name
        self.on_end(f"{name} while nothing could be saved" if first else f"{name} twice, so it ended without saving")
        say_stopped(self.number)
        sys.stdout.flush()
        os._exit(128 + self.number)


def is_under_nohup(number: int) -> bool:
    """(A shell lets SIGINT be ignored by what it starts with ``&``; whoever sends it all the same means it.)"""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def say_stopped(number: int) -> None:
    print(f"launch: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)


def end_workers() -> None:
    """Kills what is left of the processes below this one."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
