"""JSON from a stranger: read in bounded time and memory, and held against the form that a program expects of it.

A *form* is a type (``str``, ``bool``, ``dict``, ``list``), a ``Whole`` or ``Number`` within bounds, ``Optional``, ``Listed`` or
``Mapped`` of a form, or a dict literal: an object that has at least these keys, each of its form.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_loaders.errors import UserError

MOST_ITEMS = 10_000_000  # of one text: each takes up to 300 bytes of memory
DEEPEST = 64  # of objects and lists in each other
LONGEST_NUMBER = 40  # characters
LARGEST_WHOLE = 1 << 64  # a seed may be as large
NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Whole:
    """A whole number from ``least`` to ``most``."""

    least: int = 0
    most: int = 1 << 53


@dataclass(frozen=True)
class Number:
    """Any finite number from ``least`` to ``most``."""

    least: float = -math.inf
    most: float = math.inf


@dataclass(frozen=True)
class Optional:
    """``form``, or null."""

    form: Any


@dataclass(frozen=True)
class Listed:
    """A list of ``form``."""

    form: Any


@dataclass(frozen=True)
class Mapped:
    """An object with any keys, its values of ``form``."""

    form: Any


def parse_json(text: bytes | str) -> Any:
    """JSON without repeated keys, of numbers that are finite and fit 64 bits. Raises ``UserError`` for whatever is wrong
    with it: broken, not UTF-8, nested more than ``DEEPEST`` deep, of more than ``MOST_ITEMS`` items."""
    if isinstance(text, bytes):
        text = _decoded(text)
    if text.count(",") + text.count("[") + text.count("{") > MOST_ITEMS:  # before anything is made of them
        raise UserError(f"holds more than {MOST_ITEMS:,} items")
    try:
        value = json.loads(
            text, object_pairs_hook=_distinct, parse_constant=_constant, parse_int=_whole, parse_float=_number
        )
    except RecursionError:
        raise UserError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise UserError(f"no JSON: line {error.lineno}, column {error.colno}") from None
    _check_depth(value)
    return value


def check_form(value: Any, form: Any, where: str) -> None:
    """Raises ``UserError``, naming the place below ``where``, unless ``value`` has this form."""
    if isinstance(form, Optional):
        if value is not None:
            check_form(value, form.form, where)
    elif isinstance(form, (dict, Mapped)):
        _refuse_unless(isinstance(value, dict), value, where, "an object")
        for key in form if isinstance(form, dict) else value:
            _refuse_unless(key in value, value, where, f"an object with '{key:.100}'")
            check_form(value[key], form[key] if isinstance(form, dict) else form.form, _below(where, key))
    elif isinstance(form, Listed):
        _refuse_unless(isinstance(value, list), value, where, "a list")
        for number, item in enumerate(value):
            check_form(item, form.form, f"{where}[{number}]")
    elif isinstance(form, (Whole, Number)):
        kinds = (int,) if isinstance(form, Whole) else (int, float)
        within = type(value) in kinds and form.least <= value <= form.most
        expected = "a whole number" if isinstance(form, Whole) else "a number"
        _refuse_unless(within, value, where, f"{expected} from {form.least} to {form.most}")
    else:
        _refuse_unless(isinstance(value, form), value, where, NAMES[form])


def get_form(value: Mapping[str, Any], key: str, form: Any) -> Any:
    """``value[key]`` where it is there and of this form; None elsewhere: for what is only shown."""
    try:
        check_form(value.get(key), form, key)
    except ValueError:
        return None
    return value.get(key)


def printable(text: str) -> str:
    """Without letters that could colour or move about a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _refuse_unless(sound: bool, value: Any, where: str, expected: str) -> None:
    if not sound:
        raise UserError(f"{where} is {_short(value)}, not {expected}")


def _below(where: str, key: str) -> str:
    return f"{where}{': ' if where.endswith('.json') else '.'}{key:.100}"


def _short(value: Any) -> str:
    """Of a value that may be large."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return f"{value!r:.100}"


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"no UTF-8 text: byte {error.start}") from None


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise UserError("nested too deeply")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise UserError("a key is repeated")
    return value


def _whole(text: str) -> int:
    value = int(text) if len(text) <= LONGEST_NUMBER else LARGEST_WHOLE + 1
    if abs(value) > LARGEST_WHOLE:
        raise UserError(f"holds the number {text:.20}…, too large for 64 bits")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UserError(f"holds the number {text:.20}, which is not finite")
    return value


def _constant(text: str) -> None:
    raise UserError(f"holds {text}, which is not finite")
