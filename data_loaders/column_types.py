"""Which Arrow types a feature can use: checked on the schemas of all files, before any row is read."""

from collections.abc import Callable, Mapping

import pyarrow as pa

from data_loaders.arrow import is_integer, is_list, is_text, value_type
from data_loaders.errors import UserError
from data_loaders.schema import Layout, Schema


def check_types(schema: Schema, layout: Layout, types: Mapping[str, pa.DataType], *, labeled: bool = True) -> None:
    """Raises ``UserError`` naming feature, column, the type found and those expected."""
    for name in schema.vectors:
        _check_vector_type(name, schema, types)
    for name in schema.numbers:
        where = f"dense feature '{name}'"
        _expect(where, schema.column(name), types, _is_number, "a number", "use 'kind: sparse' for ids")
    for key in dict.fromkeys((*layout.pooled, *layout.unpooled)):
        if key in schema.crosses:
            for feature in schema.crosses[key].columns:
                where, expected = f"feature '{feature}' of cross '{key}'", "single integers or strings"
                _expect(where, schema.column(feature), types, _is_hashable, expected, "cross other features")
        else:
            _check_id_type(key, schema, types)
    if labeled:
        _expect("the label", schema.label, types, _is_number, "a number, 0 or 1", "correct schema.label")
        if schema.weight:
            _expect("the weight", schema.weight, types, _is_number, "a number", "correct schema.weight")


def _check_vector_type(name: str, schema: Schema, types: Mapping[str, pa.DataType]) -> None:
    where, column, dim = f"vector feature '{name}'", schema.column(name), schema.features[name].dim
    _expect(where, column, types, is_list, f"a list of {dim} numbers", "use 'kind: dense' for single ones")
    found = types[column]
    if is_list(found):
        remedy = "mend the data"
        _expect(where, column, {column: found.value_type}, _is_entry, "a list of numbers", remedy)
        if pa.types.is_fixed_size_list(found) and found.list_size != dim:
            raise UserError(
                f"{where}: column '{column}' has type {found}, but schema.features.{name}.dim is {dim}: set it to "
                f"{found.list_size}, or mend the data"
            )


def _is_entry(kind: pa.DataType) -> bool:
    return is_integer(kind) or pa.types.is_floating(kind)


def _check_id_type(name: str, schema: Schema, types: Mapping[str, pa.DataType]) -> None:
    feature, column = schema.features[name], schema.column(name)
    found = types[column]
    where = f"{feature.kind} feature '{name}'"
    if feature.kind == "sequence" and not is_list(found):
        _expect(where, column, types, is_list, "a list", "use 'kind: sparse' for single ids")
    if feature.max_length is not None and is_text(value_type(found)):
        remedy = (
            f"split the text where the data are made, as clicktrainer prepare does with {{select: {{{column}: "
            f"\"string_split({column}, ',')\"}}}}; where each text is one id, leave out schema.features.{name}.max_length"
        )
        _expect(f"{where} is a bag (max_length)", column, types, is_list, "a list", remedy)
    if feature.weights is not None:
        of = f"the weights of {where}"
        _expect(of, feature.weights, types, is_list, "a list of numbers", "write one for each id")
        if is_list(kind := types[feature.weights]):
            _expect(
                of, feature.weights, {feature.weights: kind.value_type}, _is_entry, "a list of numbers", "mend the data"
            )
        if not (is_list(found) or pa.types.is_null(found)):
            raise UserError(f"{where} has weights, but column '{column}' is {found}: weights are for lists of ids")
    element = {column: found.value_type if is_list(found) else found}
    if feature.ids == "hash":
        expected = "integers or strings (ids: hash)"
        _expect(where, column, element, _is_hashable, expected, "write ids as integers or strings")
    else:
        text = is_text(value_type(element[column]))
        remedy = f"set schema.features.{name}.ids to 'hash'" if text else "write ids as integers"
        _expect(where, column, element, is_integer, "integers (ids: identity)", remedy)


def _expect(
    where: str,
    column: str,
    types: Mapping[str, pa.DataType],
    test: Callable[[pa.DataType], bool],
    expected: str,
    remedy: str,
) -> None:
    found = types[column]
    if not (pa.types.is_null(found) or test(value_type(found))):
        raise UserError(f"{where}: column '{column}' has type {found}, expected {expected}; {remedy}")


def _is_hashable(kind: pa.DataType) -> bool:
    return is_integer(kind) or is_text(kind)


def _is_number(kind: pa.DataType) -> bool:
    times = (pa.types.is_timestamp, pa.types.is_date, pa.types.is_time, pa.types.is_duration)
    plain = is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return plain or any(check(kind) for check in times)
