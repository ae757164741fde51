"""A process in its run folder, from taking the lock to telling how it ended."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import IO, Any

from trainer.runtime import run_folder
from trainer.runtime.distributed import Ranks, from_first, launch_id
from trainer.runtime.process import explanation, is_lost_peer, is_retryable
from trainer.runtime.restart_history import RestartHistory
from trainer.runtime.signals import Interrupts, StopSignals

SIGNAL_SECONDS = 1.0  # within which a signal reaches all ranks


class Session:
    """Holds the run folder's lock, ``status.json`` and ``attempts.txt`` for as long as the run lives, and hears the signals
    that ask it to stop. ``hosted``: within a program that is not ours and goes on after the run, such as a notebook; neither
    a signal nor a hang ends that."""

    def __init__(self, folder: Path, ranks: Ranks, *, hosted: bool = False) -> None:
        self.path, self.ranks = folder, ranks
        self.status = run_folder.Status(folder, launch_id()[0])
        self.restarts = RestartHistory(folder)
        self._hosted = hosted
        # Hearsay: torchrun stops a rank by SIGTERM, too, when another one failed.
        unsaved = "{} while there was nothing to save"
        stop = StopSignals(lambda name: self._end("preempted", secondary=True, reason=unsaved.format(name)))
        self.signals: StopSignals | Interrupts = Interrupts() if hosted else stop
        self._lock: IO[str] | None = None
        from_first(self._open)

    def __enter__(self) -> "Session":
        self.signals.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if self._hosted:
            self._unlock()
            self.signals.__exit__()
        if isinstance(error, KeyboardInterrupt):
            self._end("preempted", reason="SIGINT while there was nothing to save")
        elif error is not None:
            lost = is_lost_peer(error)
            if lost and (number := self._signal_soon()):
                reason = f"{signal.Signals(number).name}: another rank had ended before this one could save"
                return self._end("preempted", secondary=True, reason=reason)
            reason = "lost contact with another rank" if lost else explanation(error)[:2000]
            facts = {"reason": reason, "rank": None if lost else self.ranks.rank}
            self._end("failed", secondary=lost, retryable=is_retryable(error), **facts)
        elif not self._hosted:
            self.signals.__exit__()

    def _signal_soon(self) -> int:
        """Of a signal to all ranks the others may have heard first. Not SIGTERM: torchrun sends it because a rank has ended."""
        self.signals.defer()
        deadline = time.monotonic() + SIGNAL_SECONDS
        while not self.signals.asked and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.signals.asked if self.signals.asked != signal.SIGTERM else 0

    def close(self, state: str, **facts: Any) -> None:
        """Rank 0 says how the run ended."""
        self.restarts.end(state)
        self.status.update(state, **facts)

    def leave(self, code: int) -> None:
        """Ends the process, where it is ours."""
        if not self._hosted:
            os._exit(code)

    def hang(self, rank: int, step: int, message: str) -> None:
        """The watchdog's verdict."""
        self.status.end("failed", reason=message, rank=rank, step=step, retryable=True)

    def _end(self, state: str, *, secondary: bool = False, retryable: bool = True, **facts: Any) -> None:
        self.restarts.end("stopped" if state == "preempted" else state)
        with contextlib.suppress(OSError):  # a full disk, perhaps the very reason, which is on stderr
            self.status.end(state, secondary=secondary, step=self.restarts.step, retryable=retryable, **facts)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _open(self) -> None:
        self._lock = run_folder.lock(self.path)
        try:
            self.restarts.begin()
        except ValueError as error:
            step = self.restarts.step  # of all those starts, and so of no rank
            self.status.end("failed", reason=explanation(error), retryable=False, rank=None, step=step)
            self._unlock()
            raise
        self.status.update("running", world_size=self.ranks.world_size)
