"""Scanning finds the files in a fixed order and names what is wrong with them before the first step."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders.manifest import Changes, Manifest
from data_loaders.storage import Storage


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


def test_footers_tell_copies_from_files_written_anew(tmp_path):
    write(tmp_path / "a.parquet")
    shutil.copy(tmp_path / "a.parquet", tmp_path / "b.parquet")
    write(tmp_path / "c.parquet", x=pa.array([9, 8, 7, 6, 5]))  # of the same size, other statistics
    wide = write(tmp_path / "wide.parquet", **{f"column {i}": pa.array([str(i) * 50] * 5) for i in range(400)})
    a, b, c, w = scan(tmp_path, "*.parquet").files
    assert a.size == c.size and a.footer == b.footer != c.footer and len(a.footer) == 64
    data = wide.read_bytes()
    assert int.from_bytes(data[-8:-4], "little") > 1 << 16 and w.num_rows == 5  # larger than what is read first


def drift(root):
    """Files of two schemas, one below partitions."""
    write(root / "a.parquet")
    write(root / "day=3" / "größe=a%2Fb" / "b.parquet", x=pa.array([1] * 5, "int32"))
    write(root / "day=4" / "c.parquet")


def test_a_manifest_goes_through_json_to_another_root(tmp_path):
    drift(tmp_path / "one")
    manifest = scan(tmp_path / "one", "a.parquet", "day=3", "day=4")
    text = json.dumps(manifest.to_dict())
    assert Manifest.from_dict(json.loads(text), str(tmp_path / "one")) == manifest
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    moved = Manifest.from_dict(json.loads(text), "s3://bucket/some log?endpoint_override=x")
    assert [file.path for file in moved.files][1] == "s3://bucket/some log/day=3/größe=a%2Fb/b.parquet"
    assert moved.fingerprint == manifest.fingerprint and moved.files[1].partitions == (("day", "3"), ("größe", "a/b"))
    outside = Manifest.scan([str(tmp_path / "one" / "a.parquet")], str(tmp_path / "two"), ["x"])
    assert Manifest.from_dict(outside.to_dict(), str(tmp_path / "two")) == outside
    with pytest.raises(ValueError, match="a data manifest of version 99"):
        Manifest.from_dict({**manifest.to_dict(), "version": 99}, ".")


def test_changes_since_a_saved_manifest(tmp_path):
    drift(tmp_path)
    saved = scan(tmp_path, ".")
    assert scan(tmp_path, ".").changes(saved) == Changes((), (), ())
    os.utime(tmp_path / "a.parquet", (1, 1))  # the same file all the same
    write(tmp_path / "day=4" / "c.parquet", x=pa.array([5, 4, 3, 2, 1]))
    write(tmp_path / "day=5" / "d.parquet")
    shutil.rmtree(tmp_path / "day=3")
    changes = scan(tmp_path, ".").changes(saved)
    assert changes == Changes(("day=3/größe=a%2Fb/b.parquet",), ("day=4/c.parquet",), ("day=5/d.parquet",))


def test_selecting_files(tmp_path):
    drift(tmp_path)
    manifest = scan(tmp_path, ".")
    assert [schema.field("x").type for schema in manifest.schemas] == [pa.int64(), pa.int32()]
    part = manifest.select(["day=3/größe=a%2Fb/b.parquet"])
    assert part.schemas == manifest.schemas[1:] and part.files == (replace(manifest.files[1], schema=0),)
    part.check_columns(["x", "day"])
    assert part.types(["x"]) == [(part.files[0].path, {"x": pa.int32()})]
    assert manifest.select([manifest.relative(file) for file in reversed(manifest.files)]) == manifest
    with pytest.raises(ValueError, match="the data lack 1 of the files asked for: 'absent.parquet'"):
        manifest.select(["a.parquet", "absent.parquet"])


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


def test_a_footer_that_is_too_long_or_damaged_is_named(tmp_path):
    data = write(tmp_path / "a.parquet").read_bytes()
    for name, ending in (("long.parquet", b"\xff\xff\xff\x7fPAR1"), ("odd.parquet", b"\x20\0\0\0PAR1")):
        (tmp_path / name).write_bytes(data[:-8] + ending)
        with pytest.raises(ValueError, match=f"{name}' cannot be read as Parquet"):
            scan(tmp_path, name)


def test_a_file_without_read_permission_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet")

    def refuse(self, name):  # a mode of 0 would not keep root from reading
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(Storage, "open", refuse)
    with pytest.raises(ValueError, match=r"a\.parquet' cannot be read as Parquet .*Permission denied.*read permission"):
        scan(tmp_path, "a.parquet")


def test_missing_paths_and_empty_folders_and_no_rows(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.parquet").mkdir()
    write(tmp_path / "none.parquet", rows=0)
    for path, message in (
        ("absent.parquet", "path does not exist: .*absent.parquet"),
        ("absent-*.parquet", "glob matches no file: .*absent-"),
        ("folder", "holds no \\*.parquet file"),
        ("file.parquet", "file.parquet' holds no \\*.parquet file"),
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
