"""Decoding equals a row-by-row reading of ``to_pylist``, whatever Arrow's types, slices, chunks and nulls."""

import datetime
import decimal
import math

import numpy as np
import pyarrow as pa
import pytest

from data_loaders.column_decoders import Counters, RowError
from data_loaders.columns import NO_ID
from data_loaders.decode import Decoder
from data_loaders.hashing import combine, hash_ids, rows_from_hashes
from data_loaders.schema import Cross, Feature, Layout, Schema, Table

TABLES = {"t": Table(50), "h": Table(1000)}


def decode(schema, table, layout=None, **options):
    """Columns, counts, and each key's slot."""
    layout = layout or schema.layout(crosses=True)
    counters = Counters()
    decoder = Decoder(schema, layout, {f.name: f.type for f in table.schema}, counters, **options)
    tables = table if isinstance(table, list) else [table]
    columns = decoder(tables, sum(part.num_rows for part in tables))
    return columns, counters.snapshot(), decoder.slots


def one(feature, array, **tables):
    """One feature's values: a list of ids, or of lists of ids; and the counts."""
    schema = Schema(tables={**TABLES, **tables}, features={"f": feature})
    table = pa.table({"label": pa.array([0] * len(array)), feature.column or "f": array})
    columns, counts, slots = decode(schema, table)
    slot = slots["f"]
    if not slot.bag:
        return columns.ids[slot.index].tolist(), counts
    bags = columns.bags[slot.index]
    return [part.tolist() for part in np.split(bags.values, bags.offsets[1:-1])], counts


def dense(array, **options):
    schema = Schema(features={"f": Feature("dense", **options)})
    columns, counts, _ = decode(schema, pa.table({"label": pa.array([0] * len(array)), "f": array}))
    return columns.numbers[0], counts


def hashed(value, rows=1000):
    return int(rows_from_hashes(hash_ids(pa.array([value])), rows)[0])


# A random table with everything in it, against a reading by hand.


PRICES = [1.5, -2, math.inf, math.nan]


def random_table(rng, rows):
    def maybe(value, share=0.15):
        return None if rng.random() < share else value

    def ids(top):
        return [int(i) for i in rng.integers(0, top, rng.integers(0, 7))]

    def text():
        return str(rng.integers(0, 30)) * int(rng.integers(1, 5))

    def texts():
        return [maybe(text()) for _ in range(rng.integers(0, 5))]

    pairs = [[int(i) for i in rng.integers(0, 50, rng.integers(0, 9))] for _ in range(rows)]
    return pa.table(
        {
            "label": pa.array(rng.integers(0, 2, rows), "int8"),
            "weight": pa.array(rng.random(rows)),
            "count": pa.array([maybe(int(rng.integers(-3, 1000))) for _ in range(rows)], "int64"),
            "price": pa.array([maybe(float(rng.choice(PRICES))) for _ in range(rows)], "float64"),
            "plain": pa.array([maybe(int(rng.integers(0, 50))) for _ in range(rows)], "int32"),
            "outside": pa.array([maybe(int(rng.integers(-9, 70))) for _ in range(rows)], "int64"),
            "text": pa.array([maybe(text()) for _ in range(rows)], pa.string()),
            "tags": pa.array([maybe(texts()) for _ in range(rows)], pa.list_(pa.string())),
            "bag": pa.array([maybe([maybe(i) for i in ids(60)]) for _ in range(rows)], pa.large_list(pa.int16())),
            "items": pa.array(pairs, pa.list_(pa.int64())),
            "kinds": pa.array([[i % 7 for i in pair] for pair in pairs], pa.list_(pa.int32())),
        }
    )


SCHEMA = Schema(
    weight="weight",
    tables=TABLES,
    features={
        "count": Feature("dense", fill=2, log1p=True),
        "price": Feature("dense", fill=0),
        "plain": Feature("sparse", table="t"),
        "kept": Feature("sparse", column="outside", table="t", on_out_of_range="missing", missing_id=7),
        "text": Feature("sparse", table="h", ids="hash"),
        "tags": Feature("sparse", table="h", ids="hash", max_length=3),
        "bag": Feature("sparse", table="t", on_out_of_range="missing"),
        "items": Feature("sequence", table="t", max_length=4, target="plain", history="past"),
        "kinds": Feature("sequence", table="t", max_length=4, target="plain", history="past"),
    },
    crosses={"text_x_plain": Cross(["text", "plain"], 77)},
)


def by_hand(row):
    """What one row means, key by key, straight from the schema's words."""
    count = 2 if row["count"] is None else row["count"]
    price = 0 if row["price"] is None or not math.isfinite(row["price"]) else row["price"]
    kept = row["outside"] if row["outside"] is not None and 0 <= row["outside"] < 50 else 7
    parts = [row["text"], row["plain"]]
    cross = None if None in parts else combine([hash_ids(pa.array([part])) for part in parts])
    return {
        "dense": [np.float32(math.log1p(max(count, 0))), np.float32(price)],
        "plain": NO_ID if row["plain"] is None else row["plain"],
        "kept": kept,
        "text": 0 if row["text"] is None else hashed(row["text"]),
        "text_x_plain": 0 if cross is None else int(rows_from_hashes(cross, 77)[0]),
        "tags": [0 if tag is None else hashed(tag) for tag in (row["tags"] or [])[-3:]],
        "bag": [i for i in row["bag"] or [] if i is not None and i < 50],
        "items": row["items"][-4:],
        "kinds": row["kinds"][-4:],
    }


def assert_equal(columns, slots, expected, table):
    for index, row in enumerate(expected):
        np.testing.assert_allclose(columns.numbers[:2, index], row["dense"], rtol=1e-6)
        for key, slot in slots.items():
            if slot.bag:
                bags = columns.bags[slot.index]
                found = bags.values[bags.offsets[index] : bags.offsets[index + 1]].tolist()
            else:
                found = columns.ids[slot.index, index]
            assert found == row[key], (key, index)
    assert columns.numbers[2].tolist() == [row["label"] for row in table.to_pylist()]
    np.testing.assert_array_equal(columns.numbers[3], table["weight"].to_numpy().astype(np.float32))


@pytest.mark.parametrize("seed", range(6))
def test_random_tables_sliced_and_chunked(seed):
    rng = np.random.default_rng(seed)
    table = pa.concat_tables([random_table(rng, int(rng.integers(1, 40))) for _ in range(3)])
    table = table.slice(int(rng.integers(0, 10)), table.num_rows - 15)
    expected = [by_hand(row) for row in table.to_pylist()]
    columns, counts, slots = decode(SCHEMA, table)
    assert_equal(columns, slots, expected, table)
    raw = table.to_pylist()
    by_hand_counts = {
        "plain.null": sum(row["plain"] is None for row in raw),
        "kept.out_of_range": sum(not 0 <= row["outside"] < 50 for row in raw if row["outside"] is not None),
        "price.non_finite": sum(not math.isfinite(row["price"]) for row in raw if row["price"] is not None),
        "tags.truncated": sum(len(row["tags"] or []) > 3 for row in raw),
        "bag.out_of_range": sum(i >= 50 for row in raw for i in row["bag"] or [] if i is not None),
        "tags.null": sum(row["tags"] is None or sum(tag is None for tag in row["tags"][-3:]) for row in raw),
    }
    assert {name: counts.get(name, 0) for name in by_hand_counts} == by_hand_counts


def test_several_tables_and_a_permutation():
    rng = np.random.default_rng(9)
    tables = [random_table(rng, 30), random_table(rng, 5000).slice(17, 4900), random_table(rng, 1)]
    drifted = tables[0].set_column(4, "plain", tables[0]["plain"].cast("uint64"))  # types may differ between files
    whole = pa.concat_tables(tables)
    rows = rng.permutation(whole.num_rows)
    decoder = Decoder(SCHEMA, SCHEMA.layout(crosses=True), {f.name: f.type for f in whole.schema}, Counters())
    first = decoder([random_table(rng, 6000)], 6000)
    address = first.ids.ctypes.data
    del first  # its memory comes again
    natural = decoder(iter([drifted, *tables[1:]]), whole.num_rows)
    columns = decoder.empty(whole.num_rows, "other")
    columns.fill(
        [natural.between(0, 3000), natural.between(3000, 3000), natural.between(3000, whole.num_rows)],
        rows,
        np.empty(whole.num_rows, np.int64),
    )
    assert natural.ids.ctypes.data == address and columns.ids.dtype == np.int32
    raw = whole.to_pylist()
    sample = rng.choice(whole.num_rows, 200)
    expected = {int(i): by_hand(raw[int(rows[i])]) for i in sample}
    for i, row in expected.items():
        assert [columns.ids[s.index, i] for k, s in decoder.slots.items() if not s.bag] == [
            row[k] for k, s in decoder.slots.items() if not s.bag
        ]
        for key in ("tags", "bag", "items", "kinds"):
            bags = columns.bags[decoder.slots[key].index]
            assert bags.values[bags.offsets[i] : bags.offsets[i + 1]].tolist() == row[key]
        assert columns.numbers[2, i] == raw[int(rows[i])]["label"]


def test_no_table_and_no_rows():
    table = random_table(np.random.default_rng(0), 4)
    for tables in ([], [table.slice(0, 0)]):
        decoder = Decoder(SCHEMA, SCHEMA.layout(), {f.name: f.type for f in table.schema}, Counters())
        columns = decoder(tables, 0)
        assert columns.num_rows == 0 and columns.ids.shape == (3, 0) and columns.bags[0].offsets.tolist() == [0]


# Ids


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_identity_in_every_integer_type(kind):
    table = {"t": Table(200)}
    top = min(199, np.iinfo(kind).max)
    assert one(Feature("sparse", table="t"), pa.array([0, 5, top], kind), **table)[0] == [0, 5, top]
    lowest, highest = np.iinfo(kind).min, np.iinfo(kind).max
    feature = Feature("sparse", table="t", on_out_of_range="missing", missing_id=3)
    found, counts = one(feature, pa.array([lowest, 1, highest, None], kind), **table)
    expected = [v if 0 <= v < 200 else 3 for v in (lowest, 1, highest)] + [3]
    assert found == expected
    assert counts.get("f.out_of_range", 0) == sum(not 0 <= v < 200 for v in (lowest, highest)) and counts["f.null"] == 1


@pytest.mark.parametrize("value", [-1, -5, -(2**63), 50, 51, 10**12, 2**32 + 3])
def test_an_id_outside_the_table_is_an_error_that_tells_all(value):
    array = pa.array([1, 2, value])
    message = rf"feature 'f' \(column 'c'\) has id {value}, but table 't' has rows 0 … 49: raise schema.tables.t"
    with pytest.raises(RowError, match=message) as error:
        one(Feature("sparse", column="c", table="t"), array)
    assert error.value.row == 2
    found, counts = one(Feature("sparse", column="c", table="t", on_out_of_range="missing"), array)
    assert found == [1, 2, NO_ID] and counts == {"f.out_of_range": 1}


def test_what_lies_under_a_null_is_not_looked_at():
    values = pa.Array.from_buffers(pa.int64(), 3, [pa.py_buffer(bytes([0b101])), pa.py_buffer(np.array([1, 999, 2]))])
    assert one(Feature("sparse", table="t"), values) == ([1, NO_ID, 2], {"f.null": 1})


def test_uint64_above_int64():
    array = pa.array([2**63 + 1], "uint64")
    with pytest.raises(RowError, match=str(2**63 + 1)):
        one(Feature("sparse", table="t"), array)
    assert one(Feature("sparse", table="h", ids="hash"), array)[0] == [hashed(pa.scalar(2**63 + 1, "uint64"))]


TEXT = pa.array(["a", None, "b"])


def test_bool_and_null_columns():
    assert one(Feature("sparse", table="t"), pa.array([True, False, None, True])) == ([1, 0, NO_ID, 1], {"f.null": 1})
    assert one(Feature("sparse", table="h", ids="hash"), pa.array([None, None]))[0] == [0, 0]
    assert one(Feature("sequence", table="t", max_length=2), pa.array([None, None])) == ([[], []], {"f.null": 2})
    assert dense(pa.array([None, None]), fill=4)[0].tolist() == [4, 4]


@pytest.mark.parametrize("array", [TEXT, TEXT.dictionary_encode(), pa.array([1, None, 3])], ids=lambda a: str(a.type))
def test_null_ids_by_policy(array):
    feature = Feature("sparse", table="h", ids="hash")
    found, counts = one(feature, array)
    assert found[1] == 0 and 0 not in (found[0], found[2]) and counts == {"f.null": 1}
    assert one(Feature("sparse", table="h", ids="hash", missing_id=9), array)[0][1] == 9
    with pytest.raises(RowError, match=r"feature 'f' \(column 'f'\) is null: set schema.features.f.on_null") as error:
        one(Feature("sparse", table="h", ids="hash", on_null="error"), array)
    assert error.value.row == 1


def test_dictionaries_of_every_kind():
    nulls_inside = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 1]), pa.array(["a", None]))
    assert one(Feature("sparse", table="h", ids="hash"), nulls_inside) == ([hashed("a"), 0, 0, 0], {"f.null": 3})
    integers = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], "int8"), pa.array([7, 8]))
    assert one(Feature("sparse", table="t"), integers)[0] == [8, 7, 8]
    chunks = pa.chunked_array([pa.array(["x", "y"]).dictionary_encode(), pa.array(["y", "z"]).dictionary_encode()])
    assert one(Feature("sparse", table="h", ids="hash"), chunks)[0] == [hashed(text) for text in "xyyz"]
    lists = pa.ListArray.from_arrays([0, 2, 3], pa.array(["x", "y", "x"]).dictionary_encode())
    assert one(Feature("sparse", table="h", ids="hash"), lists)[0] == [[hashed("x"), hashed("y")], [hashed("x")]]


def test_crosses_are_missing_where_a_part_is():
    schema = Schema(
        tables=TABLES,
        features={"a": Feature("sparse", table="t"), "b": Feature("sparse", table="h", ids="hash")},
        crosses={"a_x_b": Cross(["a", "b"], 1 << 40), "b_x_a": Cross(["b", "a"], 1 << 40)},
    )
    table = pa.table({"label": [0] * 4, "a": [1, 1, None, 2], "b": ["x", "x", "x", None]})
    columns, counts, slots = decode(schema, table)
    assert columns.ids.dtype == np.int64  # 2^40 rows
    cross, other = columns.ids[slots["a_x_b"].index], columns.ids[slots["b_x_a"].index]
    assert cross[0] == cross[1] > 0 and cross[2:].tolist() == [0, 0] and cross[0] != other[0]
    assert counts == {"a.null": 1, "b.null": 1}
    only = decode(schema, table, Layout(("a_x_b",)))[0]
    assert np.array_equal(only.ids, [cross])


# Lists


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint8())])
def test_lists_keep_the_most_recent(kind):
    array = pa.array([[1, 2, 3, 4], [], None, [5], list(range(40))], kind)
    found, counts = one(Feature("sequence", table="t", max_length=3), array)
    assert found == [[2, 3, 4], [], [], [5], [37, 38, 39]] and counts == {"f.truncated": 2, "f.null": 1}


def test_fixed_size_lists_and_their_slices():
    array = pa.array([[1, 2], None, [3, 4], [5, 6]], pa.list_(pa.int64(), 2))
    assert one(Feature("sparse", table="t"), array)[0] == [[1, 2], [], [3, 4], [5, 6]]
    assert one(Feature("sparse", table="t"), array.slice(1, 2))[0] == [[], [3, 4]]
    assert one(Feature("sparse", table="t", max_length=1), array.slice(2))[0] == [[4], [6]]


def test_null_lists_with_something_under_them():
    mask = pa.array([False, True, False])
    array = pa.ListArray.from_arrays(pa.array([0, 2, 4, 5]), pa.array([1, 2, 99, 99, 3]), mask=mask)
    assert one(Feature("sparse", table="t"), array) == ([[1, 2], [], [3]], {"f.null": 1})
    with pytest.raises(RowError, match="is null") as error:
        one(Feature("sparse", table="t", on_null="error"), array)
    assert error.value.row == 1


def test_missing_elements_leave_the_bag_or_take_the_missing_row():
    array = pa.array([[1, None, 60], [None], [2]])
    found, counts = one(Feature("sparse", table="t", on_out_of_range="missing"), array)
    assert found == [[1], [], [2]] and counts == {"f.null": 2, "f.out_of_range": 1}
    assert one(Feature("sparse", table="t", on_out_of_range="missing", missing_id=9), array)[0] == [[1, 9, 9], [9], [2]]
    with pytest.raises(RowError, match="has id 60") as error:
        one(Feature("sparse", table="t"), pa.array([[], [1], [2, 60]]))
    assert error.value.row == 2


def test_what_is_cut_off_is_not_looked_at():
    array = pa.array([[999, None, 1], [2, 3, 4]])
    assert one(Feature("sparse", table="t", max_length=1), array) == ([[1], [4]], {"f.truncated": 2})


def test_a_history_of_a_million():
    found, counts = one(Feature("sequence", table="t", max_length=5), pa.array([[1], [3] * 1_000_000 + [4]]))
    assert found == [[1], [3, 3, 3, 3, 4]] and counts == {"f.truncated": 1}


def history(items, kinds, **options):
    features = {
        "target": Feature("sparse", table="t"),
        "items": Feature("sequence", table="t", target="target", history="past", **{"max_length": 3, **options}),
        "kinds": Feature("sequence", table="t", target="target", history="past", max_length=3),
    }
    table = pa.table({"label": [0] * len(items), "target": [1] * len(items), "items": items, "kinds": kinds})
    return decode(Schema(tables=TABLES, features=features), table)


def test_one_history_has_one_length():
    with pytest.raises(RowError, match=r"'items' \(column 'items'\) and 'kinds' .* have 2 and 1 ids") as error:
        history([[1], [1, 2]], [[1], [1]])
    assert error.value.row == 1
    with pytest.raises(RowError, match="missing_id") as error:
        history([[1], [1, None]], [[1], [1, 2]])
    assert error.value.row == 1
    assert history([[1], [1, None]], [[1], [1, 2]], missing_id=0)[0].bags[0].values.tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="items.max_length is 4, but that of schema.features.kinds is 3"):
        history([[1]], [[1]], max_length=4)


# Numbers, labels, weights


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([1, -2, 3], "int8"), [1, -2, 3]),
        (pa.array([2**53 + 1, 2**63 - 1], "int64"), [2.0**53, 2.0**63]),
        (pa.array([True, False]), [1, 0]),
        (pa.array([0.5, -1.25], "float16"), [0.5, -1.25]),
        (pa.array([decimal.Decimal("1.25"), decimal.Decimal("-3.5")]), [1.25, -3.5]),
        (pa.array([datetime.datetime(1970, 1, 1, 0, 0, 7)], pa.timestamp("s")), [7]),
        (pa.array([datetime.date(1970, 1, 11)]), [864000]),
        (pa.array([3, 4]).dictionary_encode(), [3, 4]),
    ],
)
def test_dense_from_every_number_type(array, expected):
    assert dense(array)[0].tolist() == expected


def test_dense_offset_and_scale():
    times = pa.array([1_700_000_001_500, None, 1_699_999_999_000], pa.timestamp("ms"))
    values, _ = dense(times, offset=1.7e9, scale=0.5, fill=-3.0)
    assert values.tolist() == [0.75, -3.0, -0.5]
    assert dense(pa.array([2**53 + 2]), offset=2.0**53)[0].tolist() == [2]  # not in float32
    with pytest.raises(ValueError, match="scale not 0"):
        Schema(features={"f": Feature("dense", scale=0.0)})


def test_dense_fill_and_log():
    values = pa.array([None, math.nan, math.inf, -math.inf, 1e300, -5.0, math.e - 1])
    found, counts = dense(values, fill=3.0, log1p=True)
    np.testing.assert_allclose(found, [math.log(4)] * 5 + [0, 1], rtol=1e-6)
    assert counts == {"f.null": 1, "f.non_finite": 4}
    for value, shown in ((None, "null"), (math.nan, "nan"), (math.inf, "inf")):
        message = rf"dense feature 'f' \(column 'f'\) is {shown}: give schema.features.f.fill"
        with pytest.raises(RowError, match=message) as error:
            dense(pa.array([1.0, value]))
        assert error.value.row == 1


@pytest.mark.parametrize("array", [pa.array([0, 1], "uint8"), pa.array([0.0, 1.0]), pa.array([False, True])])
def test_labels_of_every_type(array):
    assert decode(Schema(), pa.table({"label": array}))[0].numbers.tolist() == [[0, 1]]


@pytest.mark.parametrize(("value", "shown"), [(2, "2"), (-1, "-1"), (0.5, "0.5"), (math.nan, "nan"), (None, "null")])
def test_bad_labels(value, shown):
    with pytest.raises(RowError, match=f"label 'label' is {shown}") as error:
        decode(Schema(), pa.table({"label": [0, 1, value]}))
    assert error.value.row == 2


@pytest.mark.parametrize(("value", "shown"), [(-0.5, "-0.5"), (math.nan, "nan"), (math.inf, "inf"), (None, "null")])
def test_bad_weights(value, shown):
    with pytest.raises(RowError, match=f"weight 'w' is {shown}"):
        decode(Schema(weight="w"), pa.table({"label": [0, 1], "w": [0.0, value]}))


def test_without_labels():
    columns = decode(Schema(weight="w"), pa.table({"x": [1, 2]}), labeled=False)[0]
    assert columns.numbers.shape == (0, 2)


def test_the_row_of_an_error_counts_over_all_tables():
    tables = [pa.table({"label": [0.0] * 5000}), pa.table({"label": [0, 1]}), pa.table({"label": [1, 3]})]
    decoder = Decoder(Schema(), Layout(()), {"label": pa.int64()}, Counters())
    with pytest.raises(RowError, match="label 'label' is 3") as error:
        decoder(tables, 5004)
    assert error.value.row == 5003


# Types


@pytest.mark.parametrize(
    ("feature", "kind", "message"),
    [
        (Feature("sparse", table="t"), pa.string(), "sparse feature 'f': column 'f' has type string, .* 'hash'"),
        (Feature("sparse", table="t"), pa.float64(), "has type double, expected integers"),
        (Feature("sparse", table="t"), pa.list_(pa.float32()), "has type float, expected integers"),
        (Feature("sparse", table="h", ids="hash"), pa.float64(), "has type double, expected integers or strings"),
        (Feature("sequence", table="t", max_length=3), pa.int64(), "sequence feature 'f': .* expected a list"),
        (Feature("dense"), pa.string(), "dense feature 'f': column 'f' has type string, expected a number"),
        (Feature("dense"), pa.list_(pa.int64()), "expected a number"),
    ],
)
def test_wrong_types_are_found_before_any_row(feature, kind, message):
    schema = Schema(tables=TABLES, features={"f": feature})
    with pytest.raises(ValueError, match=message):
        Decoder(schema, schema.layout(), {"label": pa.int8(), "f": kind}, Counters())


def test_wrong_types_of_label_weight_and_cross():
    features = {name: Feature("sparse", table="t") for name in "ab"}
    schema = Schema(weight="w", tables=TABLES, features=features, crosses={"c": Cross(["a", "b"], 9)})
    good = {"label": pa.int8(), "w": pa.float32(), "a": pa.int64(), "b": pa.int64()}
    for name, kind, message in (
        ("label", pa.string(), "the label: column 'label' has type string"),
        ("w", pa.string(), "the weight: column 'w'"),
        ("b", pa.list_(pa.int64()), "feature 'b' of cross 'c': column 'b' has type list"),
    ):
        with pytest.raises(ValueError, match=message):
            Decoder(schema, schema.layout(crosses=True), {**good, name: kind}, Counters())
