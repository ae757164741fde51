"""Fewer points for a curve that looks the same."""

import numpy as np
from numpy.typing import NDArray

MOST_POINTS = 1000


def kept_points(values: NDArray[np.float64], most: int = MOST_POINTS) -> NDArray[np.int64]:
    """Ascending indices of at most ``most`` values: the first, the last, the smallest and the largest of each of ``most / 4``
    stretches of equal length, so that no extreme is lost. NaN is no value, but where there is nothing else."""
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), max(most // 4, 1) + 1).astype(np.int64)
    kept = []
    for begin, end in zip(edges[:-1], edges[1:]):
        part = values[begin:end]
        kept += [begin, end - 1]
        if not np.isnan(part).all():
            kept += [begin + int(np.nanargmin(part)), begin + int(np.nanargmax(part))]
    return np.unique(np.array(kept, np.int64))
