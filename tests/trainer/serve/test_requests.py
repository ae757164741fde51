"""A request's columns become what the training data have, or one message says which value cannot."""

import datetime
import decimal
import uuid

import pyarrow as pa
import pytest

from trainer.serve.requests import RequestError, cast, row_of, table_of, with_nulls

TYPES = {
    "id": pa.int64(),
    "small": pa.int8(),
    "big": pa.uint64(),
    "name": pa.string(),
    "coded": pa.dictionary(pa.int32(), pa.string()),
    "raw": pa.binary(),
    "price": pa.float64(),
    "half": pa.float32(),
    "cost": pa.decimal128(10, 2),
    "flag": pa.bool_(),
    "when": pa.timestamp("us", tz="UTC"),
    "day": pa.date32(),
    "device": pa.uuid(),
    "items": pa.list_(pa.int64()),
    "words": pa.large_list(pa.string()),
    "none": pa.null(),
}
UUID = uuid.UUID("12345678123456781234567812345678")


@pytest.mark.parametrize(
    ("column", "given", "expected"),
    [
        ("id", [1, None, -3], [1, None, -3]),
        ("id", ["9007199254740993", "-7", 165.0], [9007199254740993, -7, 165]),
        ("big", [2**64 - 1, "18446744073709551615"], [2**64 - 1, 2**64 - 1]),
        ("name", ["a", "é", None, ""], ["a", "é", None, ""]),
        ("coded", ["x", None, "x"], ["x", None, "x"]),
        ("raw", ["x"], [b"x"]),
        ("price", [1, 2.5, None, 2**53 + 1], [1.0, 2.5, None, float(2**53 + 1)]),
        ("cost", [1, "1.50", 2.25], [decimal.Decimal("1.00"), decimal.Decimal("1.50"), decimal.Decimal("2.25")]),
        ("flag", [True, 0, None], [True, False, None]),
        ("when", ["2026-11-30T09:10:00Z"], [datetime.datetime(2026, 11, 30, 9, 10, tzinfo=datetime.timezone.utc)]),
        ("day", ["2026-11-30"], [datetime.date(2026, 11, 30)]),
        ("device", [str(UUID)], [UUID]),
        ("items", [[1, 2], None, [], [None, "3"]], [[1, 2], None, [], [None, 3]]),
        ("words", [["a"], []], [["a"], []]),
        ("none", [None, None], [None, None]),
    ],
)
def test_values_of_the_columns_type(column, given, expected):
    table = table_of({column: given}, TYPES, "candidates")
    assert table.column(column).to_pylist() == expected
    wanted = pa.int64() if column == "none" else TYPES[column]
    assert table.column(column).type == wanted


@pytest.mark.parametrize(
    ("column", "bad", "expected"),
    [
        ("id", "x7", "not an integer"),
        ("id", 165.5, "not an integer"),
        ("id", True, "not an integer"),
        ("id", "0x10", "not an integer"),
        ("id", float("nan"), "not an integer"),
        ("id", 2**63, "is no int64"),
        ("id", {"a": 1}, "not an integer"),
        ("small", 300, "is no int8"),
        ("big", -1, "is no uint64"),
        ("name", 123, "not a text"),
        ("name", "\ud800", "is no string"),
        ("price", "1.5", "not a number"),
        ("price", True, "not a number"),
        ("cost", "a", "not a number"),
        ("flag", 2, "not true or false"),
        ("when", 1700000000, "not an ISO 8601 text"),
        ("day", "yesterday", "not an ISO 8601 text"),
        ("device", "zz", "not a UUID"),
        ("items", 5, "not a list of an integer"),
        ("items", [1, "x"], "not a list of an integer"),
        ("items", [[1]], "not a list of an integer"),
        ("words", "text", "not a list of a text"),
    ],
)
def test_others_are_refused_with_their_row(column, bad, expected):
    good = {"items": [], "words": []}.get(column)
    with pytest.raises(RequestError, match=rf"candidates\.{column}, row 1: .*{expected}"):
        table_of({column: [good, bad]}, TYPES, "candidates")


def test_unknown_columns_name_the_nearest():
    with pytest.raises(RequestError, match="context: 'prize' is not known; did you mean 'price'"):
        row_of({"prize": 1}, TYPES, "context")


def test_columns_are_equally_long():
    with pytest.raises(RequestError, match=r"candidates\.price has 1 values, candidates\.id 2"):
        table_of({"id": [1, 2], "price": [1.0]}, TYPES, "candidates")
    with pytest.raises(RequestError, match=r"candidates\.id is 7: give a list"):
        table_of({"id": 7}, TYPES, "candidates")


def test_arrow_columns_are_cast_without_loss():
    found = cast(pa.table({"id": pa.array([1, None], pa.int32()), "name": ["a", "b"]}), TYPES, "candidates")
    assert found.schema.types == [pa.int64(), pa.string()]
    with pytest.raises(RequestError, match=r"candidates\.id has type double, the training data int64"):
        cast(pa.table({"id": [1.5]}), TYPES, "candidates")


def test_missing_columns_are_null():
    found = with_nulls(pa.table({"b": [1, 2]}), ["a", "b"], {"a": pa.list_(pa.int64()), "b": pa.int64()}, 2)
    assert found.column_names == ["a", "b"] and found.column("a").to_pylist() == [None, None]
    assert with_nulls(pa.table({}), [], {}, 3).num_rows == 3
