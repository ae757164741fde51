"""Vectors of numbers: decoded as a row-by-row reading of ``to_pylist``, whatever Arrow's types, slices and nulls."""

import math

import numpy as np
import pyarrow as pa
import pytest

from data_loaders.batch import Cursor
from data_loaders.collate import Chunk, Collator
from data_loaders.column_decoders import Counters, RowError
from data_loaders.decode import Decoder
from data_loaders.errors import UserError
from data_loaders.schema import Feature, Schema, Table

DIM = 3
TYPES = [
    pa.list_(pa.float32(), DIM),
    pa.list_(pa.float64()),
    pa.large_list(pa.float32()),
    pa.list_(pa.int16()),
    pa.list_(pa.float16()),
]


def decoder(kind, **options):
    features = {"price": Feature("dense"), "image": Feature("vector", column="v", dim=DIM, **options)}
    schema = Schema(features={**features, "age": Feature("dense")}, tables={"t": Table(4)})
    types = {"price": pa.float32(), "age": pa.float32(), "v": kind, "label": pa.int64()}
    counters = Counters()
    return Decoder(schema, schema.layout(), types, counters), counters


def decode(vectors, **options):
    """float32 [R, DIM], dropped rows, and the counts."""
    decoding, counters = decoder(vectors.type, **options)
    rows = len(vectors)
    zeros = pa.array(np.zeros(rows, np.float32))
    table = pa.table({"price": zeros, "age": pa.array(np.ones(rows, np.float32)), "v": vectors, "label": [0] * rows})
    columns = decoding([table], rows)
    assert not columns.numbers[0].any() and (columns.numbers[1][columns.dropped is None] == 1).all()
    return columns.numbers[2 : 2 + DIM].T, columns.dropped, counters.snapshot()


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("nulls", [False, True])
def test_every_layout_decodes_as_its_rows(kind, nulls):
    rng = np.random.default_rng(0)
    values = rng.integers(-9, 9, (40, DIM)).tolist()
    if nulls:
        values[0] = values[17] = values[39] = None
        values[5] = [1, None, 2]
    if pa.types.is_float16(kind.value_type):
        values = [v and [None if x is None else np.float16(x) for x in v] for v in values]
    whole = pa.array(values, kind)
    for part in (whole, whole[7:31], pa.concat_arrays([whole[3:9], whole[20:30]])):
        expected = [[7.0] * DIM if v is None or None in v else v for v in part.to_pylist()]
        found, _, counts = decode(part, fill=7.0)
        np.testing.assert_array_equal(found, np.array(expected, np.float32))
        missing = sum(v is None or None in v for v in part.to_pylist())
        assert counts == ({"image.null": missing} if missing else {})


def test_batches_hold_them_behind_the_numbers():
    decoding, _ = decoder(pa.list_(pa.float32()))
    table = pa.table({"price": [1.0, 2.0], "age": [3.0, 4.0], "v": [[5.0, 6, 7], [8, 9, 10]], "label": [0, 1]})
    columns = decoding([table], 2)
    batch = Collator(Schema().layout(), {}, 3)([Chunk(columns, 0, 2)], 2.0, Cursor(0, 1, 2, 2))
    assert batch.dense.tolist() == [[1, 3, 5, 6, 7], [2, 4, 8, 9, 10], [0] * 5]
    assert batch.labels.tolist() == [0, 1, 0]


def test_a_null_without_a_policy_is_an_error_that_names_the_row():
    vectors = pa.array([[1.0, 2, 3], None], pa.list_(pa.float32()))
    with pytest.raises(RowError, match="vector feature 'image' .* is null: give schema.features.image.fill") as error:
        decode(vectors)
    assert error.value.row == 1
    _, dropped, counts = decode(vectors, on_null="drop")
    assert dropped.tolist() == [False, True] and counts == {"image.null": 1, "rows.dropped": 1}
    with pytest.raises(RowError, match="is null"):
        decode(vectors, on_null="error", fill=0)


def test_what_is_not_finite():
    vectors = pa.array([[1.0, 2, 3], [1, math.inf, 3], [math.nan, 0, 0], [1, 1e300, 0]], pa.list_(pa.float64()))
    found, _, counts = decode(vectors, fill=0)
    assert found.tolist() == [[1, 2, 3], [0] * 3, [0] * 3, [0] * 3] and counts == {"image.non_finite": 3}
    with pytest.raises(RowError, match="is non-finite"):
        decode(vectors)
    _, dropped, _ = decode(vectors, on_non_finite="drop")
    assert dropped.tolist() == [False, True, True, True]


@pytest.mark.parametrize("wrong", [[1.0, 2], [1.0, 2, 3, 4], []])
def test_another_dimension_is_an_error_whatever_the_policy(wrong):
    vectors = pa.array([[1.0, 2, 3], [4.0, 5, 6], wrong], pa.list_(pa.float32()))
    message = f"has {len(wrong)} entries, but schema.features.image.dim is 3"
    with pytest.raises(RowError, match=message) as error:
        decode(vectors, fill=0, on_null="drop")
    assert error.value.row == 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (pa.list_(pa.float32(), 4), r"fixed_size_list.*\[4\], but schema.features.image.dim is 3: set it to 4"),
        (pa.float32(), "has type float, expected a list of 3 numbers; use 'kind: dense'"),
        (pa.list_(pa.string()), "has type string, expected a list of numbers"),
        (pa.list_(pa.list_(pa.float32())), "expected a list of numbers"),
    ],
)
def test_types_are_checked_before_any_row(kind, message):
    with pytest.raises(UserError, match=message):
        decoder(kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": None}, "schema.features.v.dim is None: give the number of entries"),
        ({"dim": 4, "project": 0}, "project is 0"),
        ({"dim": 4, "normalize": "l3"}, "normalize: 'l3' is not known; .*l2"),
        ({"dim": 4, "table": "t"}, "a vector has no table"),
        ({"dim": 4, "log1p": True}, "offset, scale and log1p are for kind: dense"),
        ({"kind": "dense", "dim": 4}, "dim, project and normalize are for kind: vector, this is dense"),
    ],
)
def test_a_schema_that_contradicts_itself(options, message):
    with pytest.raises(UserError, match=message):
        Schema(tables={"t": Table(4)}, features={"v": Feature(**{"kind": "vector", **options})})
