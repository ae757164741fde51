"""How far a run is, for whoever watches: a bar that is drawn again on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from trainer.runtime.progress import Progress

LOG_SECONDS = 10.0  # between two lines of a log


class ProgressBar:
    """Step, rows, samples/s, loss, AUC and input wait of the last line of metrics, and the time left. Begins at the first
    step: messages before that have lines of their own."""

    def __init__(self, total_steps: int, *, quiet: bool, file: TextIO | None = None) -> None:
        self._total, self._quiet, self._file = total_steps, quiet, file or sys.stderr
        self._bar: tqdm | None = None
        self._told = -LOG_SECONDS

    def step(self, progress: Progress) -> None:
        if self._quiet or not self._file.isatty():
            return
        if self._bar is None:
            self._bar = tqdm(
                total=self._total,
                unit="step",
                initial=progress.step - 1,
                dynamic_ncols=True,
                mininterval=1.0,
                file=self._file,
            )
        self._bar.update(progress.step - self._bar.n)

    def report(self, progress: Progress, values: Mapping[str, Any], seconds_per_step: float) -> None:
        """``values``: of a line of training metrics."""
        shown = {"rows": f"{progress.rows:,}", **_shown(values)}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
        elif not self._quiet and (self._is_due() or progress.step >= self._total):
            left = tqdm.format_interval(max(0, self._total - progress.step) * seconds_per_step)
            parts = ", ".join(f"{name} {value}" for name, value in shown.items())
            share = progress.step / max(self._total, 1)
            line = f"step {progress.step:,} of {self._total:,} ({share:.0%}): {parts}, {left} left"
            print(line, file=self._file, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now - self._told < LOG_SECONDS:
            return False
        self._told = now
        return True


def _shown(values: Mapping[str, Any]) -> dict[str, str]:
    loss, auc = values["logloss"], values["auc"]
    return {
        "samples/s": f"{values['samples_per_second']:,.0f}",
        "loss": "–" if loss is None else f"{loss:.4f}",
        "auc": "–" if auc is None else f"{auc:.4f}",
        "input wait": f"{values['input_wait_fraction']:.0%}",
    }
