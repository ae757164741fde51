"""Which columns a declaration reads."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ibis

from data_loaders.prepare import columns, sql
from data_loaders.prepare.declaration import Declaration


def raw_columns(declaration: Declaration, present: Sequence[str]) -> list[str]:
    """The columns of the examples that features, label, weight, histories, order and ``keep`` need, of those ``present``
    (whoever uses a missing one says so), in the examples' order."""
    schema = declaration.schema
    needed = {schema.label, schema.weight, *declaration.keep, *declaration.order.by, *_feature_columns(declaration)}
    return [column for column in present if column in needed]


def check_columns(declaration: Declaration, table: ibis.Table) -> None:
    """Raises ``UserError`` for a column that is needed and not there, with the nearest names of all that are."""
    for name, feature in declaration.schema.features.items():
        make, where = feature.make, f"schema.features.{name}.make"
        if make.cross:
            columns.check(
                table, [part for part in make.cross if part not in declaration.schema.features], f"{where}.cross"
            )
        elif not make.history:
            columns.check(table, [make.column or name], f"{where}.column")
    columns.check(table, [name for name in declaration.keep if name not in declaration.schema.features], "keep")
    columns.check(table, declaration.order.by, "order.by")
    if declaration.schema.weight:
        columns.check(table, [declaration.schema.weight], "schema.weight")


def mentioned(declaration: Declaration) -> frozenset[str]:
    """Every name of a recipe that may be one of a source's columns: too many rather than too few."""
    schema, split = declaration.schema, declaration.split
    names = {schema.label, schema.weight or "", *declaration.keep, *declaration.order.by, split.column or ""}
    names |= {*schema.features, *_feature_columns(declaration), *_history_columns(declaration)}
    for part in (split.time, split.hash, split.last):
        names |= _mentioned(part) if part else set()
    for view in (*declaration.views.values(), declaration.examples):
        for step in view.parsed("steps"):
            names.update(*(expression.columns for _, expression in sql.of_step(step)))
            names |= _mentioned(step.argument) if dataclasses.is_dataclass(step.argument) else set()
            names |= set(step.argument) if isinstance(step.argument, list) else set()
    return frozenset(names)


def label_columns(declaration: Declaration) -> frozenset[str]:
    """The raw columns that only the label is made of: rows to score need not have them. SQL ignores the case of
    names, so a column that anything else names in another case is none of them."""
    label = declaration.schema.label
    found = {label}
    others = _feature_columns(declaration) | _history_columns(declaration)
    for view in (*declaration.views.values(), declaration.examples):
        for step in view.parsed("steps"):
            for name, expression in sql.of_step(step):
                (found if name == label else others).update(expression.columns)
            if dataclasses.is_dataclass(step.argument):
                others |= _mentioned(step.argument)
            if step.name == "distinct":
                others.update(step.argument)
    only = _lower(found) - _lower(others) - {""}
    declared = {column for source in declaration.sources.values() for column in source.columns}
    return frozenset(column for column in declared | found if column.lower() in only)


def _lower(names: set[str]) -> set[str]:
    return {name.lower() for name in names}


def _history_columns(declaration: Declaration) -> set[str]:
    """What histories take from their events: the values, and what chooses them."""
    found: set[str] = set()
    for name, feature in declaration.schema.features.items():
        history = feature.make.history
        if history:
            found.add(history.value)
        if history and history.where:
            found |= sql.parse(history.where, f"schema.features.{name}.make.history.where").columns
    return found


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


def _mentioned(argument: Any) -> set[str]:
    """Every word of a step's options: too many rather than too few."""
    words: set[str] = set()
    for field in dataclasses.fields(argument):
        value = getattr(argument, field.name)
        if field.name == "label":
            continue
        words |= {value} if isinstance(value, str) else set(value) if isinstance(value, (list, dict)) else set()
    return words
