"""What the ranks ask each other once a training step, between forward and backward, in one number that is summed over them: is
every loss finite, and was anyone asked to stop?

A loss that is not finite masks the step on all ranks (``trainer.runtime.step_mask``): no table, parameter or state changes.
The number is read one step later, or before anything is reported, evaluated or saved: nobody waits for a GPU, and then all
ranks end with one message. A rank that was asked to stop makes all of them stop after the same step, where they can save
together; no signal handler communicates.
"""

import math
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_loaders.batch import Cursor
from data_loaders.errors import UserError
from data_loaders.manifest import Manifest
from data_loaders.messages import note
from trainer.runtime import fault_injection
from trainer.runtime.distributed import Ranks, on_all_ranks
from trainer.runtime.read_back import LateNumber
from trainer.runtime.restart_history import RestartHistory
from trainer.runtime.signals import STOP_SIGNALS
from trainer.runtime.step_mask import StepMask
from trainer.runtime.watchdog import Watchdog

NAMED_ROWS = 3  # rows that a message names


@dataclass(frozen=True)
class _Checked:
    """A step whose answer is still to be read: ``loss`` [], ``logits`` [B]."""

    step: int
    loss: Tensor
    logits: Tensor
    cursor: Cursor


class StepGuard:
    """Surrounds each training step: ``begin``, ``check`` between forward and backward, ``settle`` where something depends on
    the step, ``end``.

    ``asked``: the number of the signal by which this rank was asked to stop; 0 for none. ``manifest`` is that of the
    training data, to name rows by file where batches have an ``origin``; ``culprits`` names features that may be behind a
    loss that is not finite.
    """

    def __init__(
        self,
        ranks: Ranks,
        asked: Callable[[], int],
        watchdog: Watchdog,
        restarts: RestartHistory,
        manifest: Manifest,
        mask: StepMask,
        culprits: Callable[[], str] = str,
    ) -> None:
        self.ranks, self.watchdog, self._culprits = ranks, watchdog, culprits
        self._asked, self._restarts, self._manifest, self._mask = asked, restarts, manifest, mask
        self._answer = LateNumber(ranks.device)
        self._unread: _Checked | None = None
        self.step = 0
        self.stop_signal = 0

    @property
    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop: the same on all ranks."""
        return self.stop_signal > 0

    def begin(self, step: int) -> None:
        self.step = step
        self._restarts.record(step)
        self.watchdog.beat(step, "begin")
        fault_injection.at("step_begin", step=step)

    def end(self) -> None:
        self.watchdog.beat(self.step, "end")

    def over(self, step: int) -> None:
        """No step came after ``step``."""
        self.settle()
        self._restarts.record(step)
        self.watchdog.beat(step, "end")

    def check(self, loss: Tensor, logits: Tensor, cursor: Cursor) -> None:
        """``loss`` [], ``logits`` [B]. Masks this step on all ranks where the loss of any is not finite. Raises ``UserError``
        on every rank where that of the step before was not."""
        self.watchdog.beat(self.step, "guard")
        self.settle()
        if fault_injection.at("forward", step=self.step):
            loss = loss * float("nan")
        self._unread = _Checked(self.step, loss, logits, cursor)
        flag = loss * 0  # NaN where it is not finite, and so the sum
        if number := self._asked():
            flag += self._base ** STOP_SIGNALS.index(number)
        try:
            if self.ranks.world_size > 1:
                dist.all_reduce(flag)
        except RuntimeError:  # another rank has ended, which must not hide what this one has found
            if (mine := self._complaint(self._unread)) is None:
                raise
            raise UserError(f"rank {self.ranks.rank}: {mine}") from None
        self._mask.set(flag)
        self._answer.send(flag)
        self.watchdog.beat(self.step, "backward")

    def settle(self) -> None:
        """Reads what is still unread. Raises ``UserError`` on every rank where that step's loss was not finite on any."""
        if self._unread is None:
            return
        checked, self._unread = self._unread, None
        asked = self._answer.read()
        if asked != asked:
            self._end(checked)
        if asked and not self.stop_signal:
            # A rank counts as a digit of its signal, to the base of more than all ranks.
            self.stop_signal = next(n for i, n in reversed([*enumerate(STOP_SIGNALS)]) if asked >= self._base**i)
            if self.ranks.is_first:
                note(f"Asked to stop by {signal.Signals(self.stop_signal).name}: after step {self.step}")

    @property
    def _base(self) -> int:
        return self.ranks.world_size + 1

    def _end(self, checked: _Checked) -> NoReturn:
        """The loss of a step was not finite on some rank."""
        self._restarts.record(checked.step)
        mine = self._complaint(checked)
        try:
            message = on_all_ranks(mine)
        except RuntimeError:  # another rank has ended
            if mine is None:
                raise
            message = f"rank {self.ranks.rank}: {mine}"
        raise UserError(message)

    def _complaint(self, checked: _Checked) -> str | None:
        """None where this rank's loss is finite."""
        loss, cursor = checked.loss.item(), checked.cursor
        if math.isfinite(loss):
            return None
        rows = np.flatnonzero(~torch.isfinite(checked.logits[: cursor.local_rows]).cpu().numpy())
        named = self._culprits()
        large = f"Probably because of {named}: give it data.schema.features.….offset and scale. " if named else ""
        return (
            f"the loss of step {checked.step} is {loss}, in batch {cursor.step} of epoch {cursor.epoch}, "
            f"{self._place(rows, cursor)}. No rank has trained this step. {large}Look at these rows and at the learning rates "
            "(optim.tables.lr, optim.dense.lr; optim.dense.clip_norm), then start again: it goes on from the last checkpoint"
        )

    def _place(self, rows: np.ndarray, cursor: Cursor) -> str:
        """``rows`` of this rank's batch have logits that are not finite."""
        bad = f"{len(rows)} of this rank's {cursor.local_rows} rows have logits that are not finite"
        counted = f"where {bad if len(rows) else 'all logits are finite'}"
        if cursor.origin is None:
            return f"{counted} (debug.ledger=true names files and rows)"
        # Where all logits are finite, the batch as a whole is what there is to look at.
        origin = cursor.origin[rows] if len(rows) else cursor.origin
        named = ", ".join(self._named(row) for row in origin[:NAMED_ROWS])
        return f"{counted}: {named}{' …' if len(origin) > NAMED_ROWS else ''}"

    def _named(self, number: int) -> str:
        """``file row n`` of the row ``number`` of the manifest."""
        files = self._manifest.files
        ends = np.cumsum([file.num_rows for file in files])
        file = int(np.searchsorted(ends, number, side="right"))
        start = ends[file - 1] if file else 0
        return f"{self._manifest.relative(files[file])} row {number - start}"
