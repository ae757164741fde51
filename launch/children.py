"""Processes that a launcher starts: a signal to the launcher reaches them once, and none of them outlives it."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from launch.stop import HEARD, is_under_nohup


class Children:
    """While entered, a signal asks all of them to save and end (SIGTERM; twice: to end), and ``stopped`` is the first
    signal's number (0: none). SIGHUP that is ignored, as under ``nohup``, stays ignored.

    The kernel passes a launcher's end on too, whatever ended it (``launch.child``).
    """

    def __init__(self) -> None:
        self.stopped = 0
        self._running: list[subprocess.Popen] = []
        self._starting, self._missed = False, 0

    def __enter__(self) -> "Children":
        heard = [number for number in HEARD if not is_under_nohup(number)]
        self._old = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        if not self.stopped:
            self._ask()  # after an error of ours: nothing is left behind
        for (
            process
        ) in self._running:  # our end, of which the kernel tells them, would be a second signal: it ends them unsaved
            process.wait()
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def start(self, words: Sequence[str], cores: str = "any", **options: Any) -> subprocess.Popen:
        """``words`` as a process of a session of its own, so that Ctrl-C in a terminal reaches it once, through us. ``cores``:
        numbers, 0,1."""
        command = [sys.executable, "-m", "launch.child", str(os.getpid()), cores, *words]
        self._starting = True
        try:
            process = subprocess.Popen(command, start_new_session=True, **options)
            self._running.append(process)
        finally:
            self._starting = False
            while self._missed:
                self._missed -= 1
                self._ask()
        return process

    def call(self, words: Sequence[str], text: str | None = None) -> int:
        """Runs ``words``, with ``text`` as its input, to its end. Returns its exit code; 128 + n where a signal came."""
        process = self.start(words, text=True, stdin=None if text is None else subprocess.PIPE)
        process.communicate(text)
        return 128 + self.stopped if self.stopped else exit_code(process)

    def _hear(self, number: int, _: Any) -> None:
        self.stopped = self.stopped or number
        if self._starting:  # one that is being started is not known yet, and is to hear of it once
            self._missed += 1
        else:
            self._ask()

    def _ask(self) -> None:
        for process in self._running:
            process.terminate()  # nothing where it has ended


def exit_code(process: subprocess.Popen) -> int:
    """As a shell has it: 128 + n after a signal."""
    code = process.wait()
    return 128 - code if code < 0 else code
