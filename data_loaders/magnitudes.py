"""Magnitudes of the data's numbers, as sums over a sample of the decoded rows: of fixed size, and additive over ranks."""

import threading

import numpy as np
from numpy.typing import NDArray

LOOKED_AT = 256  # rows of each decoded table, at least, where it has as many
SUMS = 3  # of each line: values, absolute values, squares


class Magnitudes:
    """``lines``: dense features in order, then label, then weight. Several threads add."""

    def __init__(self, lines: int) -> None:
        self._lock = threading.Lock()
        self._sums = np.zeros(2 + SUMS * lines)

    def look(self, numbers: NDArray[np.float32]) -> None:
        """Adds decoded rows, [lines, rows]; every so many of them is looked at. What is not finite counts as 0."""
        rows = numbers.shape[1]
        if not rows or not len(numbers):
            return
        sample = numbers[:, :: max(1, rows // LOOKED_AT)].astype(np.float64)  # [lines, looked at]
        sample[~np.isfinite(sample)] = 0.0
        sums = np.stack((sample.sum(1), np.abs(sample).sum(1), np.square(sample).sum(1)), axis=1)  # [lines, SUMS]
        with self._lock:
            self._sums += np.concatenate(((rows, sample.shape[1]), sums.reshape(-1)))

    def snapshot(self) -> NDArray[np.float64]:
        """[2 + SUMS · lines]: rows, rows looked at, then the sums, line by line."""
        with self._lock:
            return self._sums.copy()
