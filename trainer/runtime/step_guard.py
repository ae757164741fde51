"""What the ranks ask each other once a training step, between forward and backward, in one tiny all-reduce: is every loss
finite, and was anyone asked to stop?

A loss that is not finite ends all ranks before any backward, so that no table is touched anywhere (an update of tables is
part of backward, and NaN spreads to all ranks with it). A rank that was asked to stop makes all of them stop after the same
step, where they can save together; no signal handler communicates.
"""

import signal
from collections.abc import Callable

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
from trainer.runtime.restart_history import Attempts
from trainer.runtime.watchdog import Watchdog

NAMED_ROWS = 3  # rows that a message names


class StepGuard:
    """Surrounds each training step: ``begin``, ``check`` between forward and backward, ``end``.

    ``asked``: the number of the signal by which this rank was asked to stop; 0 for none. ``manifest`` is that of the
    training data, to name rows by file where batches have an ``origin``; ``culprits`` names features that may be behind a
    loss that is not finite.
    """

    def __init__(
        self,
        ranks: Ranks,
        asked: Callable[[], int],
        watchdog: Watchdog,
        attempts: Attempts,
        manifest: Manifest,
        culprits: Callable[[], str] = str,
    ) -> None:
        self.ranks, self.watchdog, self._culprits = ranks, watchdog, culprits
        self._asked, self._attempts, self._manifest = asked, attempts, manifest
        self.step = 0
        self.stop_signal = 0

    @property
    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop: the same on all ranks, from the check of a step on."""
        return self.stop_signal > 0

    def begin(self, step: int) -> None:
        self.step = step
        self._attempts.record(step)
        self.watchdog.beat(step, "begin")
        fault_injection.at("step_begin", step=step)

    def end(self) -> None:
        self.watchdog.beat(self.step, "end")

    def over(self, step: int) -> None:
        """No step came after ``step``."""
        self._attempts.record(step)
        self.watchdog.beat(step, "end")

    def check(self, loss: Tensor, logits: Tensor, cursor: Cursor) -> None:
        """``loss`` [], ``logits`` [B]. Raises ``UserError`` on every rank where the loss of any is not finite."""
        if fault_injection.at("forward", step=self.step):
            loss = loss * float("nan")
        self.watchdog.beat(self.step, "guard")
        flags = torch.full((2,), self._asked(), dtype=torch.int32, device=loss.device)
        flags[0] = ~torch.isfinite(loss)
        try:
            if self.ranks.world_size > 1:
                dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            not_finite, stop_signal = flags.tolist()
        except RuntimeError:  # another rank has ended, which must not hide what this one has found
            if torch.isfinite(loss):
                raise
            raise UserError(f"rank {self.ranks.rank}: {self._complaint(loss.item(), logits, cursor)}") from None
        self.watchdog.beat(self.step, "backward")
        if not_finite:
            mine = None if torch.isfinite(loss) else self._complaint(loss.item(), logits, cursor)
            raise UserError(on_all_ranks(mine))
        if stop_signal and not self.stop_signal and self.ranks.is_first:
            note(f"Asked to stop by {signal.Signals(stop_signal).name}: after step {self.step}")
        self.stop_signal = stop_signal

    def _complaint(self, loss: float, logits: Tensor, cursor: Cursor) -> str:
        rows = np.flatnonzero(~torch.isfinite(logits[: cursor.local_rows]).cpu().numpy())
        named = self._culprits()
        large = f"Probably because of {named}: give it data.schema.features.….offset and scale. " if named else ""
        return (
            f"the loss of step {self.step} is {loss}, in batch {cursor.step} of epoch {cursor.epoch}, "
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
