"""Bad input, row by row of the failure matrix (shared/failure-modes.md, D1 to D32): ``test_dNN_…``.

All of them are here, as the loader of one process meets them. Where several ranks matter (D7, D9 to D11, D15, D17, D18,
D28), tests/trainer/run/test_bad_data_ranks.py goes on; where the program matters, from command line to exit code (D1 to D3,
D7, D12, D13, D16, D19, D20, D22, D24, D26, D31), tests/integration/test_bad_data.py does. Every refusal is held to the
same form by
``refusal``: what is wrong, where (file, row group, row; column or configuration key), and how to mend it.
"""

import contextlib
import json
import math
import os
import random
import shutil
import tempfile
import threading
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders.column_decoders import Counters
from data_loaders.columns import NO_ID
from data_loaders.decode import Decoder
from data_loaders.hashing import hash_ids, rows_from_hashes
from data_loaders.manifest import Manifest
from data_loaders.schema import Cross, Feature, Schema, Table
from data_loaders.storage import StorageError
from tests.helpers.bad_data import H_ROWS, T_ROWS, loader, log, read, rows_of, schema, told, write
from tests.helpers.flaky import Flaky

REPOSITORY = Path(__file__).resolve().parents[2]


# A log of 30 rows and what the loader makes of it


def with_value(place, value, kind, usual):
    """A column of 30 with one bad value."""
    values = [usual(i) for i in range(30)]
    values[place] = value
    return pa.array(values, kind)


def refusal(action, *parts):
    """The message of a refusal, as the program prints it; ``parts`` must be in it."""
    with pytest.raises((ValueError, OSError)) as caught:
        action()
    return told(str(caught.value), *parts)


def in_row(row, name="a.parquet", row_group_size=10):
    return f"{name}', row group {row // row_group_size}, row {row % row_group_size}: "


def check_policies(root, place, column, feature, policy, what, usual, says):
    """A bad value of ``feature`` in row ``place`` of a log of 30 under the policies error and drop."""
    write(root / "a.parquet", log(**{feature: column}))
    key = f"schema.features.{feature}.{policy}"
    refusal(
        lambda: read(root, schema(**{feature: {policy: "error"}})), in_row(place), f"'{feature}'", says, key, "mend"
    )
    found = read(root, schema(**{feature: {policy: "drop"}}))
    assert_dropped(found, [place])
    assert found.counters == {f"{feature}.{what}": 1, "rows.dropped": 1}
    for i, row in enumerate(found.rows):
        assert i == place or row[feature] == usual(i)


def assert_dropped(found, places):
    """These rows of 30 keep their places, with weight 0 and no ids; all others count."""
    assert len(found.rows) == 30 and len(found.batches) == 4
    assert [i for i, weight in enumerate(found["weight"]) if weight == 0] == list(places)
    assert set(found["weight"]) == {0.0, 1.0}
    for place in places:
        ids = [values for values in found.rows[place].values() if isinstance(values, list)]
        assert ids and not any(ids)
    marks = [batch.cursor.dropped for batch in found.batches]
    marks = [np.zeros(b.cursor.local_rows, bool) if m is None else m for b, m in zip(found.batches, marks)]
    assert np.flatnonzero(np.concatenate(marks)).tolist() == list(places)
    counted = [int(batch.weights.sum()) for batch in found.batches]
    assert [batch.normalizer.item() for batch in found.batches] == counted  # of one rank: its own
    assert [batch.cursor.rows for batch in found.batches] == [b.cursor.local_rows for b in found.batches]
    assert all(batch.dense.isfinite().all() and batch.labels.isfinite().all() for batch in found.batches)


# Columns and their types


def test_d01_a_column_missing_in_all_files_lists_the_missing_and_near_names(tmp_path):
    table = log().rename_columns(["label", "row", "prize", "itm", "user", "past", "kinds"])
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", table)
    refusal(
        lambda: loader(tmp_path),
        "a.parquet' lacks 2 column(s)",
        "'price' (near: prize)",
        "'item' (near: itm)",
        "Correct schema.features",
        "It has: label, row, prize",
    )


def test_d02_a_column_missing_in_one_later_file_names_that_file(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", log())
    write(tmp_path / "c.parquet", log(price=None))
    refusal(lambda: loader(tmp_path), "c.parquet' lacks 1 column(s): 'price'", "Correct schema.features")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"label": pa.array(["1"] * 30)}, ["the label", "'label' has type string", "a number, 0 or 1", "schema.label"]),
        ({"item": pa.array([1.0] * 30)}, ["'item' has type double", "integers", "write ids as integers"]),
        ({"item": pa.array([Decimal(1)] * 30)}, ["'item' has type decimal128(1, 0)", "integers"]),
        ({"item": pa.array(["1"] * 30)}, ["'item' has type string", "integers", "schema.features.item.ids to 'hash'"]),
        ({"user": pa.array([1.5] * 30)}, ["'user' has type double", "integers or strings"]),
        ({"price": pa.array(["1.5"] * 30)}, ["'price' has type string", "a number", "kind: sparse"]),
        ({"past": pa.array([1] * 30)}, ["'past' has type int64", "a list", "kind: sparse"]),
        ({"past": pa.array([["x"]] * 30)}, ["'past' has type string", "integers"]),
        ({"past": pa.array([[0.5]] * 30)}, ["'past' has type double", "integers"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_d03_a_wrong_type_names_column_found_and_expected(changes, parts, tmp_path):
    write(tmp_path / "a.parquet", log(**changes))
    refusal(lambda: loader(tmp_path), "a.parquet'", "expected", *parts)


def test_d03_other_integers_are_widened(tmp_path):
    write(tmp_path / "wide" / "a.parquet", log())
    expected = read(tmp_path / "wide").rows
    for kind in ("int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64"):
        changes = {name: log()[name].cast(kind) for name in ("label", "row", "item")}
        write(tmp_path / kind / "a.parquet", log(**changes, past=log()["past"].cast(pa.list_(pa.type_for_alias(kind)))))
        assert read(tmp_path / kind).rows == expected


def test_d04_integer_widths_may_drift_between_files(tmp_path):
    plain, drifted = tmp_path / "plain", tmp_path / "drifted"
    for number, kind in enumerate(("int64", "int32", "uint16", "int8")):
        table = log(first=30 * number, label=pa.array([0] * 30))
        write(plain / f"{number}.parquet", table)
        for name in ("label", "item", "kinds"):
            place = table.column_names.index(name)
            wanted = pa.list_(pa.type_for_alias(kind)) if name == "kinds" else pa.type_for_alias(kind)
            table = table.set_column(place, name, table[name].cast(wanted))
        write(drifted / f"{number}.parquet", table)
    for options in ({}, {"shuffle": True, "shards": 4, "threads": 2}):
        assert read(drifted, **options).rows == read(plain, **options).rows
    write(drifted / "4.parquet", log(item=pa.array(["1"] * 30)))
    refusal(
        lambda: loader(drifted), "column 'item' has types of different kinds", "4.parquet", "write it with one type"
    )


def test_d05_uint64_ids_beyond_int64_are_out_of_range_or_hashed_as_unsigned(tmp_path):
    value, usual = 2**63 + 5, lambda i: 1 + i % 40
    column = with_value(13, value, "uint64", usual)
    check_policies(
        tmp_path, 13, column, "item", "on_out_of_range", "out_of_range", lambda i: [usual(i)], f"has id {value}"
    )
    found = read(tmp_path, schema(item={"on_out_of_range": "missing", "missing_id": 3}))
    assert found["item"] == [[3 if i == 13 else usual(i)] for i in range(30)]
    assert found.counters == {"item.out_of_range": 1}
    found = read(tmp_path, schema(item={"ids": "hash", "table": "h"}, past={"table": "h"}, kinds={"table": "h"}))
    assert found["item"][13] == rows_from_hashes(hash_ids(pa.array([value], "uint64")), H_ROWS).tolist()
    assert found["item"][0] == rows_from_hashes(hash_ids(pa.array([1], "int8")), H_ROWS).tolist()


# Values


@pytest.mark.parametrize("kind", ["int32", "int64", "uint16"])
def test_d06_a_null_id_is_the_missing_id_or_an_error_or_drops_the_row(kind, tmp_path):
    column, usual = with_value(7, None, kind, lambda i: 1 + i), lambda i: [1 + i]
    check_policies(tmp_path, 7, column, "item", "on_null", "null", usual, "is null")
    assert read(tmp_path)["item"] == [[] if i == 7 else usual(i) for i in range(30)]  # by default: no id
    found = read(tmp_path, schema(item={"missing_id": 2}))
    assert found["item"] == [[2] if i == 7 else usual(i) for i in range(30)] and found.counters == {"item.null": 1}


def test_d06_a_null_string_takes_row_0_of_a_hashed_table(tmp_path):
    column = with_value(7, None, "string", str)
    write(tmp_path / "a.parquet", log(user=column))
    found = read(tmp_path)
    assert found["user"][7] == [0] and [0] not in found["user"][:7] + found["user"][8:]
    assert found.counters == {"user.null": 1}
    assert read(tmp_path, schema(user={"missing_id": 9}))["user"][7] == [9]
    refusal(
        lambda: read(tmp_path, schema(user={"on_null": "error"})), in_row(7), "'user'", "is null", "on_null", "mend"
    )
    assert_dropped(read(tmp_path, schema(user={"on_null": "drop"})), [7])


BIG_IDS = 2**53 + 1


def test_d06_nulls_do_not_cost_precision(tmp_path):
    """A nullable int64 column becomes floating point in pandas: 2^53 + 1 would be 2^53."""
    write(tmp_path / "a.parquet", log(user=with_value(7, None, "int64", lambda i: BIG_IDS + i)))
    expected = rows_from_hashes(hash_ids(pa.array(range(BIG_IDS, BIG_IDS + 30))), H_ROWS).tolist()
    assert read(tmp_path)["user"] == [[0] if i == 7 else [expected[i]] for i in range(30)]


@pytest.mark.parametrize("value", [None, 2.0, -1.0, 0.5, math.nan, math.inf], ids=str)
def test_d07_d08_a_label_that_is_null_or_neither_0_nor_1_is_an_error_or_drops_the_row(value, tmp_path):
    """D7: null; D8: 2, -1, 0.5, NaN, infinite."""
    write(tmp_path / "a.parquet", log(label=with_value(25, value, "float64", lambda i: float(i % 2))))
    shown = "null" if value is None else f"{value:g}"
    refusal(lambda: read(tmp_path), in_row(25), f"label 'label' is {shown}", "0 or 1", "schema.on_bad_label", "mend")
    found = read(tmp_path, schema(on_bad_label="drop"))
    assert_dropped(found, [25])
    assert found.counters["rows.dropped"] == 1
    assert [found["label"][i] for i in range(30) if i != 25] == [i % 2 for i in range(30) if i != 25]


def test_d07_a_batch_and_a_block_of_bad_labels_keep_the_number_of_steps(tmp_path):
    bad = range(8, 24)  # two whole batches
    write(tmp_path / "a.parquet", log(label=pa.array([None if i in bad else i % 2 for i in range(30)], "int8")))
    found = read(tmp_path, schema(on_bad_label="drop"))
    assert_dropped(found, bad)
    assert [batch.normalizer.item() for batch in found.batches] == [8, 0, 0, 6]
    assert found.counters["rows.dropped"] == 16
    for options in ({"shards": 4, "shuffle": True}, {"shuffle": True, "threads": 2}):
        again = read(tmp_path, schema(on_bad_label="drop"), **options)
        assert len(again.batches) == 4 and again.counters == found.counters
        assert sorted(row["row"] for row in again.rows if row["weight"]) == [i for i in range(30) if i not in bad]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300], ids=str)
def test_d09_a_number_that_is_not_finite_is_an_error_or_filled_or_drops_the_row(value, tmp_path):
    write(tmp_path / "a.parquet", log(price=with_value(19, value, "float64", float)))
    shown = f"{np.float64(value).astype(np.float32):g}" if value != 1e300 else "inf"
    says = (in_row(19), "dense feature 'price'", f"is {shown}", "mend")
    refusal(lambda: read(tmp_path), *says, "schema.features.price.fill")  # 'missing' without a fill
    refusal(lambda: read(tmp_path, schema(price={"on_non_finite": "error", "fill": 1.0})), *says, "on_non_finite")
    found = read(tmp_path, schema(price={"fill": -2.5}))
    assert found["price"] == [-2.5 if i == 19 else i for i in range(30)] and found.counters == {"price.non_finite": 1}
    for given in (
        {"on_non_finite": "drop"},
        {"on_non_finite": "drop", "fill": 1.0},
        {"on_non_finite": "drop", "log1p": True},
    ):
        found = read(tmp_path, schema(price=given))
        assert_dropped(found, [19])
        assert found.counters == {"price.non_finite": 1, "rows.dropped": 1}


def test_d09_a_null_number_is_an_error_or_filled_or_drops_the_row(tmp_path):
    write(tmp_path / "a.parquet", log(price=with_value(19, None, "int32", int)))
    says = (in_row(19), "dense feature 'price'", "is null", "mend")
    refusal(lambda: read(tmp_path), *says, "schema.features.price.fill")
    refusal(lambda: read(tmp_path, schema(price={"on_null": "error", "fill": 1.0})), *says, "on_null")
    found = read(tmp_path, schema(price={"fill": -2.5}))
    assert found["price"] == [-2.5 if i == 19 else i for i in range(30)] and found.counters == {"price.null": 1}
    found = read(tmp_path, schema(price={"on_null": "drop"}))
    assert_dropped(found, [19])
    assert found.counters == {"price.null": 1, "rows.dropped": 1}


NEGATIVE = [-1, -5, -(2**31), -(2**63)]
TOO_LARGE = [T_ROWS, T_ROWS + 1, 2**31, 2**32 + 3, 10**12, 2**63 - 1]


@pytest.mark.parametrize("value", [*NEGATIVE, *TOO_LARGE])
def test_d10_d11_an_id_outside_its_table_is_an_error_or_the_missing_id_or_drops_the_row(value, tmp_path):
    """D10: negative; D11: the table's number of rows and beyond."""
    usual = lambda i: 1 + i % 40  # noqa: E731
    column = with_value(22, value, "int64", usual)
    check_policies(
        tmp_path,
        22,
        column,
        "item",
        "on_out_of_range",
        "out_of_range",
        lambda i: [usual(i)],
        f"has id {value}, but table 't' has rows 0 … 49",
    )
    refusal(lambda: read(tmp_path), "raise schema.tables.t.num_embeddings", "'ids: hash'")  # the default
    for missing, expected in ((None, []), (3, [3])):
        found = read(tmp_path, schema(item={"on_out_of_range": "missing", "missing_id": missing}))
        assert found["item"] == [expected if i == 22 else [usual(i)] for i in range(30)]
        assert found.counters == {"item.out_of_range": 1}
    lists = pa.array([[1, value, 2] if i == 22 else [] for i in range(30)], pa.list_(pa.int64()))
    given = {"on_out_of_range": "missing"}
    write(tmp_path / "a.parquet", log(past=lists, kinds=None))
    assert read(tmp_path, schema(past=given, drop=("kinds",)))["past"][22] == [1, 2]
    assert read(tmp_path, schema(past={**given, "missing_id": 7}, drop=("kinds",)))["past"][22] == [1, 7, 2]
    assert_dropped(read(tmp_path, schema(past={"on_out_of_range": "drop"}, drop=("kinds",))), [22])
    refusal(lambda: read(tmp_path, schema(drop=("kinds",))), in_row(22), "'past'", f"has id {value}")


# Files


def footer_size(data):
    """The footer, its length and the magic at the end."""
    return int.from_bytes(data[-8:-4], "little") + 8


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "has 0 bytes"),
        (lambda data: data[:-20], "cannot be read as Parquet"),
        (lambda data: data[: len(data) // 2], "cannot be read as Parquet"),
        (lambda data: b"not Parquet at all, but text", "cannot be read as Parquet"),
        (lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1", "cannot be read as Parquet"),
        (
            lambda data: data[: -footer_size(data)] + bytes(footer_size(data) - 8) + data[-8:],
            "cannot be read as Parquet",
        ),
    ],
    ids=["D12 empty", "D13 cut", "D13 half", "D13 text", "D13 length", "D13 zeros in the footer"],
)
def test_d12_d13_an_empty_cut_or_junk_file_is_named_before_any_row(damage, says, tmp_path):
    data = write(tmp_path / "good.parquet", log()).read_bytes()
    (tmp_path / "bad.parquet").write_bytes(damage(data))
    refusal(lambda: loader(tmp_path), "bad.parquet'", says, "write it again")


def page_of(path, column):
    """Where a data page of the second row group lies."""
    footer = pq.read_metadata(path)
    chunk = footer.row_group(1).column(footer.schema.names.index(column))
    return chunk.data_page_offset, chunk.total_compressed_size


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_d14_a_flipped_bit_is_found_where_pages_have_checksums(version, tmp_path):
    options = {
        "write_page_checksum": True,
        "data_page_version": version,
        "compression": "none",
        "use_dictionary": False,
    }
    path = write(tmp_path / "a.parquet", log(), **options)
    expected = read(tmp_path).rows
    start, size = page_of(path, "item")
    data = bytearray(path.read_bytes())
    data[start + size - 8] ^= 1  # the last value of the page, as good an id as it was
    path.write_bytes(data)
    refusal(lambda: read(tmp_path), "a.parquet', row group 1: ", "checksum", "write it again")
    data[start + size - 8] ^= 1
    path.write_bytes(data)
    assert read(tmp_path).rows == expected


def write_row_groups(path, table, sizes):
    """Row groups of these numbers of rows, 0 among them."""
    with pq.ParquetWriter(path, table.schema) as writer:
        start = 0
        for size in sizes:
            writer.write_table(table.slice(start, size))
            start += size
    assert [pq.read_metadata(path).row_group(i).num_rows for i in range(len(sizes))] == list(sizes)


@pytest.mark.parametrize("shuffle", [True, False])
def test_d15_files_and_row_groups_without_rows_change_nothing(shuffle, tmp_path):
    full, holes = tmp_path / "full", tmp_path / "holes"
    full.mkdir()
    holes.mkdir()
    write_row_groups(full / "a.parquet", log(), [10, 20])
    write_row_groups(full / "b.parquet", log(first=30), [30])
    write_row_groups(holes / "a.parquet", log(), [0, 10, 0, 0, 20, 0])
    write_row_groups(holes / "aa.parquet", log().slice(0, 0), [0])
    write_row_groups(holes / "b.parquet", log(first=30), [30, 0])
    pq.write_table(log().slice(0, 0), holes / "c.parquet")  # no row groups
    with pq.ParquetWriter(holes / "d.parquet", log().schema):
        pass
    options = {"shuffle": shuffle, "shards": 4, "threads": 2}
    expected, found = read(full, **options), read(holes, **options)
    assert sorted(found["row"]) == list(range(60)) == sorted(expected["row"])
    if not shuffle:  # with it the order may differ: row groups are permuted by their number
        assert found.rows == expected.rows
    assert [batch.cursor.local_rows for batch in found.batches] == [8] * 7 + [4]


def test_d16_no_rows_at_all_and_paths_without_files(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "none" / "a.parquet", log().slice(0, 0))
    write(tmp_path / "none" / "b.parquet", log().slice(0, 0))
    for path, parts in (
        ("none", ["no rows in 'none'", "2 files", "check"]),
        ("absent-*.parquet", ["matches no file", "absent-*.parquet", "check"]),
        ("absent.parquet", ["does not exist", "absent.parquet", "check"]),
        ("empty", ["no *.parquet file", "empty", "check"]),
    ):
        refusal(lambda path=path: loader(tmp_path, paths=[path]), *parts)


def test_d17_one_row_is_one_padded_step(tmp_path):
    write(tmp_path / "a.parquet", log(1, first=3))
    for options in ({}, {"shuffle": True, "shards": 4}):
        found = read(tmp_path, **options)
        assert found["row"] == [3.0] and found["weight"] == [1.0]
        (batch,) = found.batches
        assert len(batch.labels) == 8 and batch.normalizer.item() == 1 and batch.cursor.rows == 1


def unequal(root):
    """One big file and two tiny ones."""
    for name, first, rows in (("a", 0, 1), ("b", 1, 400), ("c", 401, 2)):
        write(root / f"{name}.parquet", log(rows, first=first), row_group_size=70)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_d18_unequal_files_are_shared_evenly_by_the_ledger(world_size, shuffle, tmp_path):
    unequal(tmp_path)
    given = schema()
    batches = []
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "shards": 6, "batch_size": 24, "record_origin": True}
        batches.append(list(loader(tmp_path, given, shuffle=shuffle, **options).epoch(2)))
    assert {len(found) for found in batches} == {-(-403 // 24)}
    ledger = []
    for together in zip(*batches):
        assert {batch.cursor.rows for batch in together} == {sum(batch.cursor.local_rows for batch in together)}
        for batch in together:
            origin = batch.cursor.origin
            assert origin.dtype == np.int64 and len(origin) == batch.cursor.local_rows
            assert origin.tolist() == [int(row["row"]) for row in rows_of(batch, given)]
            ledger += origin.tolist()
    assert sorted(ledger) == list(range(403))


def many_files(root, files=40):
    for number in range(files):
        write(root / f"{number:02}.parquet", log(8, first=8 * number))


def test_d19_a_file_deleted_in_mid_epoch_is_named_and_nothing_is_lost_once_it_is_back(tmp_path):
    many_files(tmp_path)
    expected = read(tmp_path)
    one = loader(tmp_path)
    batches = one.epoch(0)
    taken = [next(batches) for _ in range(2)]
    victim = tmp_path / "30.parquet"
    away = victim.rename(tmp_path / "away")
    with pytest.raises(StorageError) as caught:
        for batch in batches:
            taken.append(batch)
    told(str(caught.value), "30.parquet', row group 0", "No such file")
    assert 2 < len(taken) <= 30
    away.rename(victim)
    taken += one.epoch(0, taken[-1].cursor.step)
    assert [row for batch in taken for row in rows_of(batch, schema())] == expected.rows


def test_d20_a_file_replaced_in_mid_epoch_is_named(tmp_path):
    many_files(tmp_path)
    one = loader(tmp_path)
    batches = one.epoch(0)
    next(batches)
    write(tmp_path / "30.parquet", log(9, first=1000))
    with pytest.raises(ValueError) as caught:
        list(batches)
    told(str(caught.value), "30.parquet' has changed since it was scanned", "restore the file")


def test_d20_d21_a_manifest_tells_what_changed_since_a_saved_one(tmp_path):
    """D20: a file rewritten or missing; D21: one added. What a run does then: tests/trainer/run/test_training_files.py."""
    columns = log().column_names
    for name in "abc":
        write(tmp_path / f"{name}.parquet", log())
    saved = Manifest.scan(["."], str(tmp_path), columns)
    assert not any((found := saved.changes(saved)).missing + found.changed + found.added)
    saved = Manifest.from_dict(json.loads(json.dumps(saved.to_dict())), str(tmp_path))
    write(tmp_path / "a.parquet", log(item=pa.array([7] * 30)))  # as many rows
    (tmp_path / "b.parquet").unlink()
    write(tmp_path / "d.parquet", log())
    present = Manifest.scan(["."], str(tmp_path), columns)
    changes = present.changes(saved)
    assert [list(part) for part in (changes.missing, changes.changed, changes.added)] == [
        ["b.parquet"],
        ["a.parquet"],
        ["d.parquet"],
    ]
    assert present.fingerprint != saved.fingerprint
    old = present.select(["c.parquet"])
    assert [old.relative(file) for file in old.files] == ["c.parquet"]


def test_d22_a_column_that_is_there_twice_is_named(tmp_path):
    table = log()
    twice = pa.Table.from_arrays([*table.columns, table["item"]], names=[*table.column_names, "item"])
    write(tmp_path / "a.parquet", twice)
    refusal(lambda: loader(tmp_path), "a.parquet' has more than one column named 'item'", "rename")
    assert len(read(tmp_path, schema(drop=("item", "past", "kinds"))).rows) == 30  # it matters to who reads it only


VARIANTS = [
    {"compression": "snappy", "use_dictionary": True, "row_group_size": 7},
    {"compression": "zstd", "use_dictionary": False, "row_group_size": 100},
    {"compression": "none", "use_dictionary": True, "row_group_size": 64, "data_page_version": "2.0"},
    {"compression": "gzip", "use_dictionary": ["user"], "row_group_size": 1, "data_page_size": 16},
    {"compression": "lz4", "use_dictionary": False, "version": "1.0", "row_group_size": 33},
    {
        "compression": "brotli",
        "use_dictionary": False,
        "data_page_version": "2.0",
        "column_encoding": {
            "item": "DELTA_BINARY_PACKED",
            "user": "DELTA_BYTE_ARRAY",
            "price": "BYTE_STREAM_SPLIT",
            "row": "BYTE_STREAM_SPLIT",
        },
    },
    {"compression": "snappy", "use_dictionary": False, "column_encoding": {"user": "DELTA_LENGTH_BYTE_ARRAY"}},
    {"compression": {"item": "zstd", "user": "snappy"}, "write_statistics": False, "store_schema": False},
]


def test_d23_codecs_encodings_and_row_group_sizes_do_not_change_the_stream(tmp_path):
    uniform, mixed = tmp_path / "uniform", tmp_path / "mixed"
    for number, options in enumerate(VARIANTS):
        table = log(90, first=90 * number)
        write(uniform / f"{number}.parquet", table, row_group_size=30)
        write(mixed / f"{number}.parquet", table, **options)
    assert read(mixed).rows == read(uniform).rows
    assert sorted(read(mixed, shuffle=True, shards=4)["row"]) == list(range(90 * len(VARIANTS)))
    shutil.rmtree(mixed)  # the same row groups: the same shuffled stream as well
    for number, options in enumerate(VARIANTS):
        write(mixed / f"{number}.parquet", log(90, first=90 * number), **{**options, "row_group_size": 30})
    for options in ({"shuffle": True}, {"shuffle": True, "shards": 4, "threads": 2}):
        assert read(mixed, **options).rows == read(uniform, **options).rows


NAMES = ["größe (m²)", "a b", "a.b", "a", "日本語", "geo.city", "x/y", "100%", "'quoted'", "Ω ω.ω", "list.element"]


def test_d24_names_of_every_kind_and_children_of_structs(tmp_path):
    columns = {name: pa.array([f"{name} {i}" for i in range(30)]) for name in NAMES if name != "geo.city"}
    cities = [f"city {i % 5}" if i % 6 else None for i in range(30)]
    geo = [None if i == 9 else {"city": cities[i], "lat": float(i), "tags": [1] * (i % 3)} for i in range(30)]
    write(tmp_path / "a.parquet", log(**columns, geo=pa.array(geo)))
    features = {f"{name}!": Feature("sparse", column=name, table="h", ids="hash") for name in NAMES}
    features |= {
        "geo.lat": Feature("dense", fill=-1.0),
        "geo.tags": Feature("sparse", table="t"),
    }
    given = Schema(
        tables={"h": Table(1 << 30), "t": Table(T_ROWS)},
        features=features,
        crosses={"city × a.b": Cross(["geo.city!", "a.b!"], 1 << 30)},
    )
    found = read(tmp_path, given)
    for name, array in (
        *columns.items(),
        ("geo.city", pa.array([c if i != 9 else None for i, c in enumerate(cities)])),
    ):
        expected = rows_from_hashes(hash_ids(array), 1 << 30).tolist()
        assert found[f"{name}!"] == [[0 if array[i].as_py() is None else expected[i]] for i in range(30)]
    assert found["geo.lat"] == [-1.0 if i == 9 else i for i in range(30)]
    assert found["geo.tags"] == [[] if i == 9 else [1] * (i % 3) for i in range(30)]
    assert [row == [0] for row in found["city × a.b"]] == [i % 6 == 0 or i == 9 for i in range(30)]
    lacks = Schema(features={"geo.lot": Feature("dense")})
    refusal(lambda: loader(tmp_path, lacks), "a.parquet' lacks 1 column(s): 'geo.lot'")


# Lists


def one_list(root, values, kind=None, **options):
    """A sparse feature of lists: the ids of each row, and the counters."""
    lists = pa.array(values, kind or pa.list_(pa.int64()))
    write(root / "a.parquet", pa.table({"label": pa.array([0] * len(lists), "int8"), "f": lists}))
    given = Schema(
        tables={"t": Table(T_ROWS), "h": Table(H_ROWS)},
        features={"f": Feature(**{"kind": "sparse", "table": "t", **options})},
    )
    found = read(root, given)
    return found["f"], found.counters


LISTS = [[1, 2], None, [], [3, None, 4], [None], [5]]


def test_d25_null_lists_empty_lists_and_null_elements(tmp_path):
    assert one_list(tmp_path, LISTS) == ([[1, 2], [], [], [3, 4], [], [5]], {"f.null": 3})
    assert one_list(tmp_path, LISTS, missing_id=7) == ([[1, 2], [], [], [3, 7, 4], [7], [5]], {"f.null": 3})
    hashed = lambda i: 0 if i is None else int(rows_from_hashes(hash_ids(pa.array([i])), H_ROWS)[0])  # noqa: E731
    expected = [[hashed(i) for i in row or []] for row in LISTS]
    assert one_list(tmp_path, LISTS, table="h", ids="hash") == (expected, {"f.null": 3})
    refusal(
        lambda: one_list(tmp_path, LISTS, on_null="error"), in_row(1), "'f'", "is null", "schema.features.f.on_null"
    )
    refusal(lambda: one_list(tmp_path, LISTS[2:], on_null="error"), in_row(1), "'f'", "is null", "on_null")
    found, counters = one_list(tmp_path, LISTS, on_null="drop")
    assert found == [[1, 2], [], [], [], [], [5]] and counters == {"f.null": 3, "rows.dropped": 3}


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_binary(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_d25_an_empty_string_in_a_list_is_a_null_and_text_is_no_bag(kind, tmp_path):
    values = ["a", "", None, "b", ""]
    given = schema(user={"max_length": 3})
    child = pa.array(values * 6, pa.string()).cast(kind) if not pa.types.is_dictionary(kind) else pa.array(values * 6)
    child = child.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else child
    write(tmp_path / "a.parquet", log(user=pa.ListArray.from_arrays(range(31), child)))
    found = read(tmp_path, given)
    a, b = rows_from_hashes(hash_ids(pa.array(["a", "b"])), H_ROWS).tolist()
    assert found["user"] == [[a], [0], [0], [b], [0]] * 6 and found.counters["user.null"] == 18
    write(tmp_path / "text" / "a.parquet", log())
    with pytest.raises(
        ValueError, match=r"'user' is a bag \(max_length\): column 'user' has type string, .*string_split"
    ):
        read(tmp_path / "text", given)


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.JSON", "sub/log.tsv"])
def test_d13_text_as_training_data_points_to_the_preparation(name, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / name).write_text("user,item\n" * 20)
    for path in (name, str((tmp_path / name).parent)):
        with pytest.raises(ValueError, match="make Parquet of CSV and JSON with clicktrainer prepare"):
            read(tmp_path, paths=[path])


def test_d26_histories_of_unequal_length_name_the_row(tmp_path):
    kinds = pa.array([[1] * (i % 4 + (i == 23)) for i in range(30)])
    write(tmp_path / "a.parquet", log(kinds=kinds))
    message = refusal(
        lambda: read(tmp_path), in_row(23), "'past'", "'kinds'", "have 3 and 4 ids", "lists of equal length"
    )
    assert "belong to one history" in message
    # Of two histories they may differ; and beyond what is kept, a history's members are cut alike.
    assert len(read(tmp_path, schema(kinds={"history": "other"})).rows) == 30
    refusal(
        lambda: loader(tmp_path, schema(kinds={"max_length": 4})),
        "schema.features.past.max_length is 5",
        "that of",
        "4",
    )


def test_d26_a_dropped_row_drops_all_of_its_history(tmp_path):
    past = pa.array([[99 if i == 23 else 1] * (i % 4) for i in range(30)])
    write(tmp_path / "a.parquet", log(past=past))
    assert_dropped(read(tmp_path, schema(past={"on_out_of_range": "drop"})), [23])
    refusal(
        lambda: read(tmp_path, schema(past={"on_out_of_range": "missing"})), in_row(23), "'past'", "missing_id", "shift"
    )
    found = read(tmp_path, schema(past={"on_out_of_range": "missing", "missing_id": 6}))
    assert found["past"][23] == [6, 6, 6] and found["kinds"][23] == [0, 1, 2]


def test_d27_a_history_of_a_million_keeps_the_most_recent(tmp_path):
    values = [[1], list(range(10)) * 100_000 + [41, 42, 43], [2, 3]]
    kept = [[1], [8, 9, 41, 42, 43], [2, 3]]
    for kind in (pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_view(pa.int64())):
        assert one_list(tmp_path, values, kind, max_length=5) == (kept, {"f.truncated": 1})
    write(tmp_path / "a.parquet", log(3, past=pa.array(values), kinds=pa.array([[i // 9 for i in v] for v in values])))
    found = read(tmp_path)
    assert found["past"] == kept and found["kinds"] == [[i // 9 for i in row] for row in kept]
    assert found.counters == {"past.truncated": 1, "kinds.truncated": 1}


def test_d28_no_history_in_any_row(tmp_path):
    for kind in (pa.list_(pa.int64()), pa.null()):
        for value in ([], None) if kind != pa.null() else (None,):
            lists = pa.array([value] * 30, kind)
            write(tmp_path / "a.parquet", log(past=lists, kinds=lists))
            found = read(tmp_path)
            assert found["past"] == found["kinds"] == [[]] * 30 and found["item"] == [[1 + i] for i in range(30)]
            assert found.counters == ({} if value == [] else {"past.null": 30, "kinds.null": 30})


# D29: any slice and any chunks of any type equal a reading of to_pylist


TEXTS = ["", "a", "b\0", "word", "a longer text, of more than eight bytes", "é€"]
DATA = [text.encode() for text in TEXTS]
CHOICES = [
    *((kind, [0, 1, 49]) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())),
    *((kind, [0, 3, 49]) for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())),
    (pa.bool_(), [True, False]),
    *((kind, TEXTS) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *((kind, DATA) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    (pa.binary(2), [b"ab", b"\0\0"]),
]


def random_column(rng):
    """(element type, kind of list or None, ``rows -> array``)."""
    element, values = rng.choice(CHOICES)
    container = rng.choice([None, None, pa.list_, pa.large_list, pa.list_view, pa.large_list_view, "fixed"])
    encode = rng.random() < 0.3

    def maybe(value):
        return None if rng.random() < 0.2 else value

    def flat(count):
        array = pa.array([maybe(rng.choice(values)) for _ in range(count)], element)
        return dictionary(array) if encode else array

    def make(rows):
        if container is None:
            return flat(rows)
        mask = pa.array([rng.random() < 0.2 for _ in range(rows)], pa.bool_())
        if container == "fixed":
            return pa.FixedSizeListArray.from_arrays(flat(3 * rows), 3, mask=mask)
        lengths = [rng.randrange(6) for _ in range(rows)]
        ends = np.cumsum([0, *lengths])
        kind = type(pa.array([], container(pa.int8())))
        width = pa.int64() if "Large" in kind.__name__ else pa.int32()
        if "View" in kind.__name__:
            return kind.from_arrays(
                pa.array(ends[:-1], width), pa.array(lengths, width), flat(int(ends[-1])), mask=mask
            )
        return kind.from_arrays(pa.array(ends, width), flat(int(ends[-1])), mask=mask)

    return element, container, make


def dictionary(array):
    values = list(dict.fromkeys(value for value in array.to_pylist() if value is not None))
    places = [None if value is None else values.index(value) for value in array.to_pylist()]
    return pa.DictionaryArray.from_arrays(pa.array(places, pa.int16()), pa.array(values, array.type))


def by_hand(value, is_list, feature):
    """The ids of one row, straight from Python values."""
    if is_list:
        value = [] if value is None else value[-feature.max_length :] if feature.max_length else value
    missing = feature.missing_id if feature.missing_id is not None else (0 if feature.ids == "hash" else None)
    ids = [
        missing
        if item is None or is_list and item in ("", b"")
        else hashed_id(item)
        if feature.ids == "hash"
        else int(item)
        for item in (value if is_list else [value])
    ]
    return [i for i in ids if i is not None]


def hashed_id(item):
    array = pa.array([int(item)]) if isinstance(item, (bool, int)) else pa.array([item])
    return int(rows_from_hashes(hash_ids(array), H_ROWS)[0])


@pytest.mark.parametrize("seed", range(60))
def test_d29_slices_and_chunks_equal_a_reading_by_hand(seed):
    rng = random.Random(seed)
    rows = rng.randrange(1, 60)
    element, container, make = random_column(rng)
    pieces = []
    for array in (make(rows) for _ in range(3)):
        start = rng.randrange(rows)
        pieces.append(array.slice(start, rng.randrange(rows - start + 1)))
    column = pa.chunked_array(pieces, pieces[0].type)
    start = rng.randrange(len(column) + 1)
    column = column.slice(start, rng.randrange(len(column) - start + 1))
    hash_only = not (pa.types.is_integer(element) or pa.types.is_boolean(element))
    feature = Feature(
        "sparse",
        table="h",
        ids="hash" if hash_only or rng.random() < 0.5 else "identity",
        max_length=rng.choice([None, 2]) if container else None,
        missing_id=rng.choice([None, 5]),
    )
    given = Schema(tables={"h": Table(H_ROWS)}, features={"f": feature})
    decoder = Decoder(given, given.layout(), {"label": pa.int8(), "f": column.type}, Counters())
    found = decoder([pa.table({"label": pa.array([0] * len(column), "int8"), "f": column})], len(column))
    slot = decoder.slots["f"]
    if slot.bag:
        bags = found.bags[slot.index]
        ids = [bags.values[a:b].tolist() for a, b in zip(bags.offsets[:-1], bags.offsets[1:])]
    else:
        ids = [[i] if i >= 0 else [] for i in found.ids[slot.index].tolist()]
    assert ids == [by_hand(value, bool(container), feature) for value in column.to_pylist()], (column.type, feature)


PLAIN = {
    "a": {"kind": "sparse", "table": "t"},
    "b": {"kind": "sparse", "table": "t", "missing_id": 3},
    "again": {"kind": "sparse", "table": "small", "column": "a"},
    "n": {"kind": "dense", "fill": -1.0},
    "x": {"kind": "dense", "fill": -2.0},
    "y": {"kind": "dense", "fill": -3.0, "log1p": True},
}


def plain_table(rng, rows, kinds, badness):
    """Numbers only, of one or two types; with a chance of ``badness`` null, NaN, infinite or out of range."""

    def column(kind, good, bad):
        values = [rng.choice([None, *bad]) if rng.random() < badness else rng.choice(good) for _ in range(rows)]
        return pa.array(values, kind)

    integer, floating = kinds
    ids = {name: column(integer, [0, 1, 19, 49], [50, 120, 127]) for name in ("a", "b")}
    numbers = {name: column(floating, [0.5, 4.0], [math.nan, math.inf, -math.inf]) for name in "xy"}
    return pa.table({"label": column(integer, [0, 1], [2, 77]), "n": column(integer, [5, 6], []), **ids, **numbers})


def plain_row(row, given):
    """What one row means by ``PLAIN`` and the policies; None: it is left out."""
    found, policies = {"label": row["label"]}, set()
    if row["label"] not in (0, 1):
        policies.add("drop")
    for name, feature in given.features.items():
        value = row[feature.column or name]
        wrong = "null" if value is None else None
        if feature.kind == "dense":
            wrong = wrong or (None if math.isfinite(value) else "non_finite")
            value = feature.fill if wrong else value
            found[name] = np.float32(math.log1p(max(value, 0)) if feature.log1p else value)
        else:
            wrong = wrong or (None if value < given.num_embeddings(name) else "out_of_range")
            found[name] = (NO_ID if feature.missing_id is None else feature.missing_id) if wrong else value
        policies |= {getattr(feature, f"on_{wrong}")} if wrong else set()
    return None if "drop" in policies else found


@pytest.mark.parametrize("seed", range(90))
def test_d29_tables_of_plain_numbers_equal_a_reading_by_hand(seed):
    """Several columns of one type are decoded together; not where that would be wrong."""
    rng = random.Random(seed)
    kinds = (pa.int64(), pa.int32(), pa.int8(), pa.uint8(), pa.uint64()), (pa.float64(), pa.float32(), pa.float16())
    tables = []
    for _ in range(rng.randrange(1, 5)):
        chosen = tuple(map(rng.choice, kinds))
        sizes = (rng.choice([1, 7, 40, 3000]) for _ in range(rng.randrange(1, 4)))
        badness = rng.choice([0, 0, 0.001, 0.2])
        whole = pa.concat_tables([plain_table(rng, size, chosen, badness) for size in sizes])
        start = rng.randrange(whole.num_rows)
        tables.append(whole.slice(start, rng.randrange(whole.num_rows - start + 1)))
    policies = {f"on_{what}": rng.choice(["missing", "drop"]) for what in ("null", "non_finite", "out_of_range")}
    features = {name: Feature(**feature, **policies) for name, feature in PLAIN.items()}
    given = Schema("label", "drop", tables={"t": Table(T_ROWS), "small": Table(20)}, features=features)
    raw = sum((table.to_pylist() for table in tables), [])
    decoder = Decoder(given, given.layout(), {field.name: field.type for field in tables[0].schema}, Counters())
    found = decoder(tables, len(raw))
    lines = {name: found.ids[slot.index] for name, slot in decoder.slots.items()}
    lines |= dict(zip((*given.dense, "label"), found.numbers))
    dropped = np.zeros(len(raw), bool) if found.dropped is None else found.dropped
    for i, row in enumerate(raw):
        expected = plain_row(row, given)
        assert dropped[i] == (expected is None)
        for name, value in (expected or {}).items():
            assert lines[name][i] == pytest.approx(value, rel=1e-6), (name, i, row)


@pytest.mark.parametrize("ids", ["identity", "hash"])
def test_d30_every_type_of_list_gives_equal_results(ids, tmp_path):
    pairs = [[i % 40, (i * 7) % 40] for i in range(12)]
    given = {"ids": ids, "table": "h", "max_length": 5}
    expected = one_list(tmp_path, pairs, **given)
    integers = (pa.int8(), pa.int32(), pa.int64(), pa.uint8(), pa.uint64(), pa.dictionary(pa.int16(), pa.int64()))
    containers = (pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda element: pa.list_(element, 2))
    for element in integers:
        for container in containers:
            if not (pa.types.is_dictionary(element) and "view" in str(container(element))):
                assert one_list(tmp_path, pairs, container(element), **given) == expected, (element, container)
    texts = [[str(i) for i in pair] for pair in pairs]
    if ids == "hash":
        strings = one_list(tmp_path, texts, pa.list_(pa.string()), **given)
        elements = (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()))
        for element in (*elements, pa.binary(), pa.large_binary(), pa.binary_view()):
            values = [[t.encode() for t in row] for row in texts] if "binary" in str(element) else texts
            for container in containers:
                if not (pa.types.is_dictionary(element) and "view" in str(container(element))):
                    assert one_list(tmp_path, values, container(element), **given) == strings, (element, container)
    else:
        for kind in (
            pa.list_(pa.string()),
            pa.list_(pa.float64()),
            pa.list_(pa.list_(pa.int64())),
            pa.map_(pa.string(), pa.int64()),
        ):
            values = [None] * 12
            refusal(
                lambda kind=kind, values=values: one_list(tmp_path, values, kind, **given),
                "column 'f' has type",
                "expected integers",
            )


@contextlib.contextmanager
def powerless():
    """Root may read everything: as someone else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_d31_an_unreadable_file_or_a_folder_or_dead_link_in_its_place_is_named(tmp_path):
    with tempfile.TemporaryDirectory() as name:  # below tmp_path, another user sees nothing at all
        root = Path(name)
        root.chmod(0o755)
        write(root / "a.parquet", log())
        write(root / "b.parquet", log()).chmod(0)
        with powerless():
            refusal(lambda: loader(root), "b.parquet'", "ermission", "take it away")
    write(tmp_path / "good.parquet", log())
    (tmp_path / "folder.parquet").mkdir()
    refusal(
        lambda: loader(tmp_path, paths=["good.parquet", "folder.parquet"]),
        "folder.parquet'",
        "no *.parquet file",
        "check",
    )
    (tmp_path / "link.parquet").symlink_to(tmp_path / "nowhere")
    refusal(lambda: loader(tmp_path, paths=["*.parquet"]), "link.parquet'")
    refusal(lambda: loader(tmp_path, paths=["."]), "link.parquet'")


@pytest.fixture
def pauses(monkeypatch):
    """The seconds slept, which nobody waits for here."""
    found = []
    monkeypatch.setattr("data_loaders.storage.time.sleep", found.append)
    yield found
    for operation in ("open", "read"):
        Flaky.fail(operation, 0)


def test_d32_storage_that_fails_twice_is_asked_again(tmp_path, pauses):
    write(tmp_path / "a.parquet", log())
    expected = read(tmp_path).rows
    Flaky.fail("read", 2)  # of the footer
    one = loader(f"flaky://{tmp_path}")
    assert len(pauses) == 2 and 0 < pauses[0] < pauses[1]
    for operation in ("open", "read"):  # of rows
        Flaky.fail(operation, 2)
        assert [row for batch in one.epoch(0) for row in rows_of(batch, schema())] == expected
        one = loader(f"flaky://{tmp_path}")
    assert len(pauses) == 6


def test_d32_storage_that_keeps_failing_is_a_retryable_error(tmp_path, pauses):
    write(tmp_path / "a.parquet", log())
    one = loader(f"flaky://{tmp_path}")
    Flaky.fail("read", 10**9)
    for action in (lambda: list(one.epoch(0)), lambda: loader(f"flaky://{tmp_path}")):
        pauses.clear()
        with pytest.raises(StorageError) as caught:
            action()
        told(str(caught.value), "a.parquet", "Input/output error", "again")
        assert 1 < len(pauses) < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
