"""Hashes are table rows of saved checkpoints: frozen values, equal over types, slices and encodings."""

import numpy as np
import pyarrow as pa
import pytest

from data_loaders.hashing import combine, hash_ids, mix, rows_from_hashes
from tests.helpers.hash_reference import MASK, reference_bytes, reference_mix

STRINGS = ["", "a", "a\0", "\0", "abcdefgh", "abcdefghi", "05db9164", "ünïcödé €", "x" * 100, "x" * 101]


def test_integers_hash_alike_in_every_type():
    values = [0, 1, 2, 127]
    expected = [reference_mix(v) for v in values]
    for dtype in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
        assert hash_ids(pa.array(values, dtype)).tolist() == expected
    for dtype in ("int8", "int64"):
        assert hash_ids(pa.array([-1], dtype)).tolist() == [reference_mix(MASK)]
    assert hash_ids(pa.array([2**63 + 5], "uint64")).tolist() == [reference_mix(2**63 + 5)]


def test_strings_follow_the_formula_in_every_type():
    expected = [reference_bytes(s.encode()) for s in STRINGS]
    text, data = (pa.string(), pa.large_string(), pa.string_view()), (pa.binary(), pa.large_binary(), pa.binary_view())
    for dtype in (*text, *data):
        values = STRINGS if "string" in str(dtype) else [s.encode() for s in STRINGS]
        assert hash_ids(pa.array(values, dtype)).tolist() == expected
    assert hash_ids(pa.array(STRINGS).dictionary_encode()).tolist() == expected
    assert hash_ids(pa.array(["", ""])).tolist() == [reference_bytes(b"")] * 2
    fixed = [b"a\0c", b"\0\0\0", b"xyz"]
    assert hash_ids(pa.array(fixed, pa.binary(3))).tolist() == [reference_bytes(b) for b in fixed]


def test_frozen_values():
    assert hash_ids(pa.array([0, 1, -1, 123456789])).tolist() == [
        16294208416658607535,
        10451216379200822465,
        16490336266968443936,
        2466975172287755897,
    ]
    assert hash_ids(pa.array(["", "05db9164", "a longer identifier"])).tolist() == [
        16294208416658607535,
        1536827405744828495,
        10329264168711648643,
    ]
    assert rows_from_hashes(hash_ids(pa.array(["05db9164", "68fd1e64"])), 1000).tolist() == [840, 272]
    assert combine([hash_ids(pa.array([1])), hash_ids(pa.array(["x"]))]).tolist() == [14834979201397673317]


@pytest.mark.parametrize("seed", range(5))
def test_slices_nulls_and_dictionaries_equal_their_copies(seed):
    rng = np.random.default_rng(seed)
    strings = ["é" * int(rng.integers(0, 12)) + str(rng.integers(0, 99)) for _ in range(80)]
    strings = [None if rng.random() < 0.2 else text for text in strings]
    numbers = [None if value is None else int(rng.integers(-5, 5)) for value in strings]
    for values in (strings, numbers):
        whole = pa.array(values)
        valid = np.array([value is not None for value in values])
        begin, length = int(rng.integers(0, 20)), int(rng.integers(1, 60))
        cut = slice(begin, begin + length)
        views = [] if values is numbers else [whole.cast(pa.string_view()), whole.cast(pa.large_string())]
        for array in (whole, whole.dictionary_encode(), *views):
            assert np.array_equal(hash_ids(array)[valid], hash_ids(whole)[valid])
            assert np.array_equal(hash_ids(array.slice(begin, length))[valid[cut]], hash_ids(whole)[cut][valid[cut]])
    assert len(hash_ids(pa.array(strings).slice(3, 0))) == 0
    assert len(hash_ids(pa.array([None, None], pa.dictionary(pa.int32(), pa.string())))) == 2


def test_rows_keep_zero_free_and_spread_evenly():
    hashes = hash_ids(pa.array(range(200_000)))
    rows = rows_from_hashes(hashes, 101)
    assert rows.min() == 1 and rows.max() == 100
    counts = np.bincount(rows, minlength=101)[1:]
    assert ((counts - 2000) ** 2 / 2000).sum() < 149  # chi-squared, 99 degrees of freedom, p = 0.001
    assert rows_from_hashes(hashes[:10], 2).tolist() == [1] * 10
    assert rows.tolist()[:100] == [1 + int(h) % 100 for h in hashes[:100]]


def test_no_collisions_among_close_ids_and_strings():
    assert len(np.unique(hash_ids(pa.array(range(-100_000, 100_000))))) == 200_000
    strings = [f"{prefix}{i}" for prefix in ("", "user_", "a much longer prefix ") for i in range(50_000)]
    hashes = hash_ids(pa.array(strings))
    assert len(np.unique(hashes)) == len(strings)
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 0.01


def test_combine_depends_on_order_and_leaves_its_parts_alone():
    a, b = mix(np.arange(1000, dtype=np.uint64)), mix(np.arange(1000, 2000, dtype=np.uint64))
    before = a.copy()
    assert not (combine([a, b]) == combine([b, a])).any()
    assert np.array_equal(a, before)
    pairs = combine([np.repeat(a, 100), np.tile(b[:100], 1000)])
    assert len(np.unique(pairs)) == 100_000


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="type double cannot be hashed"):
        hash_ids(pa.array([1.5]))
