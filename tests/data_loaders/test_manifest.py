"""Scanning finds the files in a fixed order and names what is wrong with them before the first step."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders.manifest import Manifest


def write(path, rows=5, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"label": pa.array([0] * rows, "int8"), "x": list(range(rows)), **columns})
    pq.write_table(table, path, row_group_size=2)
    return path


def scan(root, *paths, columns=("label", "x")):
    return Manifest.scan(list(paths), str(root), columns)


def test_files_folders_and_globs_expand_sorted_each_once(tmp_path):
    for name in ("b/part-2.parquet", "b/part-10.parquet", "b/deep/part-0.parquet", "a.parquet", "odd [1] name.parquet"):
        write(tmp_path / name)
    (tmp_path / "b" / "_SUCCESS").touch()
    manifest = scan(tmp_path, "odd [1] name.parquet", "b", "*.parquet")
    names = [manifest.relative(file) for file in manifest.files]
    folder = ["b/deep/part-0.parquet", "b/part-10.parquet", "b/part-2.parquet"]
    assert names == ["odd [1] name.parquet", *folder, "a.parquet"]
    assert manifest.files[0].row_groups == (2, 2, 1)
    assert manifest.num_rows == 25
    assert scan(tmp_path, str(tmp_path / "a.parquet")).num_rows == 5  # absolute paths as well


def test_fingerprints_content_not_place(tmp_path):
    write(tmp_path / "one" / "a.parquet")
    write(tmp_path / "two" / "a.parquet")
    manifest = scan(tmp_path / "one", "a.parquet")
    assert scan(tmp_path / "two", "a.parquet").fingerprint == manifest.fingerprint
    os.utime(tmp_path / "one" / "a.parquet", (1, 1))
    assert scan(tmp_path / "one", "a.parquet").fingerprint == manifest.fingerprint
    write(tmp_path / "two" / "a.parquet", rows=6)
    assert scan(tmp_path / "two", "a.parquet").fingerprint != manifest.fingerprint
    write(tmp_path / "two" / "b.parquet")
    assert scan(tmp_path / "two", "b.parquet").fingerprint != manifest.fingerprint  # another name


def test_widths_may_differ_between_files_kinds_may_not(tmp_path):
    write(tmp_path / "a.parquet", y=pa.array([1] * 5, "int32"), tags=pa.array([[1]] * 5))
    write(tmp_path / "b.parquet", y=pa.array([1.0] * 5), tags=pa.array([[]] * 5))
    write(tmp_path / "c.parquet", y=pa.array([None] * 5), tags=pa.array([None] * 5))
    manifest = scan(tmp_path, "*.parquet", columns=("label", "y", "tags"))
    assert [str(schema.field("y").type) for schema in manifest.schemas] == ["int32", "double", "null"]
    assert [path for path, _ in manifest.types(["y"])] == [str(tmp_path / f"{n}.parquet") for n in "abc"]
    write(tmp_path / "d.parquet", y=pa.array(["1"] * 5), tags=pa.array([[1]] * 5))
    with pytest.raises(ValueError, match=r"column 'y' has types of different kinds: .*a\.parquet.*d\.parquet"):
        scan(tmp_path, "*.parquet", columns=("label", "y"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.parquet", b"", "empty.parquet' has 0 bytes"),
        ("junk.parquet", b"not parquet at all", "junk.parquet' cannot be read as Parquet"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, data, message):
    write(tmp_path / "good.parquet")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        scan(tmp_path, "*.parquet")


def test_a_truncated_file_is_named(tmp_path):
    whole = write(tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="cut.parquet' cannot be read as Parquet .* truncated"):
        scan(tmp_path, "a.parquet", "cut.parquet")


def test_missing_paths_and_empty_folders_and_no_rows(tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "none.parquet", rows=0)
    for path, message in (
        ("absent.parquet", "path does not exist: .*absent.parquet"),
        ("absent-*.parquet", "glob matches no file: .*absent-"),
        ("folder", "holds no \\*.parquet file"),
        ("none.parquet", "no rows in 'none.parquet'"),
    ):
        with pytest.raises(ValueError, match=message):
            scan(tmp_path, path)
    with pytest.raises(ValueError, match="no data paths"):
        scan(tmp_path)


def test_missing_and_repeated_columns_are_named_with_their_file(tmp_path):
    write(tmp_path / "a.parquet", user_id=pa.array([1] * 5))
    write(tmp_path / "b.parquet", userid=pa.array([1] * 5))
    with pytest.raises(ValueError, match=r"b\.parquet' lacks 2 column\(s\): 'user_id' \(near: userid\); 'price'"):
        write(tmp_path / "a.parquet", user_id=pa.array([1] * 5), price=pa.array([1] * 5))
        scan(tmp_path, "*.parquet", columns=("label", "user_id", "price"))
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["label", "x", "x"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet' has more than one column named 'x'"):
        scan(tmp_path, "twice.parquet")
    assert scan(tmp_path, "twice.parquet", columns=("label",)).num_rows == 1
