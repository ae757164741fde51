"""The raw value of a feature, before ids: a column, a transformed number, or the combination of several.

Raw ids are of one of two families, ``int64`` and ``string``. All integers that fit are int64; booleans, dates, times and
what may exceed int64 are written out as strings, which both engines do alike. Floats are not: the engines print them
differently, and an id with a fraction is a mistake mostly.
"""

import ibis
import ibis.expr.datatypes as dt

from data_loaders.errors import UserError
from data_loaders.prepare import columns, numbers
from data_loaders.prepare.declaration import PreparedSchema

Learnt = dict[str, list[numbers.Fitted]]  # by feature, parallel to its steps
SEPARATOR = "\x1f"  # between the parts of a cross: ASCII's own, the unit separator


def column(examples: ibis.Table, schema: PreparedSchema, feature: str) -> ibis.Value:
    """The raw column. Raises ``UserError`` where the examples have none of the name, and where it is text but the feature a
    bag or a sequence: the whole text would be one id."""
    spec, where = schema.features[feature], f"schema.features.{feature}"
    name = spec.make.column or feature
    columns.check(examples, [name], f"{where}.make.column")
    if spec.table and spec.max_length is not None and examples[name].type().is_string():
        raise UserError(
            f"{where} is a {'sequence' if spec.kind == 'sequence' else 'bag'} (max_length), but column '{name}' is text: split "
            f"it with a step ({{select: {{{name}: \"string_split({name}, ',')\"}}}}); where each text is one id, leave out "
            f"{where}.max_length"
        )
    return examples[name]


def number(examples: ibis.Table, schema: PreparedSchema, feature: str) -> ibis.Value:
    """The raw column, for ``numbers.apply``. Raises ``UserError`` for one of another kind."""
    value = column(examples, schema, feature)
    kind = value.type()
    if kind.is_timestamp() or kind.is_date():
        # Whole seconds since 1970, as in training. Engines differ in what they make of the rest of a second.
        return value.cast("timestamp(6)").epoch_seconds().cast("float64").floor()
    if not (kind.is_numeric() or kind.is_boolean()):
        name = value.get_name()
        raise UserError(
            f"schema.features.{feature}: column '{name}' is {kind}, not a number: declare its type in the source "
            f"(columns: {{{name}: float64}}), or make a number of it with a step ({{select: {{{name}: 'CAST({name} AS "
            "DOUBLE)'}})"
        )
    return value


def identifier(examples: ibis.Table, schema: PreparedSchema, feature: str, learnt: Learnt) -> ibis.Value:
    """int64 or string, or an array of one of them: what the table's vocabulary counts and knows. ``learnt``: what the
    steps of number transforms learnt, by feature."""
    return _identifier(examples, schema, feature, learnt, ())


def as_identifier(value: ibis.Value, where: str) -> ibis.Value:
    """A raw column as int64 or string, element by element. Raises ``UserError`` for what is no id."""
    kind = value.type()
    if kind.is_array():
        family = _family(kind.value_type, value, where)
        value = value if kind.value_type == family else value.cast(dt.Array(family))
        # What splitting a text leaves where there was no id.
        return value.map(lambda element: element.nullif("")) if family.is_string() else value
    family = _family(kind, value, where)
    return value if kind == family else value.cast(family)


def _family(kind: dt.DataType, value: ibis.Value, where: str) -> dt.DataType:
    if kind.is_integer() and kind != dt.uint64:
        return dt.int64
    as_text = (
        kind.is_string()
        or kind.is_boolean()
        or kind.is_date()
        or (kind.is_timestamp() and kind.timezone is None)
        or kind == dt.uint64
        or (kind.is_decimal() and kind.scale == 0)
        or kind.is_null()
    )
    if as_text:
        return dt.string
    name = value.get_name()
    raise UserError(
        f"{where}: column '{name}' is {value.type()}, which cannot be an id: make an integer or a string of it with a "
        f"step ({{select: {{{name}: 'CAST({name} AS BIGINT)'}}}}), or buckets (make: {{numbers: [{{buckets: 100}}]}})"
    )


def _identifier(
    examples: ibis.Table, schema: PreparedSchema, feature: str, learnt: Learnt, inside: tuple[str, ...]
) -> ibis.Value:
    make, where = schema.features[feature].make, f"schema.features.{feature}"
    if feature in inside:
        raise UserError(f"{where}.make.cross: it contains itself ({' in '.join((feature, *reversed(inside)))})")
    if make.history:
        raise UserError(f"{where}: a history has no raw value in the examples")
    if make.cross:
        return _cross(examples, schema, feature, learnt, (*inside, feature))
    steps = schema.numbers(feature)
    if steps:
        fitted = learnt.get(feature, [None] * len(steps))
        return numbers.apply(number(examples, schema, feature), steps, fitted)
    return as_identifier(column(examples, schema, feature), where)


def _cross(
    examples: ibis.Table, schema: PreparedSchema, feature: str, learnt: Learnt, inside: tuple[str, ...]
) -> ibis.Value:
    whole = None
    for part in schema.features[feature].make.cross:
        where = f"schema.features.{feature}.make.cross"
        if part in schema.features and schema.features[part].kind != "dense":
            value = _identifier(examples, schema, part, learnt, inside)
        else:
            columns.check(examples, [part], where)
            value = as_identifier(examples[part], where)
        if value.type().is_array():
            raise UserError(f"{where}: '{part}' is a list; a cross combines single values")
        text = value.cast("string")
        whole = text if whole is None else whole + SEPARATOR + text
    return whole
