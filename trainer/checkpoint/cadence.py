"""When a checkpoint is due."""

import time

from trainer.config.checkpoint import CheckpointConfig
from trainer.runtime.distributed import from_first

CLOCK_STEPS = 16  # rank 0's clock is asked so often: it costs a broadcast
RETRY_STEPS = 32  # from a failed save to the next attempt


class Cadence:
    """Every so many steps, every so many minutes since the last save began, and some steps after a failed one. All ranks ask
    at the same steps and get the same answer."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._config, self._begun = config, time.monotonic()
        self._retry_step: int | None = None

    def begun(self) -> None:
        """A save begins."""
        self._retry_step, self._begun = None, time.monotonic()

    def failed(self, step: int) -> None:
        self._retry_step = step + RETRY_STEPS

    def may_be_due(self, step: int) -> bool:
        """Whether it may be at this step, before the clock is looked at."""
        return self._is_step_due(step) or self._is_clock_step(step)

    def is_due(self, step: int) -> bool:
        return self._is_step_due(step) or (self._is_clock_step(step) and from_first(self._is_time))

    def _is_step_due(self, step: int) -> bool:
        every, retry = self._config.every_steps, self._retry_step
        return (every is not None and step % every == 0) or (retry is not None and step >= retry)

    def _is_clock_step(self, step: int) -> bool:
        return self._config.every_minutes is not None and step % CLOCK_STEPS == 0

    def _is_time(self) -> bool:
        assert self._config.every_minutes is not None
        return time.monotonic() - self._begun >= 60 * self._config.every_minutes
