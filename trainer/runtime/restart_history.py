"""How often this run has been started and where each start ended, so that one that keeps failing at the same step gives up.

``attempts.txt`` in the run folder has a line of fixed width for each start: the launcher's id, the number of its restarts,
the step last begun (0: none) and how it ended (``running``: it did not say, such as after SIGKILL). Rank 0 overwrites the step in
place at each step, with one write that needs no flush: the page cache outlives the process.

It only saves restarts that are in vain: whatever is damaged of it is passed over, and where it cannot be written the run goes
on without.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from data_loaders.errors import UserError
from data_loaders.messages import warn
from data_loaders.state_files import write_text
from trainer.runtime.distributed import launch_id

NAME = "attempts.txt"
FAILURES = 3  # in a row at one step, within one launch: enough
ID_WIDTH, RESTARTS_WIDTH, STEP_WIDTH, STATE_WIDTH = 40, 6, 14, 10
STEP_AT = ID_WIDTH + 1 + RESTARTS_WIDTH + 1
WIDTH = STEP_AT + STEP_WIDTH + 1 + STATE_WIDTH + 1  # of a line
LINE = re.compile(rf"(?=.{{{WIDTH - 1}}}\n)([!-~]+) +(\d{{1,{RESTARTS_WIDTH}}}) +(\d{{1,{STEP_WIDTH}}}) ([a-z]+) *\n")
OVER = ("finished", "preempted")


@dataclass(frozen=True)
class Start:
    launch: str
    restarts: int
    step: int
    state: str

    @property
    def line(self) -> str:
        return (
            f"{self.launch:<{ID_WIDTH}} {self.restarts:>{RESTARTS_WIDTH}} {self.step:>{STEP_WIDTH}} "
            f"{self.state:<{STATE_WIDTH}}\n"
        )


class RestartHistory:
    """This start among those before it. Only the rank that calls ``begin`` (rank 0) writes; ``step`` is known on all."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.step = 0
        self._file: int | None = None
        self._offset = 0

    def begin(self) -> None:
        """Adds this start. Raises ``UserError`` with the history where the last ones of this launch all ended at one
        step, which is then ``step``. A launcher's first start is never refused: someone has decided on it."""
        run_id, restarts = launch_id()
        # "-" for none: without a launcher nothing starts again by itself.
        launch = "".join(run_id.split()).encode("ascii", "replace").decode()[:ID_WIDTH] or "-"
        try:
            before = self._read()
        except OSError as error:
            return self._give_up(error)
        if restarts:
            same = [start for start in before if start.launch == launch]
            self.step = same[-1].step if same else 0
            refuse(self.path, same)
            self.step = 0
        try:
            write_text(self.path, "".join(each.line for each in (*before, Start(launch, restarts, 0, "running"))))
            self._file = os.open(self.path, os.O_RDWR)
        except OSError as error:
            return self._give_up(error)
        self._offset = WIDTH * len(before)

    def record(self, step: int) -> None:
        """``step`` begins."""
        self.step = step
        self._write(f"{step:>{STEP_WIDTH}}", STEP_AT)

    def end(self, state: str) -> None:
        """``finished``; ``preempted``: asked to stop, it saved; ``stopped``: there was nothing to save, and torchrun, too,
        stops a rank when another one has failed; ``failed``."""
        self._write(f"{state:<{STATE_WIDTH}}", STEP_AT + STEP_WIDTH + 1)
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _read(self) -> list[Start]:
        found = read(self.path)
        if self.path.is_file() and self.path.stat().st_size != WIDTH * len(found):
            warn(f"{self.path} is damaged: what it held of earlier starts is passed over")
        return found

    def _write(self, text: str, at: int) -> None:
        """In place, in this start's line."""
        if self._file is None:
            return
        try:
            os.pwrite(self._file, text.encode(), self._offset + at)
        except OSError as error:
            os.close(self._file)
            self._file = None
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        warn(
            f"{self.path} cannot be kept ({error.strerror}): a run that fails again and again in one step is not "
            "recognised by it"
        )


def read(path: Path) -> list[Start]:
    """The starts that whole lines tell of, in order; what else a power cut may have left is passed over. Raises ``OSError``."""
    text = path.read_bytes() if path.is_file() else b""
    lines = [text[at : at + WIDTH].decode("ascii", "replace") for at in range(0, len(text), WIDTH)]
    found = [match for match in map(LINE.fullmatch, lines) if match]
    return [
        Start(launch, int(restarts), int(step), state) for launch, restarts, step, state in (m.groups() for m in found)
    ]


def refuse(path: Path, starts: list[Start]) -> None:
    """Raises ``UserError`` where the last ``FAILURES`` starts, each the restart of the one before, ended at one step, none
    of them as it should."""
    last = starts[-FAILURES:]
    if [start.restarts - last[0].restarts for start in last] != list(range(len(last))):
        return
    if len(last) < FAILURES or len({start.step for start in last}) > 1 or any(start.state in OVER for start in last):
        return
    where = f"in step {last[0].step}" if last[0].step else "before the first step"
    history = "; ".join(f"start {a.restarts + 1}: {a.state}, step {a.step}" for a in last)
    raise UserError(
        f"this run has failed {FAILURES} times in a row {where} ({history}; all starts: {path}): it would fail again. Mend "
        "the cause, which its messages above tell, and start it anew"
    )
