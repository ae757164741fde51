"""The steps that views and examples are made by, in order.

Each takes a table and gives a table, lazily; ``__row`` and ``__part`` go along, and stay unique together. A row's children
(of an explode, of negatives) have the parent's ``__row`` and ``__part`` · 65536 + their number, so they follow each other
where the parent was.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import ibis

from data_loaders.errors import UserError
from data_loaders.prepare import clicks, columns, engine_errors, negatives, sql
from data_loaders.prepare.declaration import TEMPORARY, Explode, Join, Lookup, NGrams, Overlap, Step
from data_loaders.prepare.engine import KEY, PART, Engine


def apply_steps(
    engine: Engine, table: ibis.Table, steps: tuple[Step, ...], tables: dict[str, ibis.Table], *, scoring: bool = False
) -> ibis.Table:
    """``tables``: sources and views by name, which steps may refer to. ``scoring``: leaves out the steps that make labels
    (clicks, negatives). Raises ``UserError`` with the step's place for what does not fit the columns."""
    for step in steps:
        if scoring and step.name in ("clicks", "negatives"):
            continue
        table = _apply(engine, table, step, tables)
    return table


def _apply(engine: Engine, table: ibis.Table, step: Step, tables: dict[str, ibis.Table]) -> ibis.Table:
    where = f"{step.where}.{step.name}"
    if step.name == "where":
        return filter_rows(engine, table, step.argument, where)
    if step.name == "select":
        return _select(engine, table, step.argument, where)
    if step.name == "drop":
        columns.check(table, step.argument, where)
        return table.drop(*step.argument)
    if step.name == "distinct":
        return _distinct(table, step.argument, where)
    if step.name == "explode":
        return _explode(engine, table, step.argument, where)
    if step.name == "join":
        return _join(engine, table, tables[step.argument.table], step.argument, where)
    if step.name in MADE_OF_ONE_ROW:
        return MADE_OF_ONE_ROW[step.name](table, step.argument, where)
    if step.name == "clicks":
        return clicks.label(table, tables[step.argument.table], step.argument, where)
    touched = tables[step.argument.touched] if step.argument.touched else table
    return negatives.add(engine, table, touched, step.argument, where)


def filter_rows(engine: Engine, table: ibis.Table, condition: str, where: str) -> ibis.Table:
    """The rows for which an SQL condition is true."""
    parsed = sql.parse(condition, where)
    return _run(
        engine,
        table,
        f"SELECT * FROM rows WHERE {parsed.spelled(engine.name, table.columns)}",
        [parsed],
        condition,
        where,
    )


def _select(engine: Engine, table: ibis.Table, selected: dict[str, Any], where: str) -> ibis.Table:
    """The expressions see the columns as they were before the step."""
    for name in selected:
        if TEMPORARY.match(name):
            raise UserError(f"{where}: '{name}' begins with '__'; such names are the program's own: take another")
        other = next((column for column in table.columns if column.lower() == name.lower()), name)
        if other != name:
            raise UserError(f"{where}: '{name}' and the column '{other}' differ by case alone: take another name")
    made = {name: sql.parse(str(text), f"{where}.{name}") for name, text in selected.items()}
    kept = {name: sql.identifier(name) for name in table.columns if name not in made}
    order = dict.fromkeys((*table.columns, *made))
    chosen = ", ".join(
        kept.get(name) or f"{made[name].spelled(engine.name, table.columns)} AS {sql.identifier(name)}"
        for name in order
    )
    shown = str({name: expression.text for name, expression in made.items()})
    return _run(engine, table, f"SELECT {chosen} FROM rows", list(made.values()), shown, where)


def _run(
    engine: Engine, table: ibis.Table, query: str, parsed: list[sql.Expression], shown: str, where: str
) -> ibis.Table:
    """Runs a query over ``rows``. An engine's complaint becomes a ``UserError``."""
    for expression in parsed:
        expression.check_columns(table.columns)
    try:
        return engine.sql(table, query)
    except Exception as error:
        known = (
            engine_errors.explanation(error) or f"cannot be computed from these columns ({engine.store_error(error)})"
        )
        raise UserError(f"{where}: {shown}: {known}") from error


def _distinct(table: ibis.Table, names: list[str], where: str) -> ibis.Table:
    columns.check(table, names, where)
    first = ibis.row_number().over(group_by=names, order_by=list(KEY))
    numbered = table.mutate(__first=first)
    return numbered.filter(numbered["__first"] == 0).drop("__first")


def _explode(engine: Engine, table: ibis.Table, spec: Explode, where: str) -> ibis.Table:
    """The lists give way to their elements; other columns are repeated."""
    if not spec.columns:
        raise UserError(f"{where}.columns is empty: name the list columns and what their elements are to be called")
    columns.check(table, list(spec.columns), f"{where}.columns")
    others = [name for name in table.columns if name not in spec.columns]
    _check_names(others, [*spec.columns.values(), *([spec.position] if spec.position else [])], where)
    for name in spec.columns:
        if not table[name].type().is_array():
            raise UserError(f"{where}.columns: '{name}' is {table[name].type()}, not a list")
    _check_lengths(engine, table, list(spec.columns), where)
    lists = {f"__list_{number}": table[name] for number, name in enumerate(spec.columns)}
    first, *rest = lists.values()
    zipped = first.zip(*rest) if rest else first
    rows = table.select(*others, __zipped=zipped).unnest("__zipped", offset="__place", keep_empty=False)
    made = dict(zip(spec.columns.values(), _elements(rows["__zipped"], len(lists))))
    if spec.position:
        made[spec.position] = rows["__place"].cast("int64")
    made[PART] = rows[PART] * columns.MAX_CHILDREN + rows["__place"].cast("int64")
    return rows.mutate(**made).drop("__zipped", "__place")


def _elements(zipped: ibis.Value, count: int) -> list[ibis.Value]:
    return [zipped[f"f{number + 1}"] for number in range(count)] if count > 1 else [zipped]


def _check_names(present: list[str], made: list[str], where: str) -> None:
    for name in made:
        if TEMPORARY.match(name) or name in present or made.count(name) > 1:
            raise UserError(f"{where}: '{name}' is taken: give the new column another name, or drop the old one before")


def _check_lengths(engine: Engine, table: ibis.Table, lists: list[str], where: str) -> None:
    lengths = [table[name].length().fill_null(0) for name in lists]
    unequal = functools.reduce(operator.or_, (length != lengths[0] for length in lengths))
    counts = table.aggregate(rows=unequal.sum(), longest=lengths[0].max())
    found = engine.fetch(counts).to_pylist()[0]
    if found["rows"]:
        raise UserError(
            f"{where}: in {found['rows']:,} row(s) the lists {', '.join(lists)} have unequal lengths: leave such rows out "
            "with a where step, or explode fewer columns"
        )
    if (found["longest"] or 0) > columns.MAX_CHILDREN:
        raise UserError(
            f"{where}: a list has {found['longest']:,} elements; more than {columns.MAX_CHILDREN:,} are not possible"
        )


def _lookup(table: ibis.Table, spec: Lookup, where: str) -> ibis.Table:
    columns.check(table, [spec.map, spec.key], where)
    _check_names(list(table.columns), [spec.into], f"{where}.into")
    maps, key = table[spec.map], table[spec.key]
    if not maps.type().is_map():
        raise UserError(f"{where}.map: '{spec.map}' is {maps.type()}, not a map")
    if maps.type().key_type.copy(nullable=True) != key.type().copy(nullable=True):
        raise UserError(f"{where}.key: '{spec.key}' is {key.type()}, the keys of '{spec.map}' {maps.type().key_type}")
    return table.mutate(**{spec.into: maps.get(key)})


def _overlap(table: ibis.Table, spec: Overlap, where: str) -> ibis.Table:
    if len(spec.lists) != 2:
        raise UserError(f"{where}.lists names {len(spec.lists)} column(s): give two")
    columns.check(table, spec.lists, f"{where}.lists")
    _check_names(list(table.columns), [spec.into], f"{where}.into")
    left, right = (table[name] for name in spec.lists)
    if not (left.type().is_array() and left.type().copy(nullable=True) == right.type().copy(nullable=True)):
        raise UserError(
            f"{where}.lists: '{spec.lists[0]}' is {left.type()}, '{spec.lists[1]}' {right.type()}: give two lists of one type"
        )
    present = [values.filter(lambda value: value.notnull()) for values in (left, right)]
    common = present[0].unique().intersect(present[1].unique()).length()
    return table.mutate(**{spec.into: common.fill_null(0).cast("int64")})


def _ngrams(table: ibis.Table, spec: NGrams, where: str) -> ibis.Table:
    columns.check(table, [spec.text], f"{where}.text")
    _check_names(list(table.columns), [spec.into], f"{where}.into")
    if not table[spec.text].type().is_string():
        raise UserError(f"{where}.text: '{spec.text}' is {table[spec.text].type()}, not a text")
    if spec.longest < 1:
        raise UserError(f"{where}.longest is {spec.longest}: give the number of words of the longest run, at least 1")
    text = table[spec.text].fill_null("").lower()
    words = text.re_split(NO_WORD).filter(lambda word: word != "")
    runs = [words]
    for length in range(2, spec.longest + 1):
        shifted = [words[start : words.length() - length + 1 + start] for start in range(length)]
        runs.append(shifted[0].zip(*shifted[1:]).map(functools.partial(_joined, length=length)))
    grams = functools.reduce(lambda left, right: left.concat(right), runs)
    return table.mutate(**{spec.into: grams})


def _joined(words: ibis.Value, length: int) -> ibis.Value:
    return functools.reduce(
        lambda left, right: left + " " + right, (words[f"f{place}"] for place in range(1, length + 1))
    )


NO_WORD = r"[^\p{L}\p{N}]+"
MADE_OF_ONE_ROW: dict[str, Callable[[ibis.Table, Any, str], ibis.Table]] = {
    "lookup": _lookup,
    "overlap": _overlap,
    "ngrams": _ngrams,
}


def _join(engine: Engine, table: ibis.Table, other: ibis.Table, spec: Join, where: str) -> ibis.Table:
    columns.check(table, spec.on, f"{where}.on")
    columns.check(other, spec.on, f"{where}.on, table '{spec.table}'")
    columns.check(other, spec.columns, f"{where}.columns, table '{spec.table}'")
    added = spec.columns or [name for name in columns.visible(other) if name not in spec.on]
    columns.check_same_types(table, other, {name: name for name in spec.on}, spec.table, where)
    _check_names(list(table.columns), added, f"{where}.columns")
    _check_unique(engine, other, spec, where)
    keys = {f"__on_{number}": name for number, name in enumerate(spec.on)}
    right = other.select(*added, **{key: other[name] for key, name in keys.items()})
    joined = table.left_join(right, [table[name] == right[key] for key, name in keys.items()])
    return joined.select(*table.columns, *added)


def _check_unique(engine: Engine, other: ibis.Table, spec: Join, where: str) -> None:
    counts = other.group_by(spec.on).aggregate(__count=other.count())
    found = [counts[name].notnull() for name in spec.on]
    twice = counts.filter(counts["__count"] > 1, *found).order_by(spec.on).limit(1)
    for row in engine.fetch(twice).to_pylist():
        key = ", ".join(f"{name}={row[name]!r}" for name in spec.on)
        raise UserError(
            f"{where}: '{spec.table}' has {row['__count']:,} rows with {key}: keys must be unique; add a view with the step "
            f"{{distinct: [{', '.join(spec.on)}]}}"
        )
