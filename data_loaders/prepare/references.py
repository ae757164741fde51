"""Which columns a declaration reads."""

import dataclasses
from collections.abc import Sequence

import sqlglot
from sqlglot import expressions

from data_loaders.prepare.declaration import Declaration


def raw_columns(declaration: Declaration, present: Sequence[str]) -> list[str]:
    """The columns of the examples that features, label, weight, histories, order and ``keep`` need, of those ``present``
    (whoever uses a missing one says so), in the examples' order."""
    schema = declaration.schema
    needed = {schema.label, schema.weight, *declaration.keep, *declaration.order.by, *_feature_columns(declaration)}
    return [column for column in present if column in needed]


def label_columns(declaration: Declaration) -> frozenset[str]:
    """The raw columns that only the label is made of: rows to score need not have them."""
    label = declaration.schema.label
    found = {label}
    others: set[str] = set()
    views = (*declaration.views.values(), declaration.examples)
    for view in views:
        for step in view.parsed("steps"):
            if step.name == "where":
                others |= _columns_of(step.argument)
            if step.name == "select":
                for name, expression in step.argument.items():
                    (found if name == label else others).update(_columns_of(str(expression)))
            if dataclasses.is_dataclass(step.argument):
                others |= _mentioned(step.argument)
    return frozenset(found - others - _feature_columns(declaration) - {""})


def _feature_columns(declaration: Declaration) -> set[str]:
    needed: set[str] = set()
    for name, feature in declaration.schema.features.items():
        make = feature.make
        if make.history:
            needed |= {*make.history.by, make.history.time}
        elif make.cross:
            needed |= set(make.cross)
        else:
            needed.add(make.column or name)
    return needed


def _columns_of(sql: str) -> set[str]:
    return {column.name for column in sqlglot.parse_one(sql, dialect="duckdb").find_all(expressions.Column)}


def _mentioned(argument: object) -> set[str]:
    """Every word of a step's options: too many rather than too few."""
    words: set[str] = set()
    for field in dataclasses.fields(argument):
        value = getattr(argument, field.name)
        if field.name == "label":
            continue
        words |= {value} if isinstance(value, str) else set(value) if isinstance(value, (list, dict)) else set()
    return words
