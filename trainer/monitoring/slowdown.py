"""Whether a run's throughput collapsed: where it fell, and stayed down."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

FACTOR = 2.0  # between the medians before and after: neighbours on a machine take less
CUTS = 100
LEAST = 3  # values on each side: one slow window is an evaluation or a page cache that fills
CAUSE = (
    "other work took the cores; a rank with several threads, which wait for each other at every operation, loses most "
    "(OMP_NUM_THREADS=1, and more ranks)"
)


class Collapse(NamedTuple):
    """``place``: of the first value after the fall. ``before``, ``after``: the medians."""

    place: int
    before: float
    after: float


def find_collapse(rates: ArrayLike) -> Collapse | None:
    """The cut of ``rates`` (rows or steps a second, in their order) that parts them best, by the squares of their logarithms;
    None where the medians do not fall there by ``FACTOR``. Of a long run ``CUTS`` are looked at."""
    rates = np.maximum(np.asarray(rates, np.float64), 1e-9)
    places = np.arange(LEAST, len(rates) - LEAST + 1)
    if not len(places):
        return None
    places, sums = places[:: max(1, len(places) // CUTS)], np.cumsum(np.log(rates))
    left, right = sums[places - 1] / places, (sums[-1] - sums[places - 1]) / (len(rates) - places)  # means
    place = int(places[np.argmax(places * (len(rates) - places) * (left - right) ** 2)])
    before, after = float(np.median(rates[:place])), float(np.median(rates[place:]))
    return Collapse(place, before, after) if before >= FACTOR * after else None
