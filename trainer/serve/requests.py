"""A request's columns, from JSON or Arrow, as Arrow arrays of the types that the training data have: the loader's own decoder
then makes the same features of them.

An id is hashed by its type, so 123 and "123" are different ids: a value is converted to the column's type or refused, never
guessed. For integers, a decimal text means the number (JavaScript has no integers above 2^53); times are ISO 8601 texts.
"""

import decimal
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from data_loaders.arrow import is_list, is_text, value_type
from data_loaders.errors import UserError
from data_loaders.schema import one_of

CONVERSION_ERRORS = (pa.ArrowException, OverflowError, TypeError, ValueError)
_WHOLE = re.compile(r"-?\d{1,20}")


class RequestError(UserError):
    """A request that cannot be scored, by the client's mistake."""


@dataclass(frozen=True)
class Element:
    """What a JSON value is turned into for an Arrow type: ``convert`` raises ``ValueError`` for values that it does not mean,
    and leaves those of the types ``plain`` as they are."""

    name: str
    convert: Callable[[Any], Any]
    plain: frozenset[type] = frozenset((type(None),))


def table_of(columns: Mapping[str, Sequence[Any]], types: Mapping[str, pa.DataType], where: str) -> pa.Table:
    """JSON columns, equally long lists, as a table. Raises ``RequestError`` naming ``where``, column, row and remedy."""
    arrays, rows = {}, None
    for name, values in columns.items():
        check_known(name, types, where)
        if not isinstance(values, (list, tuple)):
            raise RequestError(f"{where}.{name} is {values!r:.100}: give a list with a value for each row")
        if rows is not None and len(values) != rows:
            first = next(iter(columns))
            raise RequestError(f"{where}.{name} has {len(values)} values, {where}.{first} {rows}: give each row one")
        rows = len(values)
        arrays[name] = _array(values, types[name], f"{where}.{name}")
    return pa.table(arrays)


def row_of(columns: Mapping[str, Any], types: Mapping[str, pa.DataType], where: str) -> pa.Table:
    """The one row of a JSON object. Raises ``RequestError``."""
    for name in columns:
        check_known(name, types, where)
    return pa.table({name: _array([value], types[name], f"{where}.{name}") for name, value in columns.items()})


def cast(table: pa.Table, types: Mapping[str, pa.DataType], where: str) -> pa.Table:
    """An Arrow table's columns in the types of the training data. Raises ``RequestError``: nothing is cut or rounded."""
    arrays = {}
    for name, column in zip(table.column_names, table.columns):
        check_known(name, types, where)
        try:
            arrays[name] = column if column.type == types[name] else column.cast(types[name])
        except CONVERSION_ERRORS as error:
            raise RequestError(
                f"{where}.{name} has type {column.type}, the training data {types[name]}: {error}; cast it where it is made"
            ) from None
    return pa.table(arrays)


def with_nulls(table: pa.Table, names: Sequence[str], types: Mapping[str, pa.DataType], rows: int) -> pa.Table:
    """The columns ``names`` of ``table`` and ``rows`` rows of them; null where it lacks one."""
    columns = [
        table.column(name) if name in table.column_names else pa.chunked_array([pa.nulls(rows, types[name])])
        for name in names
    ]
    if not columns:  # which nothing reads, and which says how many rows there are
        return pa.table({"": pa.nulls(rows)})
    return pa.Table.from_arrays(columns, names=list(names))


def check_known(name: str, types: Mapping[str, pa.DataType], where: str) -> None:
    try:
        one_of(name, types, where)
    except UserError as error:
        raise RequestError(str(error)) from None


def _array(values: Sequence[Any], kind: pa.DataType, where: str) -> pa.Array:
    kind = pa.int64() if pa.types.is_null(kind) else kind
    lists = is_list(kind)
    element = _element(kind.value_type if lists else kind)
    if not _are_plain(values, element.plain, lists):
        values = [_convert(value, element, lists, f"{where}, row {row}") for row, value in enumerate(values)]
    try:
        return pa.array(values, type=kind)
    except CONVERSION_ERRORS as error:
        row = next(row for row, value in enumerate(values) if not _fits(value, kind))
        raise RequestError(f"{where}, row {row}: {values[row]!r:.100} is no {kind} ({error})") from None


def _are_plain(values: Sequence[Any], plain: frozenset[type], lists: bool) -> bool:
    """Whether Arrow takes all values for what they are. (It takes True for 1.0, a text for a list of letters, and a number for
    a time, among others.)"""
    if not lists:
        return plain.issuperset(map(type, values))
    return {list, type(None)}.issuperset(map(type, values)) and all(
        plain.issuperset(map(type, value)) for value in values if value
    )


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], type=kind)
    except CONVERSION_ERRORS:
        return False
    return True


def _convert(value: Any, element: Element, lists: bool, where: str) -> Any:
    if value is None:
        return None
    try:
        if not lists:
            return element.convert(value)
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return [None if item is None else element.convert(item) for item in value]
    except CONVERSION_ERRORS:
        given = f"a list of {element.name}" if lists else element.name
        raise RequestError(f"{where}: {value!r:.100} is not {given}, which the training data have there") from None


def _element(kind: pa.DataType) -> Element:
    kind = value_type(kind)
    none = type(None)
    if isinstance(kind, pa.UuidType):
        return Element("a UUID", lambda value: uuid.UUID(_text(value)).bytes)
    if pa.types.is_boolean(kind):
        return Element("true or false", _boolean, frozenset((bool, none)))
    if pa.types.is_integer(kind):
        return Element("an integer", _whole, frozenset((int, none)))
    if pa.types.is_floating(kind):
        return Element("a number", _number, frozenset((float, none)))
    if pa.types.is_decimal(kind):
        return Element("a number", _decimal)
    if pa.types.is_temporal(kind):
        return Element("an ISO 8601 text", lambda value: pa.scalar(_text(value)).cast(kind).as_py())
    assert is_text(kind), kind
    return Element("a text", _text, frozenset((str, none)))


def _boolean(value: Any) -> bool:
    if value in (0, 1) and isinstance(value, (bool, int)):
        return bool(value)
    raise ValueError


def _whole(value: Any) -> int:
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is int:
        return value
    raise ValueError


def _number(value: Any) -> float:
    if type(value) in (int, float):
        return float(value)
    raise ValueError


def _decimal(value: Any) -> decimal.Decimal:
    try:
        return decimal.Decimal(value if isinstance(value, str) else str(_number(value)))
    except decimal.InvalidOperation:
        raise ValueError from None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError
