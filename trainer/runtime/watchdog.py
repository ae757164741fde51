"""Ends a job that hangs, and says who hangs.

Each rank has a thread that watches its training: ``beat(step, phase)`` is a sign of life. Ranks train in step with each
other, so when one hangs all fall silent, and each ends itself after ``hang_timeout`` seconds. Before that it writes down,
in ``stacks/`` of the run folder, the stacks of its threads (``rank-N.txt``) and where it stands (``beat-N.json``); as no
collective can be trusted any more, the ranks learn of each other from these files. Furthest behind, and not itself
waiting for others, is who hangs.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from types import FrameType, TracebackType

from data_loaders.messages import note
from trainer.runtime.distributed import Ranks
from trainer.runtime.read_back import to_host

FOLDER = "stacks"
PHASES = ("begin", "guard", "backward", "end")  # of a step, in order
PATIENCE = 12  # times ``hang_timeout``: up to the end of the first step, and while paused
POLLS = 20  # in ``hang_timeout``
SECONDS_BETWEEN_POLLS = (0.1, 5.0)
# At least, for the other ranks to notice as well: on a machine under load a thread sleeps long.
SECONDS_FOR_OTHERS = 5.0
REPORTED = "reported"  # a file in ``stacks/``: whoever makes it prints the message
ROOT = Path(__file__).resolve().parents[2]
# A main thread in there waits for other ranks, or for a device that does (``trainer.runtime.read_back`` too); in BACKWARD it may
# also compute.
COLLECTIVES = os.path.join("", "torch", "distributed", "")  # or in what that calls
PIPELINE = os.path.join("", "torchrec", "distributed", "")  # which calls all that trains: only itself
CUDA = os.path.join("", "torch", "cuda", "")  # of its functions those called "synchronize" wait
BACKWARD = os.path.join("", "torch", "autograd", "")


@dataclass(frozen=True)
class Beat:
    """Where a rank stands: in ``where`` at ``phase`` of ``step`` (0: before the first one) for ``seconds``; ``waiting`` for
    others; ``hung``: over its time."""

    rank: int
    step: int = -1
    phase: str = PHASES[0]
    seconds: float = 0.0
    where: str = "an unknown place"
    waiting: bool = False
    hung: bool = False


class Watchdog:
    """Watches while entered. ``on_hang(rank, step, message)`` is called on the one rank that prints the message, before
    it ends, by ``leave(1)``; where that returns, training is left alone and watched on."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        hang_timeout: float,
        on_hang: Callable[[int, int, str], None] = lambda *_: None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.folder, self.ranks, self.hang_timeout, self.on_hang = folder / FOLDER, ranks, hang_timeout, on_hang
        self._leave = leave
        low, high = SECONDS_BETWEEN_POLLS
        self.interval = min(max(hang_timeout / POLLS, low), high)
        self._step, self._phase, self._steps = 0, PHASES[0], 0
        self._beats, self._seen = 0, -1
        self._paused = False
        self._idle = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watched = threading.main_thread().ident

    def __enter__(self) -> "Watchdog":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._publish()  # over what an earlier start may have left
        (self.folder / REPORTED).unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._file(self.ranks.rank).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: another rank's files, or stacks
            self.folder.rmdir()

    def beat(self, step: int, phase: str) -> None:
        """A sign of life; ``phase`` is one of ``PHASES``. Step 0 is all that comes before the first step."""
        self._step, self._phase = step, phase
        self._steps += phase == "end"
        self._beats += 1

    def alive(self) -> None:
        """A sign of life from wherever training stands: while it builds, or evaluates."""
        self._beats += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While something goes on that has no beats and may take long: an evaluation, a checkpoint."""
        self._paused = True
        self._beats += 1
        try:
            yield
        finally:
            self._beats += 1
            self._paused = False

    @property
    def steps(self) -> int:
        """Made while it watched."""
        return self._steps

    def waits(self) -> bool | None:
        """Whether training waits for other ranks at this moment; None before the first step's end and while paused. Any
        thread may ask, and often."""
        if self._paused or not self._steps:
            return None
        frame = sys._current_frames().get(self._watched)
        return self._phase == "guard" or (frame is not None and _is_waiting(frame))

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            self.look(now - last)
            last = now

    def look(self, elapsed: float) -> None:
        """Ends the process where no sign of life came for too long; ``elapsed`` seconds since it last looked."""
        # A process that was stopped for a while (SIGSTOP, a suspended machine) has not been idle.
        elapsed = min(elapsed, 2 * self.interval)
        self._idle = self._idle + elapsed if self._beats == self._seen else 0.0
        self._seen = self._beats
        patience = PATIENCE if self._paused or not self._steps else 1
        if self._idle > self.hang_timeout * patience:
            self._end()
            self._idle = 0.0
        self._publish()

    def _end(self) -> None:
        try:
            with open(self.folder / f"rank-{self.ranks.rank}.txt", "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            self._publish(hung=True)
            beats = self._wait_for_others()
            if self.ranks.rank == min(beat.rank for beat in beats if beat.hung) and self._reports():
                message = verdict(beats)
                note(f"error: {message}; stacks: {self.folder}/rank-*.txt")
                worst = hanging(beats)[0]
                self.on_hang(worst.rank, worst.step, message)
            else:
                time.sleep(self.interval)  # who speaks should not be ended with this rank
        finally:
            self._leave(1)

    def _wait_for_others(self) -> list[Beat]:
        """Where all ranks stand, once all, as idle as this one, have noticed; or where they stood when time was up."""
        until = time.monotonic() + max(SECONDS_FOR_OTHERS, 5 * self.interval)
        while True:
            beats = [self._read(rank) for rank in range(self.ranks.world_size)]
            if all(beat.hung for beat in beats) or time.monotonic() > until:
                return beats
            time.sleep(self.interval)

    def _reports(self) -> bool:
        """Whether this rank is the one that prints: the first to make a file that all see."""
        try:
            (self.folder / REPORTED).touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # a full disk: rather said twice than not at all
            pass
        return True

    def _publish(self, *, hung: bool = False) -> None:
        frame = sys._current_frames().get(self._watched)
        where, waiting = place(frame)
        waiting = waiting or self._phase == "guard"  # which is an all-reduce, and on a GPU the wait for its result
        beat = Beat(self.ranks.rank, self._step, self._phase, self._idle, where, waiting, hung)
        with contextlib.suppress(OSError):  # a full disk is not a hang
            path = self._file(self.ranks.rank)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(asdict(beat)))
            part.replace(path)  # whole, for whoever reads; it need not outlive the machine

    def _read(self, rank: int) -> Beat:
        """A rank that has left no file is furthest behind."""
        try:
            return Beat(**json.loads(self._file(rank).read_text()))
        except (OSError, ValueError):
            return Beat(rank)

    def _file(self, rank: int) -> Path:
        return self.folder / f"beat-{rank}.json"


def place(frame: FrameType | None) -> tuple[str, bool]:
    """Of a stack: its innermost function of ours (or of anyone's), with file and line; and whether it waits for others."""
    if frame is None:
        return "an unknown place", False
    waiting = _is_waiting(frame) or _is_in(frame, BACKWARD)
    shown = next((each for each in _outwards(frame) if _is_ours(each)), frame)
    path = Path(shown.f_code.co_filename)
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return f"{shown.f_code.co_name} ({name}:{shown.f_lineno})", waiting


def _is_waiting(frame: FrameType) -> bool:
    if frame.f_code is to_host.__code__ or _is_in(frame, PIPELINE):
        return True
    if frame.f_code.co_name == "synchronize" and _is_in(frame, CUDA):
        return True
    return any(_is_in(each, COLLECTIVES) for each in takewhile(lambda each: not _is_ours(each), _outwards(frame)))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """A stack's frames, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_in(frame: FrameType, folder: str) -> bool:
    return folder in frame.f_code.co_filename


def _is_ours(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return path.startswith(f"{ROOT}{os.sep}") and "site-packages" not in path


def hanging(beats: Sequence[Beat]) -> list[Beat]:
    """Those furthest behind; of them, those that do not wait for others, if there are any."""

    def reached(beat: Beat) -> tuple[int, int]:
        return beat.step, PHASES.index(beat.phase)

    least = min(map(reached, beats))
    behind = [beat for beat in beats if reached(beat) == least]
    return [beat for beat in behind if not beat.waiting] or behind


def verdict(beats: Sequence[Beat]) -> str:
    """One line: who hangs, where, since when."""
    found = hanging(beats)
    silent = [f"rank {beat.rank} of {len(beats)} gives no sign of life" for beat in found if beat.step < 0]
    placed = [
        f"rank {beat.rank} of {len(beats)} hangs: in {beat.where} since {beat.seconds:.0f} s "
        f"{f'at step {beat.step}' if beat.step else 'before the first step'}"
        for beat in found
        if beat.step >= 0
    ]
    others = ["the others wait for it"] if len(found) == 1 < len(beats) else []
    return "; ".join([*silent, *placed, *others])
