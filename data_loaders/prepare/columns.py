"""Checks of a table's columns that steps, splits and histories share."""

import ibis

from data_loaders.errors import UserError
from data_loaders.prepare.declaration import TEMPORARY
from data_loaders.prepare.engine import KEY
from data_loaders.schema import one_of

# Rows that one row can become in one step: a child's __part is its parent's times that, plus its number.
MAX_CHILDREN = 65_536


def visible(table: ibis.Table) -> list[str]:
    """The columns that are the user's."""
    return [column for column in table.columns if not TEMPORARY.match(column)]


def check(table: ibis.Table, names: list[str], where: str) -> None:
    """Raises ``UserError`` naming the nearest columns for one that the table lacks."""
    for name in names:
        one_of(name, visible(table), where)


def check_same_types(table: ibis.Table, other: ibis.Table, pairs: dict[str, str], name: str, where: str) -> None:
    """Columns that are compared, ``table``'s with ``other``'s (called ``name``), must be of one family: integers of any
    width, or one and the same type. Raises ``UserError`` otherwise."""
    for mine, theirs in pairs.items():
        left, right = table[mine].type(), other[theirs].type()
        if not (left.is_integer() and right.is_integer()) and left.copy(nullable=True) != right.copy(nullable=True):
            raise UserError(
                f"{where}: '{mine}' is {left} here and '{theirs}' is {right} in '{name}': declare the same type in "
                "sources, or cast one with a select step"
            )


def key(table: ibis.Table) -> dict[str, ibis.Value]:
    """``__row`` and ``__part``."""
    return {name: table[name] for name in KEY}


def comparable(value: ibis.Value) -> ibis.Value:
    """Integers in one width, so that columns of two tables can be put under each other."""
    return value.cast("int64") if value.type().is_integer() else value


def placed(table: ibis.Table, by: dict[str, str], time: str, **more: ibis.Value) -> ibis.Table:
    """``by`` (name here -> column), ``__time``, ``__row``, ``__part`` and ``more``: rows with a time and all of ``by``."""
    values = {name: comparable(table[column]) for name, column in by.items()}
    rows = table.select(**values, __time=comparable(table[time]), **key(table), **more)
    return rows.filter(*(known(rows[name]) for name in (*by, "__time")))


def known(value: ibis.Value) -> ibis.Value:
    """Whether it is a value: neither null nor NaN."""
    return value.notnull() & ~value.isnan() if value.type().is_floating() else value.notnull()
