"""Progress: one line a step, with its time."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from data_loaders.messages import note


class Progress:
    """Prints to ``stderr``; ``seconds`` keeps what each step took."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.seconds: dict[str, float] = {}
        self._start = time.monotonic()

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            print(f"         {what} …", end="\r", file=sys.stderr, flush=True)
        yield
        now = time.monotonic()
        self.seconds[what] = round(now - began, 3)
        if not self.quiet:
            note(f"{now - self._start:7.1f} s  {what} ({now - began:.1f} s)")

    def note(self, text: str) -> None:
        """Something to know about the data."""
        if not self.quiet:
            note(f"note: {text}")
