"""Arrow types and arrays as this package sees them. Slices and chunks are honoured everywhere, nothing is converted on
a detour that loses precision (pandas, integers through floating point)."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass
class Lists:
    """A list column: row i has ``child[starts[i] : starts[i] + lengths[i]]``; ``nulls`` bool [R] or None."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    child: pa.Array
    nulls: NDArray[np.bool_] | None


# Types


def type_kind(kind: pa.DataType) -> str:
    """``number``, ``text``, ``time``, ``null``, ``list of …`` or the type itself: types of one kind may be mixed.

    Integers and floating point are one kind here (a writer may turn a nullable integer column into floating point);
    what a feature accepts is the decoder's matter.
    """
    if pa.types.is_dictionary(kind):
        return type_kind(kind.value_type)
    if is_list(kind):
        return f"list of {type_kind(kind.value_type)}"
    if pa.types.is_null(kind):
        return "null"
    if is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    if is_text(kind):
        return "text"
    if pa.types.is_temporal(kind):
        return "time"
    return str(kind)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_integer(kind: pa.DataType) -> bool:
    """Integers, and booleans as 0 and 1."""
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def is_text(kind: pa.DataType) -> bool:
    """Strings and binary of variable length."""
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(check(kind) for check in checks)


def value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


# Arrays


def flat(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, of a type that the functions here know: nulls only and booleans become integers, and a
    dictionary has no null among its values."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return plain(array)


def plain(array: pa.Array) -> pa.Array:
    kind = array.type
    if pa.types.is_null(kind):
        return array.cast(pa.int64())
    if pa.types.is_boolean(kind):
        return array.cast(pa.uint8())
    if pa.types.is_dictionary(kind) and (array.dictionary.null_count or not is_text(kind.value_type)):
        return plain(array.dictionary_decode())
    return array


def null_mask(array: pa.Array) -> NDArray[np.bool_] | None:
    """bool [len(array)], True where null; None where nothing is."""
    if array.null_count == 0:
        return None
    validity = array.buffers()[0]
    first = array.offset >> 3
    bits = np.frombuffer(validity, np.uint8, count=((array.offset + len(array) + 7) >> 3) - first, offset=first)
    begin = array.offset & 7
    return np.unpackbits(bits, bitorder="little")[begin : begin + len(array)] == 0


def numbers(array: pa.Array) -> NDArray[np.number]:
    """The values of a number column in its own type, integers without a copy and without a detour over floating point;
    arbitrary where null."""
    kind = array.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return values_view(array)
    if pa.types.is_decimal(kind):
        return values_view(array.cast(pa.float64()))
    if pa.types.is_temporal(kind):
        return values_view(array.view(pa.int64() if kind.bit_width == 64 else pa.int32()))
    raise AssertionError(f"check_types let {kind} pass")


def lists_of(array: pa.Array) -> Lists:
    """The rows of a list, large list or fixed-size list array; null lists have length 0, whatever lies under them."""
    nulls = null_mask(array)
    if not is_list(array.type):  # a column of nulls only
        none = np.zeros(len(array), np.int64)
        return Lists(none, none, array.slice(0, 0), nulls)
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        starts = (np.arange(len(array)) + array.offset) * size
        lengths = np.full(len(array), size)
    else:
        offsets = values_view(array.offsets).astype(np.int64) if len(array) else np.zeros(1, np.int64)
        starts, lengths = offsets[:-1], np.diff(offsets)
    if nulls is not None:
        lengths = np.where(nulls, 0, lengths)
    return Lists(starts, lengths, plain(array.values), nulls)


def values_view(array: pa.Array) -> NDArray[np.number]:
    """The values of an Arrow array of integers or floating point, without copy; arbitrary where null."""
    data = array.buffers()[1]
    dtype = array.type.to_pandas_dtype()
    if data is None:  # an array without elements may have no buffer
        return np.empty(0, dtype)
    return np.frombuffer(data, dtype, count=len(array), offset=array.offset * np.dtype(dtype).itemsize)
