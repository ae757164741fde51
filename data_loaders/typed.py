"""Plain values (maps, lists, scalars) held against dataclasses: which key is unknown, which value is of another kind.

Says so in the configuration's own keys, with the nearest valid names; what is converted (``"16"`` where a whole number
belongs) is as in OmegaConf, but YAML's surprises are refused: ``label: yes`` is not the column ``True``.
"""

import dataclasses
import difflib
import functools
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from data_loaders.errors import UserError
from data_loaders.messages import one_line
from data_loaders.secrets import redact

MISSING = "???"  # OmegaConf's mark of a value that must be given
LONGEST = 60  # characters of a value that is shown
_TRUE = frozenset(("true", "yes", "on", "y", "1"))
_TRUTHS = _TRUE | {"false", "no", "off", "n", "0"}
_SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word or text"}


def check(value: Any, kind: Any, key: str = "") -> None:
    """Raises ``UserError`` unless ``value`` can become a ``kind``: a dataclass, ``list[…]``, ``dict[str, …]``, a scalar, or one
    of these or None. Interpolations, which are not resolved yet, are left alone. ``key`` is its place."""
    if kind is Any or _is_open(value):
        return
    if get_origin(kind) in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        if value is not None:
            check(value, options[0], key)
    elif value is None:
        raise UserError(f"{key} is null: {_remedy_of_null(kind)}")
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        _check_fields(value, kind, key)
    elif get_origin(kind) is dict:
        _check_map(value, get_args(kind)[1], key)
    elif get_origin(kind) is list:
        _check_list(value, get_args(kind)[0], key)
    elif kind in _SCALARS and not _fits(value, kind):
        raise UserError(f"{key} is {shown(value, key)}: expected {_SCALARS[kind]}{_hint(value, kind)}")


def made(value: Any, kind: Any, key: str = "") -> Any:
    """``value``, which has passed ``check``, as a ``kind``; what is not given has its default. As OmegaConf converts, but in a
    tenth of its time, which for a thousand features is seconds. Raises ``UserError`` for a key that has neither."""
    if kind is Any:
        return value
    if get_origin(kind) in (Union, types.UnionType):
        return (
            None
            if value is None
            else made(value, next(option for option in get_args(kind) if option is not type(None)), key)
        )
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind(**dict(_fields_made(value, kind, key)))
    if get_origin(kind) is dict:
        return {name: made(inner, get_args(kind)[1], _joined(key, name)) for name, inner in value.items()}
    if get_origin(kind) is list:
        return [made(inner, get_args(kind)[0], f"{key}[{number}]") for number, inner in enumerate(value)]
    return str(value).lower() in _TRUE if kind is bool else kind(value)


def _fields_made(value: dict[str, Any], kind: type, key: str) -> Iterator[tuple[str, Any]]:
    """In the order of the class, in which mistakes are found."""
    hints, missing = _hints(kind), dataclasses.MISSING
    for field in dataclasses.fields(kind):
        where = _joined(key, field.name)
        if field.name in value:
            yield field.name, made(value[field.name], hints[field.name], where)
        elif field.default is missing and field.default_factory is missing:
            raise UserError(f"{where} has no value: give it on the command line, {where}=…")


def near(name: str, valid: Iterable[str], parent: str = "") -> str:
    """``; did you mean …? (valid: …)``, for the end of a message."""
    valid = sorted(map(str, valid))
    found = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    prefix = f"{parent}." if parent else ""
    hint = f"; did you mean {' or '.join(prefix + n for n in found)}?" if found else ""
    return f"{hint} (valid: {', '.join(valid)})" if valid else hint


def at(path: Sequence[str], kind: Any) -> Any:
    """The kind of the value at ``path`` within a ``kind``; ``Any`` where that is not said, None where there is no such key."""
    for name in path:
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(option for option in get_args(kind) if option is not type(None))
        if dataclasses.is_dataclass(kind):
            kind = get_type_hints(kind).get(name)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return None if kind is None else Any
    return kind


def shown(value: Any, key: str = "") -> str:
    """A value in a message: short, in one line, and no secret."""
    return one_line(repr(redact(value, key.rpartition(".")[2])), LONGEST)


_hints = functools.cache(get_type_hints)  # a class's annotations are texts, which it evaluates


def _check_fields(value: Any, kind: type, key: str) -> None:
    hints = _hints(kind)
    valid = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(value, dict):
        raise UserError(f"{key} is {shown(value, key)}: expected a map of keys (valid: {', '.join(sorted(valid))})")
    for name, inner in value.items():
        if name not in valid:
            raise UserError(f"{_joined(key, name)} is not a known key{near(str(name), valid, key)}")
        check(inner, hints[name], _joined(key, name))


def _check_map(value: Any, kind: Any, key: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{key} is {shown(value, key)}: expected a map, such as {{name: …}}")
    for name, inner in value.items():
        if not isinstance(name, str):
            raise UserError(f"{_joined(key, name)}: the name {name} is no text: quote it, as in '{name}':")
        check(inner, kind, _joined(key, name))


def _check_list(value: Any, kind: Any, key: str) -> None:
    if not isinstance(value, (list, tuple)):
        example = f": write [{value}]" if isinstance(value, (str, int, float)) else ""
        raise UserError(f"{key} is {shown(value, key)}: expected a list{example}")
    for number, inner in enumerate(value):
        check(inner, kind, f"{key}[{number}]")


def _fits(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool) or isinstance(value, (str, int)) and str(value).lower() in _TRUTHS
    if isinstance(value, bool) or not isinstance(value, (str, int, float)[: 2 if kind is int else 3]):
        return False
    try:
        kind(value)
    except (ValueError, OverflowError):
        return False
    return True


def _hint(value: Any, kind: type) -> str:
    if kind is int and isinstance(value, float) and value.is_integer():
        return f": write {int(value)}"
    if kind is str and isinstance(value, bool):
        return ": YAML reads yes, no, on and off as truth values, so quote the word"
    return ""


def _remedy_of_null(kind: Any) -> str:
    if get_origin(kind) is list:
        return "write [] for none, or leave the key out for its default"
    if get_origin(kind) is dict or dataclasses.is_dataclass(kind):
        return "indent its keys below it, or leave it out for its default"
    return f"expected {_SCALARS.get(kind, 'a value')}; leave the key out for its default"


def _is_open(value: Any) -> bool:
    return isinstance(value, str) and (value == MISSING or "${" in value)


def _joined(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
