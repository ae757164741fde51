"""Processes that a command starts: a signal to the command reaches each of them once, and none outlives it.

`python -m launch.children PARENT CORES COMMAND…` becomes COMMAND on the given cores (numbers, or `any`); the kernel sends it
SIGTERM when process PARENT, which started it, dies.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from data_loaders.messages import fail

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>; it outlives exec


class Children:
    """While entered, a first signal is passed on to all of them as SIGTERM (save and end), a second one, too (end); ``stopped``
    is the first signal's number (0: none). SIGHUP that is ignored, as under ``nohup``, stays ignored."""

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
        for process in self._running:  # our end would be a second signal to them, by the kernel: they would not save
            process.wait()
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def start(self, words: Sequence[str], cores: str = "any", **options: Any) -> subprocess.Popen:
        """``words`` as a process of a session of its own, so that Ctrl-C in a terminal reaches it once, through us. ``cores``:
        numbers, 0,1."""
        command = [sys.executable, "-m", "launch.children", str(os.getpid()), cores, *words]
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
        return 128 + self.stopped if self.stopped else exit_code(process.returncode)

    def _hear(self, number: int, _: Any) -> None:
        self.stopped = self.stopped or number
        if self._starting:  # one that is being started is not known yet, and is to hear of it once
            self._missed += 1
        else:
            self._ask()

    def _ask(self) -> None:
        for process in self._running:
            process.terminate()  # nothing where it has ended


def exit_code(code: int) -> int:
    """As a shell has it: 128 + n after signal n."""
    return 128 - code if code < 0 else code


def is_under_nohup(number: int) -> bool:
    """(A shell lets SIGINT be ignored by what it starts with ``&``; whoever sends it all the same means it.)"""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def main() -> int:
    parent, cores, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            return 128 + signal.SIGTERM
        if cores != "any":
            os.sched_setaffinity(0, map(int, cores.split(",")))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        return fail(f"{command[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    sys.exit(main())
