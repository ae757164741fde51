"""Signals that ask a job to stop, taken note of until a step is over."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A scheduler may signal every process of a job, and torchrun's agent, signalled too, passes it on: one request, not two.
ECHO_SECONDS = 1.0


class Interrupts:
    """SIGINT in a program that is not ours, such as a notebook: it raises ``KeyboardInterrupt``, as ever; but within
    ``deferred()`` a first one only sets ``asked``. Other signals are the program's own, and so are all of them outside of its
    main thread, the only one that Python tells."""

    def __init__(self) -> None:
        self.asked = 0
        self._deferred = False

    def __enter__(self) -> "Interrupts":
        self._heard = threading.current_thread() is threading.main_thread()
        if self._heard:
            self._old = signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._heard:
            signal.signal(signal.SIGINT, self._old)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def defer(self) -> None:
        """Nothing: the process is not about to end."""

    def end_if_asked(self) -> None:
        """Carries out a request that came too late for those who look at ``asked``."""
        if self.asked:
            raise KeyboardInterrupt

    def _receive(self, number: int, _: object) -> None:
        if self.asked or not self._deferred:
            raise KeyboardInterrupt
        self.asked = number


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 while entered: they end the process at once, with exit code 128 + n and after
    ``before_exit(name)``; but within ``deferred()`` a first one only sets ``asked``, and a second one ends the process.

    Python runs its signal handlers in the main thread, between two of its own instructions; a main thread that waits in a
    collective does not come to that. So a thread listens, which Python's C handler wakes through a pipe.
    """

    def __init__(self, before_exit: Callable[[str], None] = lambda name: None) -> None:
        self.asked = 0  # number of the first signal
        self._before_exit = before_exit
        self._deferred = False
        self._asked_at = 0.0

    def __enter__(self) -> "StopSignals":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_end = signal.set_wakeup_fd(self._write_end)
        self._old = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_end)
        os.close(self._write_end)  # ends the thread
        self._thread.join()
        os.close(self._read_end)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While ``asked`` is looked at, and work can be saved. An error goes on deferring: the process is about to end, and
        must first tell why; torchrun's SIGTERM, which follows from another rank's end, would have it say something else."""
        self._deferred = True
        yield
        self._deferred = False

    def defer(self) -> None:
        """From now on, by a process that is about to end and must first tell why."""
        self._deferred = True

    def end_if_asked(self) -> None:
        """Carries out a request that came too late for those who look at ``asked``."""
        if self.asked:
            self._end(self.asked)

    def _listen(self) -> None:
        while received := os.read(self._read_end, 1):
            if received[0] in STOP_SIGNALS:
                self._receive(received[0], time.monotonic())

    def _receive(self, number: int, when: float) -> None:
        if self.asked and when - self._asked_at < ECHO_SECONDS:
            return
        second, self.asked, self._asked_at = self.asked, number, when
        if second or not self._deferred:
            self._end(number)

    def _end(self, number: int) -> None:
        try:
            self._before_exit(signal.Signals(number).name)
        finally:
            os._exit(128 + number)
