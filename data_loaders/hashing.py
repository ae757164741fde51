"""Raw ids to 64-bit hashes to table rows: vectorised, and the same in every process, version and integer type.

An integer's hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, constants by Stafford) of its 64 bits. A
string's hash treats its bytes as little-endian 64-bit words w_0 … w_m, the last padded with zeros: the finaliser of
sum_k w_k · P^k + Q · length mod 2^64, with P and Q odd. Strings and binary of the same bytes have the same hash, whatever
their layout. Both are part of the meaning of a checkpoint (a hash is a table row) and must never change.
"""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_loaders.arrow import is_text, values_view, with_offsets
from data_loaders.errors import UserError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_WORD_POWER = 0xD6E8FEB86659FD93  # P
_LENGTH_FACTOR = np.uint64(0xA0761D6478BD642F)  # Q


def hash_ids(array: pa.Array) -> NDArray[np.uint64]:
    """uint64 [len(array)]: hashes of integers, strings or binary of any layout, or a dictionary of one of them.

    Slices are honoured. A null gets an arbitrary hash: the caller masks it. Raises ``UserError`` for other types.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        distinct = hash_ids(array.dictionary)
        if not len(distinct):
            return np.zeros(len(array), np.uint64)
        # A null's index is arbitrary memory, so it is clipped into range.
        return distinct.take(values_view(array.indices), mode="clip")
    if pa.types.is_integer(kind):
        return mix(_as_uint64(values_view(array)))
    if is_text(kind):
        array = with_offsets(array)
        return _hash_bytes(array, np.int32 if _is_small(array.type) else np.int64)
    raise UserError(f"ids of type {kind} cannot be hashed: integers, strings and binary can")


def rows_from_hashes(hashes: NDArray[np.uint64], num_rows: int) -> NDArray[np.int64]:
    """int64 in [1, num_rows): row 0 is left to missing ids."""
    buckets = np.uint64(num_rows - 1)
    # NumPy divides by a scalar in SIMD, but takes remainders one by one.
    rows = hashes // buckets
    rows *= buckets
    np.subtract(hashes, rows, out=rows)
    rows += np.uint64(1)
    return rows.view(np.int64)


def combine(parts: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """The hash of a tuple of hashed values, element by element; it depends on their order."""
    total = mix(parts[0])
    for part in parts[1:]:
        total *= np.uint64(_WORD_POWER)
        total += part
        total = mix(total)
    return total


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's next value after state ``values``: a bijection of 64-bit integers."""
    return finalised(values + _GOLDEN)


def finalised(mixed: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, in place."""
    shifted = mixed >> np.uint64(30)
    mixed ^= shifted
    mixed *= _MIX_1
    np.right_shift(mixed, np.uint64(27), out=shifted)
    mixed ^= shifted
    mixed *= _MIX_2
    np.right_shift(mixed, np.uint64(31), out=shifted)
    mixed ^= shifted
    return mixed


def _is_small(kind: pa.DataType) -> bool:
    """Whether offsets have 32 bits."""
    return pa.types.is_string(kind) or pa.types.is_binary(kind)


def _as_uint64(values: NDArray[np.integer]) -> NDArray[np.uint64]:
    # Through int64, so that -1 is the same id in every signed type.
    return values.astype(np.uint64) if values.dtype.kind == "u" else values.astype(np.int64, copy=False).view(np.uint64)


def _hash_bytes(array: pa.Array, offset_dtype: type) -> NDArray[np.uint64]:
    if not len(array):
        return np.zeros(0, np.uint64)
    _, offsets_buffer, data = array.buffers()
    item = np.dtype(offset_dtype).itemsize
    offsets = np.frombuffer(offsets_buffer, offset_dtype, count=len(array) + 1, offset=array.offset * item)
    starts = offsets[:-1].astype(np.int64)
    lengths = offsets[1:] - starts
    first, last = int(offsets[0]), int(offsets[-1])
    # Words are loaded at any byte, so the bytes need 7 more behind them.
    padded = np.zeros(last - first + 8, np.uint8)
    if last > first:
        padded[:-8] = np.frombuffer(data, np.uint8, count=last - first, offset=first)
    words = np.ndarray((len(padded) - 7,), "<u8", padded, strides=(1,))
    sums = _word_sums(words, starts - first, lengths)
    sums += lengths.view(np.uint64) * _LENGTH_FACTOR
    return mix(sums)


def _word_sums(words: NDArray[np.uint64], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """sum_k w_k · P^k of each string; ``words[i]`` is the eight bytes from byte i."""
    longest = int(lengths.max())
    if longest <= 8:
        return words[starts] & _tail_mask(lengths)
    counts = (lengths + 7) >> 3
    ends = np.cumsum(counts)
    owner = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(int(ends[-1])) - (ends - counts)[owner]  # k of each word
    loaded = words[starts[owner] + (index << 3)] & _tail_mask(lengths[owner] - (index << 3))
    loaded *= _powers((longest + 7) >> 3)[index]
    # Differences of the running sum: unlike add.reduceat, right for strings without a word.
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(loaded)])
    return running[ends] - running[ends - counts]


def _tail_mask(remaining: NDArray[np.int64]) -> NDArray[np.uint64]:
    """All ones in the first ``remaining`` bytes of a word, for any ``remaining`` ≥ 0."""
    return _TAIL_MASKS[np.minimum(remaining, 8)]


def _powers(count: int) -> NDArray[np.uint64]:
    powers = np.full(count, _WORD_POWER, np.uint64)
    powers[0] = 1
    return np.cumprod(powers)


_TAIL_MASKS = np.array([(1 << (8 * count)) - 1 for count in range(9)], np.uint64)
