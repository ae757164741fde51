"""The short way writes what the columns' own decoders write, and leaves them what it cannot do."""

import numpy as np
import pyarrow as pa
import pytest

from data_loaders.column_decoders import RowError
from data_loaders.columns import NO_ID
from data_loaders.plain import PlainColumns
from tests.helpers.decoding import decoded, schema

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def log(count, kind="int64", dense="int64", seed=1):
    rng = np.random.default_rng(seed)
    columns = {name: rng.integers(0, 100, count).astype(kind) for name in ("a", "b", "c")}
    columns |= {name: rng.integers(0, 120, count).astype(dense) for name in ("x", "y")}
    return {"label": rng.integers(0, 2, count).astype(kind), **columns}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("dense", ["float32", "float64", "int16"])
def test_equals_the_raw_values(kind, dense):
    raw = log(5000, kind, dense)
    columns, counts, _ = decoded({name: pa.array(values) for name, values in raw.items()}, chunks=3)
    assert not counts
    assert np.array_equal(columns.ids, [raw["a"], raw["b"], raw["c"]])
    assert np.array_equal(columns.numbers, np.array([raw["x"], raw["y"], raw["label"]], np.float32))


def test_takes_the_short_way_exactly_where_it_may():
    def done(**changes):
        raw = {name: pa.array(values) for name, values in log(4000).items()}
        raw.update(changes)
        table = pa.table(raw)
        _, _, decoder = decoded(raw, schema(on_out_of_range="missing", missing_id=0))
        plain = PlainColumns(decoder._numbers, decoder._singles)
        found = plain(table, 0, np.zeros((3, 4000), np.float32), np.zeros((3, 4000), np.int32))
        return sorted(["x", "y", "label", "a", "b", "c"][number] for number in found)

    values = log(4000)["a"]
    everything = ["a", "b", "c", "label", "x", "y"]
    assert done() == everything
    assert done(b=pa.array(values, mask=np.arange(4000) == 3999)) == ["a", "c", "label", "x", "y"]  # a null, far behind
    far = values.copy()
    far[3000] = 100
    assert done(b=pa.array(far)) == ["a", "c", "label", "x", "y"]
    far[3000] = -1
    assert done(b=pa.array(far)) == ["a", "c", "label", "x", "y"]
    far[3000] = 2**32  # a valid row in its low 32 bits
    assert done(b=pa.array(far)) == ["a", "c", "label", "x", "y"]
    assert done(x=pa.array(values.astype(float)), y=pa.array(values.astype(float))) == everything
    hashed = schema(ids="hash")
    _, _, decoder = decoded(log(10), hashed)
    assert [line.plain for line in decoder._singles] == [False] * 3


@pytest.mark.parametrize("kind", ["int32", "int64", "uint64"])
def test_what_is_out_of_range_or_null_is_decoded_with_care(kind):
    raw = log(6000, kind)
    raw["b"][4321] = 100
    arrays = {name: pa.array(values) for name, values in raw.items()}
    arrays["c"] = pa.array(raw["c"], mask=np.arange(6000) % 1000 == 7)
    columns, counts, _ = decoded(arrays, schema(on_out_of_range="missing"))
    expected = np.array([raw["a"], raw["b"], raw["c"]], np.int64)
    expected[1, 4321] = expected[2, 7::1000] = NO_ID
    assert np.array_equal(columns.ids, expected)
    assert counts == {"b.out_of_range": 1, "c.null": 6}
    with pytest.raises(RowError, match="'b' .* has id 100") as failed:
        decoded(arrays)
    assert failed.value.row == 4321


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_floats_that_are_not_finite(bad):
    raw = log(5000, dense="float64")
    raw["y"][2500] = bad
    raw["x"][:2] = 3e38  # their sum overflows float32, they do not
    columns, counts, _ = decoded({name: pa.array(values) for name, values in raw.items()})
    expected = np.array([raw["x"], np.where(raw["y"] == raw["y"][2500], -7, raw["y"])], np.float32)
    expected[1, 2500] = -7
    assert np.array_equal(columns.numbers[:2], expected) and counts == {"y.non_finite": 1}


@pytest.mark.parametrize("label", [2, -1, 256])
def test_labels_are_checked(label):
    raw = log(3000)
    raw["label"][2999] = label
    with pytest.raises(RowError, match=f"label 'label' is {label}: it must be 0 or 1") as failed:
        decoded(raw)
    assert failed.value.row == 2999
