"""Group ids: 64-bit hashes of a column's raw values, for metrics by group, and back to values that people can read.

Equal values have equal ids, whatever the width of the column's type and however a file stores them: a whole number in
floating point is that integer, a time is a number of seconds, a boolean 0 or 1. Null is a value of its own, and so is
NaN. Different integers have different ids. Different values of other types have equal ids with a probability of 2^-64
a pair: for a million of them, 3e-8 that there is any such pair.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_loaders.arrow import flat, is_text, null_mask, numbers, type_kind
from data_loaders.column_decoders import Counters, SingleIds, Source
from data_loaders.errors import UserError
from data_loaders.hashing import hash_ids, mix
from data_loaders.manifest import Manifest
from data_loaders.reader import READ_ROWS, Handle, RowGroups
from data_loaders.schema import Schema

_NULL = mix(np.array([0x6E756C6C], np.uint64)).view(np.int64)[0]  # "null"
_NAN = np.float64("nan")
_INT64 = 2.0**63
_KINDS = ("number", "text", "time", "time of day", "duration", "null")


def check_group_types(columns: Iterable[str], types: Mapping[str, pa.DataType]) -> None:
    """Raises ``UserError`` for a column of lists or the like."""
    for column in columns:
        if type_kind(types[column]) not in _KINDS:
            raise UserError(
                f"evaluation.group_by, request, slices or qualities: rows cannot be grouped by column '{column}' of type "
                f"{types[column]}: choose one of single values (text, numbers, times)"
            )


def group_ids_of(array: pa.Array) -> NDArray[np.int64]:
    """int64 [len(array)] of an array as ``arrow.flat`` gives it, of a type that ``check_group_types`` lets pass."""
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    whole = pa.types.is_integer(kind) or is_text(kind)
    ids = (hash_ids(array) if whole else _hash_numbers(numbers(array))).view(np.int64)
    nulls = null_mask(array)
    return ids if nulls is None else np.where(nulls, _NULL, ids)


def _hash_numbers(values: NDArray[np.floating]) -> NDArray[np.uint64]:
    values = values.astype(np.float64)
    values[np.isnan(values)] = _NAN  # there are many bit patterns
    bits = values.view(np.int64).copy()
    with np.errstate(invalid="ignore"):
        whole = (np.floor(values) == values) & (values >= -_INT64) & (values < _INT64)
    bits[whole] = values[whole].astype(np.int64)
    return mix(bits.view(np.uint64))


def texts_of_group_ids(manifest: Manifest, column: str, wanted: Iterable[int]) -> dict[int, str | None]:
    """What the values with these ids look like; None for null. Reads the one column until all are found."""
    left, found = set(wanted), {}
    groups, handle = RowGroups(manifest, [column], {column}), Handle()
    for number in range(groups.count):
        for table in groups.read(number, READ_ROWS, handle):
            if not left:
                return found
            ids, first = np.unique(group_ids_of(flat(table.column(0))), return_index=True)
            for group_id, row in zip(ids.tolist(), first.tolist()):
                if group_id in left:
                    left.remove(group_id)
                    found[group_id] = _text(table.column(0)[row].as_py())
    assert not left, "the data have changed while they were read"
    return found


def rows_by_group_id(
    manifest: Manifest, column: str, rank: int = 0, world_size: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The column's distinct group ids [U], ascending, and how many rows have them, in every ``world_size``-th row group."""
    groups, handle = RowGroups(manifest, [column], {column}), Handle()
    ids, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for number in range(rank, groups.count, world_size):
        tables = list(groups.read(number, READ_ROWS, handle))
        found = [np.unique(group_ids_of(flat(table.column(0))), return_counts=True) for table in tables]
        parts = [(ids, counts), *found]
        ids, inverse = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
        counts = np.bincount(inverse, np.concatenate([part[1] for part in parts]), len(ids)).astype(np.int64)
    return ids, counts


def table_rows_by_group_id(
    manifest: Manifest, schema: Schema, feature: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct group ids [U], ascending, of the column that ``feature`` reads, and their rows in the feature's table (-1:
    none)."""
    column = schema.column(feature)
    groups, handle, single = RowGroups(manifest, [column], {column}), Handle(), SingleIds(feature, schema, Counters())
    ids, rows = np.empty(0, np.int64), np.empty(0, np.int64)
    for number in range(groups.count):
        for table in groups.read(number, READ_ROWS, handle):
            source, line = Source(table, 0), np.empty(table.num_rows, np.int64)
            single.decode(source, line)
            ids = np.concatenate([ids, group_ids_of(source.array(column))])
            rows = np.concatenate([rows, line])
        ids, first = np.unique(ids, return_index=True)
        rows = rows[first]
    return ids, rows


def _text(value: object) -> str | None:
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return None if value is None else str(value)
