"""Every Arrow type that a column may have, in memory and through Parquet, against a reading of Python values one by
one."""

import decimal
import itertools
import uuid
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_loaders.arrow import flat, is_list, null_mask, numbers, type_kind
from data_loaders.columns import NO_ID
from data_loaders.decode import Counters, Decoder, check_types
from data_loaders.hashing import hash_ids
from data_loaders.loader import Loader
from data_loaders.manifest import Manifest
from data_loaders.schema import Feature, Schema, Table
from tests.helpers.hash_reference import MASK, reference_bytes, reference_mix

H_ROWS, T_ROWS = 100_000, 200
TABLES = {"h": Table(H_ROWS), "t": Table(T_ROWS)}
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
TEXTS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary", "uuid")
ELEMENTS = (*INTEGERS, "bool", *TEXTS)
INDICES = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
TYPES = {
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "fixed_size_binary": pa.binary(5),
    "uuid": pa.uuid(),
}


# What an id means, in plain Python


def raw_hash(value):
    if isinstance(value, uuid.UUID):
        value = value.bytes
    if isinstance(value, str):
        value = value.encode()
    return reference_bytes(value) if isinstance(value, bytes) else reference_mix(int(value) & MASK)


def hashed(value):
    return 0 if value is None else 1 + raw_hash(value) % (H_ROWS - 1)


def identity(value):
    return NO_ID if value is None else int(value)


def bag(values, row_of):
    return [row for row in map(row_of, values or []) if row != NO_ID]


# Columns of one element type


def kind_of(name):
    return TYPES.get(name) or pa.type_for_alias(name)


def some_values(name, count, rng):
    """``count`` Python values with nulls among them."""
    if name == "bool":
        pool = [True, False]
    elif name in INTEGERS:
        pool = range(min(T_ROWS, np.iinfo(name).max + 1))
    elif name == "fixed_size_binary":
        pool = [b"12345", b"\0\0\0\0\0", b"abc\0\xff"]
    elif name == "uuid":
        pool = [uuid.UUID(int=i << 70 | i).bytes for i in range(9)]
    else:
        texts = ["", "a", "a\0", "eight888", "nine 9999", "größe €", "a long one of several words " * 3]
        pool = texts if "string" in name else [text.encode() for text in texts]
    return [None if rng.random() < 0.2 else pool[int(rng.integers(len(pool)))] for _ in range(count)]


def column(values, kind):
    """An array; extension types are made from their storage."""
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    return pa.array(values, kind)


def dictionary(array, index):
    storage = array.storage if isinstance(array, pa.ExtensionArray) else array
    found = list(dict.fromkeys(value for value in storage.to_pylist() if value is not None))
    places = pa.array([None if value is None else found.index(value) for value in storage.to_pylist()], index)
    return pa.DictionaryArray.from_arrays(places, pa.array(found, storage.type))


def columns_of(name, rows, seed=0):
    """``{column: array}`` of ``rows`` rows: the element type alone, in dictionaries, in lists, in lists of
    dictionaries."""
    rng, kind = np.random.default_rng(seed), kind_of(name)
    single = column(some_values(name, rows, rng), kind)
    columns = {"single": single, **{f"dictionary {index}": dictionary(single, index) for index in INDICES}}
    lengths = rng.integers(0, 5, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    child = column(some_values(name, int(offsets[-1]), rng), kind)
    mask = pa.array(rng.random(rows) < 0.2)
    for inner, array in (("", child), (" of dictionary", dictionary(child, pa.int32()))):
        columns[f"list{inner}"] = pa.ListArray.from_arrays(pa.array(offsets, "int32"), array, mask=mask)
        columns[f"large_list{inner}"] = pa.LargeListArray.from_arrays(pa.array(offsets, "int64"), array, mask=mask)
        swapped = offsets[:-1][::-1], lengths[::-1]  # a view's rows need not lie in order
        for view, width in ((pa.ListViewArray, "int32"), (pa.LargeListViewArray, "int64")):
            starts, sizes = (pa.array(part, width) for part in swapped)
            columns[f"{view.__name__}{inner}"] = view.from_arrays(starts, sizes, array, mask=mask)
        pairs = column(some_values(name, 2 * rows, rng), kind)
        pairs = dictionary(pairs, pa.int8()) if inner else pairs
        columns[f"fixed_size_list{inner}"] = pa.FixedSizeListArray.from_arrays(pairs, 2, mask=mask)
    return columns


def features_of(columns, name):
    """Each column hashed, and as it is where it holds integers."""
    features = {f"{key} hashed": Feature("sparse", column=key, table="h", ids="hash") for key in columns}
    if name in INTEGERS or name == "bool":
        features.update({f"{key} as is": Feature("sparse", column=key, table="t") for key in columns})
    return Schema(tables=TABLES, features=features)


def expected_ids(schema, columns):
    """For each feature a list of ids a row."""
    found = {}
    for name, feature in schema.features.items():
        row_of = hashed if feature.ids == "hash" else identity
        array = columns[feature.column]
        values = array.to_pylist()
        if is_list(array.type):  # an empty string in it is no id
            values = [value and [None if each in ("", b"") else each for each in value] for value in values]
        found[name] = [bag(value if is_list(array.type) else [value], row_of) for value in values]
    return found


def decoded_ids(schema, table):
    decoder = Decoder(schema, schema.layout(), {field.name: field.type for field in table.schema}, Counters())
    columns = decoder([table], table.num_rows)
    found = {}
    for name, slot in decoder.slots.items():
        if slot.bag:
            bags = columns.bags[slot.index]
            found[name] = [part.tolist() for part in np.split(bags.values, bags.offsets[1:-1])]
        else:
            found[name] = [[i] if i != NO_ID else [] for i in columns.ids[slot.index].tolist()]
    return found


def batch_of(schema, root, rows):
    """The rows under ``root`` in file order, as one batch."""
    layout = schema.layout()
    manifest = Manifest.scan(["."], str(root), ["label", *schema.columns(layout)])
    given = {"shuffle_rows": 1, "threads": 1, "prefetch_batches": 1, "rank": 0, "world_size": 1, "seed": 0}
    (batch,) = Loader(manifest, schema, layout, batch_size=rows, shards=1, shuffle=False, **given).epoch(0)
    return batch


def batch_ids(schema, batch):
    found = {}
    for name in schema.layout().pooled:
        jagged = batch.sparse[name]
        found[name] = [part.tolist() for part in jagged.values().split(jagged.lengths().tolist())]
    return found


def labeled(columns):
    rows = len(next(iter(columns.values())))
    return pa.table({"label": pa.array([0] * rows, "int8"), **columns})


# Ids


@pytest.mark.parametrize("name", ELEMENTS)
def test_ids_in_memory_whole_sliced_and_chunked(name):
    columns = columns_of(name, 60)
    schema = features_of(columns, name)
    whole, expected = labeled(columns), expected_ids(schema, columns)
    assert decoded_ids(schema, whole) == expected
    for start, rows in ((0, 7), (13, 40), (9, 1)):
        part = {key: values[start : start + rows] for key, values in expected.items()}
        assert decoded_ids(schema, whole.slice(start, rows)) == part
    assert not any(sum(ids, []) for ids in decoded_ids(schema, whole.slice(60)).values())
    other = columns_of(name, 20, seed=1)
    both = pa.concat_tables([whole.slice(11, 30), labeled(other).slice(3)])
    follow = expected_ids(schema, other)
    assert decoded_ids(schema, both) == {key: expected[key][11:41] + follow[key][3:] for key in expected}


@pytest.mark.parametrize("name", ELEMENTS)
def test_a_dictionary_may_hold_a_null_or_nothing(name):
    kind = kind_of(name)
    value = next(value for value in some_values(name, 9, np.random.default_rng(0)) if value is not None)
    array = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0], "int8"), column([value, None], kind))
    schema = features_of({"f": array}, name)
    assert decoded_ids(schema, labeled({"f": array})) == expected_ids(schema, {"f": array})
    empty = pa.DictionaryArray.from_arrays(pa.array([None, None], "int8"), column([], kind))
    assert decoded_ids(schema, labeled({"f": empty})) == expected_ids(schema, {"f": empty})


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("store_schema", [True, False], ids=["Arrow's types", "Parquet's types"])
def test_ids_through_parquet(name, store_schema, tmp_path):
    columns = {}
    for key, array in columns_of(name, 50).items():
        try:
            pq.write_table(pa.table({key: array}), tmp_path / "probe")
        except pa.ArrowNotImplementedError:
            assert "view" in str(array.type), f"pyarrow cannot write {array.type}"
            continue
        columns[key] = array
    (tmp_path / "probe").unlink(missing_ok=True)
    schema = features_of(columns, name)
    for use_dictionary, rows in ((True, 50), (False, 7)):
        path = tmp_path / "a.parquet"
        pq.write_table(
            labeled(columns), path, use_dictionary=use_dictionary, row_group_size=rows, store_schema=store_schema
        )
        assert batch_ids(schema, batch_of(schema, tmp_path, 50)) == expected_ids(schema, columns)


def test_an_id_hashes_alike_in_every_type():
    for value in (0, 1, 100, 127):
        arrays = [pa.array([value], name) for name in INTEGERS]
        arrays += [dictionary(array, index) for array in arrays for index in INDICES]
        assert {hash_ids(array).tolist()[0] for array in arrays} == {raw_hash(value)}
    for value in (-1, -128):
        arrays = [pa.array([value], name) for name in INTEGERS if name[0] == "i"]
        assert {hash_ids(array).tolist()[0] for array in arrays} == {raw_hash(value)}
    for text in ("", "a", "12345678", "123456789", "größe €" * 9):
        texts = [pa.array([text], kind) for kind in (pa.string(), pa.large_string(), pa.string_view())]
        data = text.encode()
        kinds = (pa.binary(), pa.large_binary(), pa.binary_view(), *([pa.binary(len(data))] if data else []))
        arrays = [*texts, *(pa.array([data], kind) for kind in kinds)]
        arrays += [dictionary(array, index) for array in arrays for index in INDICES]
        assert {hash_ids(array).tolist()[0] for array in arrays} == {raw_hash(text)}
    both = pa.array([True, False, None])
    schema = features_of({"f": both}, "bool")
    assert decoded_ids(schema, labeled({"f": both}))["f hashed"] == [[hashed(1)], [hashed(0)], [0]]


@pytest.mark.parametrize(
    "array",
    [
        pc.run_end_encode(pa.array([1, 1, 2])),
        pa.array([{"a": 1}, {"a": 2}, None]),
        pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        pa.array([(1, 2, 3), None, (0, 0, 0)], pa.month_day_nano_interval()),
        pa.array([1.0, 2.0, 3.0]),
        pa.array([decimal.Decimal(1)] * 3),
        pa.array([1, 2, 3], pa.timestamp("s")),
        pa.array([[[1]], [[2]], None]),
        pa.array([[1.5], [2.5], None]),
    ],
    ids=lambda array: str(array.type)[:40],
)
def test_other_types_are_refused_as_ids_with_type_column_and_remedy(array):
    for ids in ("hash", "identity"):
        schema = Schema(tables=TABLES, features={"f": Feature("sparse", column="c", table="h", ids=ids)})
        with pytest.raises(ValueError, match=r"feature 'f': column 'c' has type .*, expected integers.*; write ids as"):
            check_types(schema, schema.layout(), {"label": pa.int8(), "c": array.type})


# Numbers


NOW = 1_753_000_000  # July 2025
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
DENSE = {
    **{name: (pa.array([0, 1, 100, None], name), [0, 1, 100]) for name in INTEGERS},
    **{f"negative {name}": (pa.array([-1, -100, 5, None], name), [-1, -100, 5]) for name in INTEGERS[:4]},
    "int64 extremes": (pa.array([-(2**63), 2**63 - 1, 0, None], "int64"), [-(2**63), 2**63 - 1, 0]),
    "uint64 extremes": (pa.array([2**63 + 7, 2**64 - 1, 0, None], "uint64"), [2**63 + 7, 2**64 - 1, 0]),
    "bool": (pa.array([True, False, True, None]), [1, 0, 1]),
    "float16": (pa.array([0.5, -1.25, 65504, None], "float16"), [0.5, -1.25, 65504]),
    "float32": (pa.array([0.1, -1e-30, 3e38, None], "float32"), [float(np.float32(x)) for x in (0.1, -1e-30, 3e38)]),
    "float64": (pa.array([0.1, -1e-30, 3e38, None], "float64"), [0.1, -1e-30, 3e38]),
}
DECIMALS = [decimal.Decimal(text) for text in ("1.25", "-99999.99", "0.01")]
for _kind in (pa.decimal32(7, 2), pa.decimal64(16, 2), pa.decimal128(38, 2), pa.decimal256(70, 2)):
    DENSE[str(_kind)] = (pa.array([*DECIMALS, None], _kind), DECIMALS)
for _unit, _per in PER_SECOND.items():
    _values = [NOW * _per + 1, -_per, 7]
    _seconds = [Fraction(value, _per) for value in _values]
    for _kind in (pa.timestamp(_unit), pa.timestamp(_unit, "America/New_York"), pa.duration(_unit)):
        DENSE[str(_kind)] = (pa.array([*_values, None], _kind), _seconds)
    _day = pa.time32(_unit) if _unit in ("s", "ms") else pa.time64(_unit)
    _values = [0, 86399 * _per, 12345 * _per + 1]
    DENSE[str(_day)] = (pa.array([*_values, None], _day), [Fraction(value, _per) for value in _values])
DENSE["date32"] = (pa.array([0, 20_000, -1, None], pa.date32()), [0, 20_000 * 86400, -86400])
_DAYS = [0, 20_000 * 86_400_000, -86_400_000]
DENSE["date64"] = (pa.array([*_DAYS, None], pa.date64()), [value // 1000 for value in _DAYS])


def dense_of(array):
    schema = Schema(features={"f": Feature("dense", fill=-7.0)})
    decoder = Decoder(schema, schema.layout(), {"label": pa.int8(), "f": array.type}, Counters())
    return decoder([labeled({"f": array})], len(array)).numbers[0]


def dense_column(root, name):
    schema = Schema(features={"f": Feature("dense", column=name, fill=-7.0)})
    return batch_of(schema, root, 4).dense[:, 0].numpy()


def is_nearest(found, exact):
    """The float32 nearest to an exact number; through float64, whose own rounding may decide a tie."""
    return found == np.float32(float(Fraction(exact)))


@pytest.mark.parametrize("name", DENSE)
def test_dense_values_of_every_number_type(name, tmp_path):
    array, exact = DENSE[name]
    values = dense_of(array)
    assert values.dtype == np.float32 and values[3] == -7
    assert all(map(is_nearest, values, exact)), (values, exact)
    assert dense_of(array.slice(1)).tolist() == values[1:].tolist()
    encoded = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, None], "int8"), array.slice(0, 3))
    assert dense_of(encoded).tolist() == values.tolist()
    pq.write_table(labeled({name: array}), tmp_path / "a.parquet")
    assert dense_column(tmp_path, name).tolist() == values.tolist()


def test_the_precision_of_times():
    """What the documentation of arrow.py states."""
    rng = np.random.default_rng(0)
    for unit, per in PER_SECOND.items():
        first, last = 1_073_000_000 * per, (2**31 - 1) * per  # 2004 to 2038
        values = rng.integers(first, last, 10_000)
        seconds = numbers(pa.array(values, pa.timestamp(unit)))
        errors = [abs(Fraction(float(s)) - Fraction(int(v), per)) for s, v in zip(seconds, values)]
        assert max(errors) <= Fraction(1, 2_000_000)
        errors = np.abs(dense_of(pa.array(values, pa.timestamp(unit))).astype(np.float64) - seconds)
        assert 32 < errors.max() <= 64
        day = pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)
        values = rng.integers(0, 86_400 * per, 10_000)
        errors = np.abs(dense_of(pa.array(values.tolist(), day)).astype(np.float64) - values / per)
        assert errors.max() <= 0.004


def test_files_may_differ_in_the_unit_of_their_times(tmp_path):
    days = [0, 86400, 20_000 * 86400, None]
    kinds = {
        "a": pa.timestamp("ms"),
        "b": pa.timestamp("us"),
        "c": pa.timestamp("ns", "UTC"),
        "d": pa.date32(),
    }
    for file, kind in kinds.items():
        array = (
            pa.array(days, pa.timestamp("s")).cast(kind)
            if file != "c"
            else pa.array([None if day is None else day * 10**9 for day in days], kind)
        )
        pq.write_table(labeled({"at": array}), tmp_path / f"{file}.parquet")
    schema = Schema(features={"at": Feature("dense", fill=-7.0)})
    batch = batch_of(schema, tmp_path, 16)
    assert batch.dense[:, 0].tolist() == [0.0, 86400.0, 20_000 * 86400.0, -7.0] * 4
    # A duration or a time of day is something else than a point in time, a plain integer likewise.
    for kind in (pa.duration("ms"), pa.time64("us"), pa.int64()):
        pq.write_table(labeled({"at": pa.array([1, 2, 3, None], kind)}), tmp_path / "e.parquet")
        with pytest.raises(ValueError, match="column 'at' has types of different kinds: .*; write it with one type"):
            batch_of(schema, tmp_path, 20)


@pytest.mark.parametrize(
    "array",
    [
        *(pa.array([0, 1, 1, 0], name) for name in (*INTEGERS, "float16", "float32", "float64")),
        pa.array([False, True, True, False]),
        *(
            pa.array([decimal.Decimal(i) for i in (0, 1, 1, 0)], kind)
            for kind in (pa.decimal32(3), pa.decimal128(9, 3))
        ),
        pa.DictionaryArray.from_arrays(pa.array([0, 1, 1, 0]), pa.array([0, 1])),
    ],
    ids=lambda array: str(array.type),
)
def test_labels_and_weights_of_every_number_type(array):
    schema = Schema(weight="w")
    decoder = Decoder(schema, schema.layout(), {"label": array.type, "w": array.type}, Counters())
    assert decoder([pa.table({"label": array, "w": array})], 4).numbers.tolist() == [[0, 1, 1, 0]] * 2


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(3), pa.list_(pa.float32()), pa.struct([]), pa.uuid()], ids=str)
def test_other_types_are_refused_as_numbers(kind):
    for schema in (Schema(features={"f": Feature("dense", column="c")}), Schema(label="c"), Schema(weight="c")):
        types = {"label": pa.int8(), "c": kind}
        with pytest.raises(ValueError, match=r"column 'c' has type .*, expected a number"):
            check_types(schema, schema.layout(), types)


# Arrays


def test_columns_of_nulls_and_of_nothing():
    for array in (
        pa.nulls(3),
        pa.array([], pa.null()),
        pa.chunked_array([], pa.string_view()),
        pa.array([], pa.uuid()),
    ):
        chunked = array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array])
        found = flat(chunked)
        assert len(found) == len(array)
        nulls = null_mask(found)
        assert nulls is None if not len(array) else nulls.all()


@pytest.mark.parametrize("seed", range(8))
def test_null_masks_at_every_offset(seed):
    rng = np.random.default_rng(seed)
    values = [None if rng.random() < 0.3 else int(rng.integers(0, 9)) for _ in range(70)]
    array = pa.array(values)
    for start, rows in itertools.product(range(20), (0, 1, 7, 8, 9, 33)):
        part = array.slice(start, rows)
        found = null_mask(part)
        expected = [value is None for value in part.to_pylist()]
        assert found.tolist() == expected if any(expected) else found is None


def test_kinds_of_types_that_files_may_mix():
    groups = {
        "number": [*map(pa.type_for_alias, INTEGERS), pa.bool_(), pa.float16(), pa.float64(), pa.decimal32(3)],
        "text": [
            pa.string(),
            pa.large_binary(),
            pa.string_view(),
            pa.binary(4),
            pa.uuid(),
            pa.dictionary(pa.int8(), pa.string()),
        ],
        "time": [pa.timestamp("s"), pa.timestamp("ns", "UTC"), pa.date32(), pa.date64()],
        "time of day": [pa.time32("ms"), pa.time64("ns")],
        "duration": [pa.duration("s"), pa.duration("ns")],
        "null": [pa.null()],
        "list of number": [
            pa.list_(pa.int8()),
            pa.large_list(pa.int64()),
            pa.list_(pa.uint8(), 3),
            pa.list_view(pa.int32()),
        ],
        "list of text": [pa.list_(pa.dictionary(pa.int32(), pa.string())), pa.large_list_view(pa.string_view())],
    }
    for kind, types in groups.items():
        assert {type_kind(found) for found in types} == {kind}
