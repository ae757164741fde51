"""Whether a save fits into the time that the launcher grants between a signal and the end (``clicktrainer train --grace``)."""

import time

from data_loaders.messages import warn
from trainer.checkpoint.saving import Checkpoints
from trainer.runtime.distributed import Ranks


class GraceCheck:
    """Measures each save, and warns once of one that took longer than ``grace`` seconds (None: nobody has said). It notices
    saves by looking between steps, so one that is written beside training counts until the step that notices its end."""

    def __init__(self, checkpoints: Checkpoints, grace: float | None, ranks: Ranks) -> None:
        self.checkpoints, self.grace, self.ranks = checkpoints, grace, ranks
        self.warned = False
        self._waited = checkpoints.seconds
        self._began: float | None = None

    def look(self) -> None:
        """Between two steps. Rank 0 prints; no collective."""
        waited, self._waited = self.checkpoints.seconds - self._waited, self.checkpoints.seconds
        if self.checkpoints.under_way:
            self._began = time.monotonic() - waited if self._began is None else self._began
        else:
            beside = 0.0 if self._began is None else time.monotonic() - self._began
            self._began = None
            self._check(max(waited, beside))

    def _check(self, seconds: float) -> None:
        if self.grace is None or self.warned or seconds <= self.grace:
            return
        self.warned = True
        if self.ranks.is_first:
            warn(
                f"the last checkpoint took {seconds:.0f} s, but a run that is asked to stop gets {self.grace:g} s to "
                f"save and end, and would lose what it has trained since its last checkpoint: clicktrainer train --grace "
                f"{2 * seconds + 10:.0f}, and as much of your scheduler"
            )
