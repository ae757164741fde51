"""Row groups come whole, once and in the columns asked for, whatever the file is like and however its storage fails."""

import logging
import os

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_loaders import storage
from data_loaders.loader import Loader
from data_loaders.manifest import Manifest
from data_loaders.reader import Handle, RowGroups
from data_loaders.schema import Cross, Feature, Schema, Table
from data_loaders.storage import StorageError
from tests.helpers.flaky import Flaky


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.0)
    Flaky.failures.clear()


def write(path, table, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **{"row_group_size": 500, **options})
    return path


def row_groups(root, columns, hashed=()):
    return RowGroups(Manifest.scan(["."], str(root), columns), list(columns), set(hashed))


def read(groups, rows=64, handle=None):
    """Everything, through one handle; dictionaries decoded."""
    handle = handle or Handle()
    tables = [table for number in range(groups.count) for table in groups.read(number, rows, handle)]
    assert all(0 < table.num_rows <= rows for table in tables)
    names = tables[0].column_names
    assert {tuple(table.column_names) for table in tables} == {tuple(names)}
    return {name: [value for table in tables for value in table[name].to_pylist()] for name in names}


NUMBERS = pa.table({"x": range(2000), "s": [f"s{i % 9}" for i in range(2000)], "unused": [0] * 2000})


# Columns


def test_partition_columns(tmp_path):
    table = pa.table({"x": [1, 2, 3], "kind": ["own"] * 3})
    for folder in (
        "day=2024-01-02/hour=3/kind=folder",
        "day=2024-01-03/hour=12/kind=folder",
        "day=__HIVE_DEFAULT_PARTITION__/hour=-1",
        "hour=__HIVE_DEFAULT_PARTITION__/day=a%2Fb%20c",
        "elsewhere",
    ):
        write(tmp_path / folder / "p.parquet", table)
    columns = ["day", "x", "hour", "kind"]
    manifest = Manifest.scan(["."], str(tmp_path), columns)
    assert manifest.partition_types == {"day": pa.string(), "hour": pa.int64(), "kind": pa.string()}
    ((_, types),) = manifest.types(columns)
    assert types == {"day": pa.string(), "x": pa.int64(), "hour": pa.int64(), "kind": pa.string()}
    assert read(RowGroups(manifest, columns, {"day"}), rows=2) == {
        "day": [day for day in ("2024-01-02", "2024-01-03", None, None, "a/b c") for _ in range(3)],
        "x": [1, 2, 3] * 5,
        "hour": [hour for hour in (3, 12, -1, None, None) for _ in range(3)],
        "kind": ["own"] * 15,
    }
    assert read(RowGroups(manifest, ["hour"], set()), rows=2) == {"hour": [3] * 3 + [12] * 3 + [-1] * 3 + [None] * 6}
    with pytest.raises(ValueError, match=r"lacks 1 column\(s\): 'huor' \(near: hour\)"):
        manifest.check_columns(["huor"])


def test_partition_values_beyond_int64_are_strings(tmp_path):
    for value in ("1", str(1 << 63)):
        write(tmp_path / f"n={value}" / "p.parquet", NUMBERS)
    assert Manifest.scan(["."], str(tmp_path), ["n"]).partition_types == {"n": pa.string()}


def test_a_partition_and_an_own_column_must_agree(tmp_path):
    write(tmp_path / "day=monday" / "a.parquet", NUMBERS)
    write(tmp_path / "b.parquet", NUMBERS.append_column("day", pa.array(["tuesday"] * 2000)))
    assert set(read(row_groups(tmp_path, ["day"]))["day"]) == {"monday", "tuesday"}
    write(tmp_path / "b.parquet", NUMBERS.append_column("day", pa.array([2] * 2000)))
    with pytest.raises(ValueError, match="column 'day' has types of different kinds: int64 in .*; string in "):
        row_groups(tmp_path, ["day"])


def test_struct_children(tmp_path):
    rows = [
        {"city": "Bonn", "at": {"lat": 50.7, "lon": None}, "tags": ["a", "b"]},
        None,
        {"city": None, "at": None, "tags": None},
        {"city": "Köln", "at": {"lat": None, "lon": 6.9}, "tags": []},
    ]
    at = pa.struct([("lat", pa.float64()), ("lon", pa.float64())])
    kind = pa.struct([("city", pa.string()), ("at", at), ("tags", pa.list_(pa.string()))])
    table = pa.table(
        {
            "geo": pa.array(rows, kind),
            "x": [1, 2, 3, 4],
            "geo.city": ["exact", "names", "go", "first"],
            "o": pa.array([{"a.b": i} for i in range(4)]),
            "größe (m²)": [5, 6, 7, 8],
        }
    )
    write(tmp_path / "whole" / "a.parquet", table)
    columns = ["o.a.b", "geo.at.lon", "größe (m²)", "geo.city", "geo.tags", "x"]
    assert read(row_groups(tmp_path / "whole", columns, {"geo.city"}), rows=3) == {
        "o.a.b": [0, 1, 2, 3],
        "geo.at.lon": [None, None, None, 6.9],
        "größe (m²)": [5, 6, 7, 8],
        "geo.city": ["exact", "names", "go", "first"],
        "geo.tags": [["a", "b"], None, None, []],
        "x": [1, 2, 3, 4],
    }
    write(tmp_path / "child" / "a.parquet", table.drop_columns(["geo.city"]))
    children = row_groups(tmp_path / "child", ["geo.city"], {"geo.city"})
    assert read(children) == {"geo.city": ["Bonn", None, None, "Köln"]}
    with pytest.raises(
        ValueError, match=r"lacks 1 column\(s\): 'geo.town' \(near: .*geo.tags.*It has: geo.city, geo.at.lat,"
    ):
        row_groups(tmp_path / "child", ["geo.town"])


def test_a_required_child_of_a_null_struct_is_null(tmp_path):
    kind = pa.struct([pa.field("n", pa.int64(), nullable=False)])
    write(tmp_path / "a.parquet", pa.table({"s": pa.array([{"n": 1}, None, {"n": 3}], kind)}))
    assert read(row_groups(tmp_path, ["s.n"])) == {"s.n": [1, None, 3]}


def test_partitions_and_struct_children_are_features_like_any_other(tmp_path):
    """Batches are those of the same values in plain columns."""
    schema = Schema(
        tables={"hour": Table(24), "h": Table(1000)},
        features={
            "weight": Feature("dense", column="hour"),
            "hour": Feature("sparse", table="hour"),
            "day": Feature("sparse", table="h", ids="hash"),
            "city": Feature("sparse", table="h", ids="hash", column="geo.city"),
        },
        crosses={"day_x_city": Cross(["day", "city"], 500)},
    )
    for number, (day, hour) in enumerate((("2024-01-02", 3), (None, 23), ("2024-01-03", 0))):
        cities = [f"city {i % 7}" for i in range(number, number + 30)]
        labels = [i % 2 for i in range(30)]
        geo = pa.array([{"city": city} for city in cities])
        folder = f"hour={hour}/day={day or '__HIVE_DEFAULT_PARTITION__'}"
        write(tmp_path / "nested" / folder / "a.parquet", pa.table({"label": labels, "geo": geo}), row_group_size=11)
        days = pa.array([day] * 30, pa.string())
        plain = {"label": labels, "hour": [hour] * 30, "day": days, "geo.city": cities}
        write(tmp_path / "plain" / f"hour={hour}" / f"{day}.parquet", pa.table(plain), row_group_size=11)
    layout = schema.layout(crosses=True)
    found = []
    for folder in ("nested", "plain"):
        manifest = Manifest.scan(
            ["hour=3", "hour=23", "hour=0"], str(tmp_path / folder), ["label", *schema.columns(layout)]
        )
        order = {"batch_size": 16, "shards": 4, "shuffle": True, "shuffle_rows": 48, "seed": 1}
        loader = Loader(manifest, schema, layout, **order, threads=2, prefetch_batches=2, rank=0, world_size=1)
        batches = list(loader.epoch(0))
        ids = [
            (batch.sparse.keys(), batch.sparse.values().tolist(), batch.sparse.lengths().tolist()) for batch in batches
        ]
        found.append((ids, [batch.dense.tolist() for batch in batches], loader.counters))
    assert found[0] == found[1] and found[0][2]["day.null"] == 30


def test_columns_come_in_the_order_asked_for_and_dictionaries_where_hashed(tmp_path):
    write(tmp_path / "a.parquet", NUMBERS)
    groups = row_groups(tmp_path, ["s", "x"], {"s"})
    table = next(groups.read(0, 100, Handle()))
    assert pa.types.is_dictionary(table["s"].type) and table["x"].type == pa.int64()
    assert read(groups) == {"s": NUMBERS["s"].to_pylist(), "x": NUMBERS["x"].to_pylist()}


# Failures


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    """A row group of 20,000 rows on flaky storage, read in some twenty requests."""
    monkeypatch.setattr("data_loaders.reader.REMOTE_BYTES", 1)
    monkeypatch.setattr("data_loaders.reader._SMALLEST_REQUEST", 1 << 12)
    table = pa.table({"x": range(20_000), "y": range(20_000)})
    write(
        tmp_path / "a.parquet",
        table,
        row_group_size=20_000,
        use_dictionary=False,
        data_page_size=10_000,
        compression="none",
    )
    return row_groups(f"flaky://{tmp_path}", ["x", "y"])


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5, 8, 13, 15, 16, 17])
def test_a_failure_anywhere_repeats_and_loses_no_row(streamed, after, caplog):
    Flaky.fail("read", 2, after=after)
    tables = streamed.read(0, 700, Handle())
    with caplog.at_level(logging.WARNING):
        rows = [row for table in tables for row in zip(table["x"].to_pylist(), table["y"].to_pylist())]
    assert rows == [(i, i) for i in range(20_000)]
    assert Flaky.calls["read"] > 2, "the failures were met"
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["trying again after"]


def test_a_failure_in_the_middle_of_a_row_group(streamed):
    tables = streamed.read(0, 700, Handle())
    rows = [next(tables)["x"].to_pylist() for _ in range(4)]
    Flaky.fail("read", 1)
    opened = Flaky.calls["open"]
    rows += [table["x"].to_pylist() for table in tables]
    assert sum(rows, []) == list(range(20_000)) and Flaky.calls["read"] > 1
    assert Flaky.calls["open"] == opened + 1  # what failed is not used again


def test_opening_and_whole_row_groups_are_tried_again(tmp_path):
    write(tmp_path / "a.parquet", NUMBERS)
    expected = NUMBERS.select(["x"]).to_pydict()
    for operation in ("open", "read"):
        Flaky.fail(operation, 2)
        assert read(row_groups(f"flaky://{tmp_path}", ["x"])) == expected  # the scan meets them
        groups = row_groups(f"flaky://{tmp_path}", ["x"])
        Flaky.fail(operation, 2)
        assert read(groups) == expected


def test_storage_that_keeps_failing(tmp_path):
    write(tmp_path / "a.parquet", NUMBERS)
    groups = row_groups(f"flaky://{tmp_path}", ["x"])
    handle = Handle()
    list(groups.read(0, 64, handle))
    Flaky.fail("read", 1000)
    message = (
        r"a\.parquet', row group 1: storage failed 5 times, the last time with: .*Input/output error.*last checkpoint"
    )
    with pytest.raises(StorageError, match=message):
        list(groups.read(1, 64, handle))
    Flaky.fail("open", 1000)
    with pytest.raises(StorageError, match="a.parquet': storage failed 5 times"):
        row_groups(f"flaky://{tmp_path}", ["x"])
    Flaky.failures.clear()
    assert read(groups, handle=handle)["x"] == list(range(2000))


@pytest.mark.parametrize("scheme", ["", "flaky://"])
def test_a_file_deleted_or_replaced_in_mid_run(tmp_path, scheme):
    path = write(tmp_path / "a.parquet", NUMBERS)
    groups = row_groups(f"{scheme}{tmp_path}", ["x"])
    handle = Handle()
    list(groups.read(0, 64, handle))
    os.rename(path, tmp_path / "moved")
    with pytest.raises(StorageError, match=r"a\.parquet', row group 1: No such file any more.*put it back"):
        list(groups.read(1, 64, handle))
    os.rename(tmp_path / "moved", path)
    assert read(groups, handle=handle)["x"] == list(range(2000))  # the same file again
    write(path, pa.table({"x": range(5000)}))
    with pytest.raises(ValueError, match=r"a\.parquet' has changed since it was scanned"):
        list(groups.read(2, 64, handle))


def test_a_file_of_the_same_size_and_time_is_told_by_its_footer(tmp_path):
    path = write(tmp_path / "a.parquet", NUMBERS)
    groups = row_groups(tmp_path, ["x"])
    stat, data = os.stat(path), bytearray(path.read_bytes())
    data[-9] ^= 1  # the last letter of 'created_by' or the like
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match="has changed since it was scanned .its footer differs"):
        list(groups.read(0, 64, Handle()))


def test_a_flipped_bit_is_found_where_pages_have_checksums(tmp_path):
    for folder, checksum in (("with", True), ("without", False)):
        options = {"write_page_checksum": checksum, "compression": "none", "use_dictionary": False}
        path = write(tmp_path / folder / "a.parquet", NUMBERS.select(["x"]), **options)
        groups = row_groups(tmp_path / folder, ["x"])
        data, stat = bytearray(path.read_bytes()), os.stat(path)
        chunk = pq.read_metadata(path).row_group(1).column(0)
        data[chunk.data_page_offset + chunk.total_compressed_size - 8] ^= 1  # the last value's lowest bit
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        if checksum:
            with pytest.raises(ValueError, match=r"a\.parquet', row group 1: .*CRC checksum .*write it again"):
                read(groups)
        else:  # as documented: unseen
            found = read(groups)["x"]
            assert [i for i in range(2000) if found[i] != i] == [999] and found[999] == 998


def test_mixed_codecs_encodings_and_row_groups_read_alike(tmp_path):
    parts = (
        {"compression": "snappy", "row_group_size": 7},
        {"compression": "zstd", "use_dictionary": False},
        {"compression": "none", "row_group_size": 1000, "data_page_version": "2.0"},
        {
            "compression": "gzip",
            "use_dictionary": False,
            "column_encoding": {"x": "DELTA_BINARY_PACKED", "s": "DELTA_BYTE_ARRAY"},
        },
    )
    table = NUMBERS.select(["x", "s"])
    for number, options in enumerate(parts):
        write(tmp_path / f"{number}.parquet", table.slice(number * 500, 500), **options)
    groups = row_groups(tmp_path, ["x", "s"], {"s"})
    assert read(groups) == table.to_pydict()
    sizes = [groups.size(number) for number in range(groups.count)]
    assert min(sizes) >= 8 * 2 * 3 and sum(sizes) >= pc.sum(pc.binary_length(table["s"])).as_py()
