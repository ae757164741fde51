"""Checks that several sections share."""

import math

from data_loaders.errors import UserError
from data_loaders.schema import one_of

BEST = ("valid.auc", "valid.auc_pr", "valid.gauc", "valid.logloss", "valid.ne")
LOWER_IS_BETTER = ("valid.logloss", "valid.ne")


def improvement(metric: str, value: float, on: float) -> float:
    """By how much ``value`` of a metric of ``BEST`` is better than another; negative where it is worse."""
    return on - value if metric in LOWER_IS_BETTER else value - on


def check_patience(metric: str, patience: int | None, min_delta: float, where: str) -> None:
    one_of(metric, BEST, f"{where}.metric")
    if patience is not None:
        positive(patience, f"{where}.patience")
    if not min_delta >= 0:
        raise UserError(f"{where}.min_delta is {min_delta}: it must not be negative")


def positive(value: float, where: str) -> None:
    if not value > 0 or value == math.inf:
        raise UserError(f"{where} is {value}: it must be a positive number")
    if value >= 1 << 63:
        raise UserError(f"{where} is {value}: give a smaller number, below 2^63")


def check_seed(value: int, where: str) -> None:
    if not 0 <= value < 1 << 63:
        raise UserError(f"{where} is {value}: give a whole number from 0 to 2^63 - 1")
