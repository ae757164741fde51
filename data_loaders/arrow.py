"""Arrow types and arrays as this package sees them. Slices and chunks are honoured everywhere, nothing is converted on
a detour that loses precision (pandas, integers through floating point).

Times are numbers in **seconds**, whatever the unit of the column, so that files of one data set may differ in it:
timestamps since 1970-01-01 UTC (one without a zone is taken as UTC), dates likewise at midnight, times of day since
midnight, durations as they are. They are float64 here, right to 0.5 µs until the year 2100. What a dense feature keeps
of them is a float32, 24 bits: a timestamp from 2004 to 2038 to 64 s, a time of day to 4 ms.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_TICKS_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}


@dataclass
class Lists:
    """A list column: row i has ``child[starts[i] : starts[i] + lengths[i]]``; ``nulls`` bool [R] or None."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    child: pa.Array
    nulls: NDArray[np.bool_] | None


# Types


def type_kind(kind: pa.DataType) -> str:
    """``number``, ``text``, ``time`` (timestamps and dates), ``time of day``, ``duration``, ``null``, ``list of …`` or
    the type itself: types of one kind may be mixed.

    Integers and floating point are one kind here (a writer may turn a nullable integer column into floating point);
    what a feature accepts is the decoder's matter.
    """
    kind = _storage(kind)
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
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "time"
    if pa.types.is_time(kind):
        return "time of day"
    if pa.types.is_duration(kind):
        return "duration"
    return str(kind)


def is_list(kind: pa.DataType) -> bool:
    """Lists of every layout: 32- and 64-bit offsets, a fixed size, views."""
    return pa.types.is_fixed_size_list(kind) or _is_list_view(kind) or _is_plain_list(kind)


def is_integer(kind: pa.DataType) -> bool:
    """Integers, and booleans as 0 and 1."""
    kind = _storage(kind)
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def is_text(kind: pa.DataType) -> bool:
    """Strings and binary of every layout: 32- and 64-bit offsets, a fixed size (UUIDs too), views."""
    kind = _storage(kind)
    return pa.types.is_fixed_size_binary(kind) or _is_text_view(kind) or _has_offsets(kind)


def value_type(kind: pa.DataType) -> pa.DataType:
    """What is inside a dictionary."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _storage(kind: pa.DataType) -> pa.DataType:
    """An extension type, such as a UUID, is what it is stored as."""
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_plain_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_list_view(kind: pa.DataType) -> bool:
    return pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)


def _is_text_view(kind: pa.DataType) -> bool:
    return pa.types.is_string_view(kind) or pa.types.is_binary_view(kind)


def _has_offsets(kind: pa.DataType) -> bool:
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(check(kind) for check in checks)


# Arrays


def flat(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, of a type that the functions here know: nulls only and booleans become integers, text has
    offsets, and a dictionary holds text without a null among its values."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return plain(array)


def plain(array: pa.Array) -> pa.Array:
    """An array of such a type with the same values."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return plain(array.storage)
    if pa.types.is_null(kind):
        return array.cast(pa.int64())
    if pa.types.is_boolean(kind):
        return array.cast(pa.uint8())
    if pa.types.is_dictionary(kind):
        return _plain_dictionary(array)
    return with_offsets(array) if is_text(kind) else array


def _plain_dictionary(array: pa.DictionaryArray) -> pa.Array:
    values = plain(array.dictionary)
    if values.type != array.type.value_type:  # first, since Arrow cannot decode a dictionary of views
        array = pa.DictionaryArray.from_arrays(array.indices, values)
    return plain(array.dictionary_decode()) if values.null_count or not is_text(values.type) else array


def with_offsets(text: pa.Array) -> pa.Array:
    """Strings or binary with offsets into one buffer, which is how they are hashed."""
    if _has_offsets(text.type):
        return text
    # Strings as binary: Arrow would check again that they are UTF-8.
    return text.cast(pa.large_binary())


def null_mask(array: pa.Array) -> NDArray[np.bool_] | None:
    """bool [len(array)], True where null; None where nothing is."""
    if array.null_count == 0:
        return None
    validity = array.buffers()[0]
    first = array.offset >> 3
    bits = np.frombuffer(validity, np.uint8, count=((array.offset + len(array) + 7) >> 3) - first, offset=first)
    begin = array.offset & 7
    return np.unpackbits(bits, bitorder="little")[begin : begin + len(array)] == 0


def empty_mask(text: pa.Array) -> NDArray[np.bool_] | None:
    """bool [len(text)], True where a string is empty; None where none is. Of arrays as ``plain`` makes them."""
    if pa.types.is_dictionary(text.type):
        empty = empty_mask(text.dictionary)
        return None if empty is None else _filled(pc.take(pa.array(empty), text.indices))
    lengths = pc.binary_length(text)
    return _filled(pc.equal(lengths, 0)) if pc.min(lengths).as_py() == 0 else None


def _filled(mask: pa.BooleanArray) -> NDArray[np.bool_]:
    return mask.fill_null(False).to_numpy(zero_copy_only=False)


def numbers(array: pa.Array) -> NDArray[Any]:
    """The values of a number column in its own type, integers without a copy and without a detour over floating point;
    decimals in float64, times as seconds in float64; arbitrary where null."""
    kind = array.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return values_view(array)
    if pa.types.is_decimal(kind):
        return values_view(array.cast(pa.float64()))
    if pa.types.is_temporal(kind):
        return _seconds(array)
    raise AssertionError(f"check_types let {kind} pass")


def _seconds(array: pa.Array) -> NDArray[np.float64]:
    kind = array.type
    ticks = values_view(array.view(pa.int64() if kind.bit_width == 64 else pa.int32()))
    if pa.types.is_date32(kind):
        return ticks * 86400.0
    return ticks / _TICKS_PER_SECOND["ms" if pa.types.is_date64(kind) else kind.unit]


def lists_of(array: pa.Array) -> Lists:
    """The rows of a list array of any layout; null lists have length 0, whatever lies under them."""
    nulls = null_mask(array)
    if not is_list(array.type):  # a column of nulls only
        none = np.zeros(len(array), np.int64)
        return Lists(none, none, array.slice(0, 0), nulls)
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        starts = (np.arange(len(array)) + array.offset) * size
        lengths = np.full(len(array), size)
    elif _is_list_view(array.type):  # in any order, with gaps and overlaps
        starts, lengths = (values_view(part).astype(np.int64) for part in (array.offsets, array.sizes))
    else:
        offsets = values_view(array.offsets).astype(np.int64) if len(array) else np.zeros(1, np.int64)
        starts, lengths = offsets[:-1], np.diff(offsets)
    if nulls is not None:
        lengths = np.where(nulls, 0, lengths)
    return Lists(starts, lengths, plain(array.values), nulls)


def values_view(array: pa.Array) -> NDArray[Any]:
    """The values of an Arrow array of integers or floating point, without copy; arbitrary where null."""
    data = array.buffers()[1]
    dtype = array.type.to_pandas_dtype()
    if data is None:  # an array without elements may have no buffer
        return np.empty(0, dtype)
    return np.frombuffer(data, dtype, count=len(array), offset=array.offset * np.dtype(dtype).itemsize)
