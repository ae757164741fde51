"""Search spaces in Hydra's own sweep syntax: `a,b`, `choice(a, b)`, `range(1, 5)`, `interval(0, 1)`, `int(interval(1, 8))`,
`tag(log, interval(1e-4, 1e-2))`: what hydra-optuna-sweeper reads. (``range`` leaves its end out, as Hydra and Python do.)
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from data_loaders.errors import UserError

MOST_TRIALS = 10_000  # of a grid
MOST_STEPS = 1_000_000  # of a range of fractions


@dataclass(frozen=True)
class Dimension:
    """``key`` as on the command line (``+`` included). Either ``choices``, as Hydra writes them, or ``low`` to ``high``,
    both included, in steps of ``step`` (None: of any size); all whole numbers where ``low`` is one."""

    key: str
    text: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False

    @property
    def corners(self) -> tuple[str, ...]:
        """Values that a check of the configuration should try."""
        return self.choices or (repr(self.low), repr(self.high))

    @property
    def values(self) -> tuple[str, ...]:
        """All, for a grid. Raises ``UserError``."""
        if not self.choices and self.step is None:
            raise UserError(f"{self.text}: an interval has no end of values; list some, or search with sweep=optuna")
        if self.choices:
            return self.choices
        count = round((self.high - self.low) / self.step)
        if count >= MOST_TRIALS:
            raise UserError(
                f"{self.text}: that is more than {MOST_TRIALS:,} values: give fewer, or search with sweep=optuna"
            )
        return tuple(repr(_tidy(self.low + number * self.step)) for number in range(count + 1))


def parse(overrides: Sequence[str]) -> tuple[list[str], list[Dimension]]:
    """The overrides that are the same for all trials, and the dimensions of the rest. Raises ``UserError``."""
    parser, fixed, dimensions = OverridesParser.create(), [], []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise UserError(f"{text!r} is not an override: {str(error).splitlines()[0]}") from None
        if override.is_sweep_override():
            dimensions.append(_dimension(text, override))
        else:
            fixed.append(text)
    keys = [dimension.key for dimension in dimensions]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"{repeated[0]} is swept twice: say once what it is to be")
    return fixed, dimensions


def grid(dimensions: Sequence[Dimension]) -> Iterator[dict[str, str]]:
    """Every combination; the last dimension changes fastest."""
    trials = math.prod(len(dimension.values) for dimension in dimensions)
    if trials > MOST_TRIALS:
        raise UserError(f"a grid of {trials:,} trials: give fewer values, or search with sweep=optuna")
    for values in itertools.product(*(dimension.values for dimension in dimensions)):
        yield {dimension.key: value for dimension, value in zip(dimensions, values)}


def as_text(value: Any) -> str:
    """A value of Optuna's as an override."""
    return value if isinstance(value, str) else repr(value)


def number(text: str) -> float | None:
    """The number that a value is; None for other values."""
    try:
        return float(text)
    except ValueError:
        return None


def _dimension(text: str, override: Override) -> Dimension:
    key, sweep = override.get_key_element(), override._value
    log = "log" in getattr(sweep, "tags", ())
    if isinstance(sweep, IntervalSweep):
        if not sweep.start < sweep.end or log and sweep.start <= 0:
            raise UserError(f"{text}: give interval(LOW, HIGH) with LOW below HIGH{', above 0 for log' if log else ''}")
        return Dimension(key, text, low=sweep.start, high=sweep.end, log=log)
    if isinstance(sweep, RangeSweep):
        return _range(key, text, sweep, log)
    if not isinstance(sweep, ChoiceSweep):
        raise UserError(f"{text}: glob() is not known here; list the names")
    sweep.shuffle = False  # trials have numbers, which a resumed sweep must find again
    choices = tuple(override.sweep_string_iterator())
    if len(set(choices)) < len(choices):
        raise UserError(f"{text}: a value is listed twice")
    return Dimension(key, text, choices=choices)


def _range(key: str, text: str, sweep: RangeSweep, log: bool) -> Dimension:
    sweep.shuffle = False
    if not sweep.step > 0 or not sweep.start < sweep.stop:
        raise UserError(
            f"{text}: give range(START, STOP, STEP) with START below STOP, which is left out, and STEP above 0"
        )
    values: Any = sweep.range()
    if not isinstance(values, range):
        if not (sweep.stop - sweep.start) / sweep.step < MOST_STEPS:
            raise UserError(
                f"{text}: that is more than {MOST_STEPS:,} steps: give a larger one, or interval(LOW, HIGH)"
            )
        values = list(values)
    if log and sweep.step != 1:
        raise UserError(f"{text}: a range by log has no step; use tag(log, interval(…)), or choice(…)")
    step = None if log and isinstance(values[0], float) else sweep.step
    return Dimension(key, text, low=values[0], high=_tidy(values[-1]), step=step, log=log)


def _tidy(value: float) -> float:
    """0.3 instead of 0.30000000000000004."""
    return value if isinstance(value, int) else float(f"{value:.12g}")
