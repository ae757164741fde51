import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders.prepare import writer

SCHEMA = pa.schema([pa.field("x", pa.int32(), False)])


def batches(*sizes):
    start = 0
    for size in sizes:
        yield pa.record_batch([pa.array(range(start, start + size), pa.int64())], names=["x"])
        start += size


def test_row_groups_are_of_one_size_whatever_the_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROW_GROUP", 10)
    monkeypatch.setattr(writer, "FILE_GROUPS", 3)
    assert writer.write_parts(batches(7, 0, 26, 1, 33), tmp_path, SCHEMA) == 67
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    metadata = [pq.ParquetFile(file).metadata for file in files]
    sizes = [[m.row_group(i).num_rows for i in range(m.num_row_groups)] for m in metadata]
    assert sizes == [[10, 10, 10], [10, 10, 10], [7]]
    assert [x for file in files for x in pq.read_table(file)["x"].to_pylist()] == list(range(67))
    assert not pq.ParquetFile(files[0]).schema_arrow.field("x").nullable


def test_rows_go_to_the_folders_a_column_names(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROW_GROUP", 4)

    def named():
        for start in range(0, 30, 6):
            x = pa.array(range(start, start + 6), pa.int64())
            yield pa.record_batch([x, pa.array(["odd" if i % 2 else "even" for i in range(6)])], names=["x", "which"])

    assert writer.write_parts(named(), tmp_path, SCHEMA, by="which") == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["even", "odd"]
    for name, first in (("even", 0), ("odd", 1)):
        (file,) = (tmp_path / name).iterdir()
        assert pq.read_table(file).to_pydict() == {"x": list(range(first, 30, 2))}
        assert [pq.ParquetFile(file).metadata.row_group(i).num_rows for i in range(4)] == [4, 4, 4, 3]


def test_an_interrupted_file_never_gets_its_name(tmp_path):
    def broken():
        yield from batches(5)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        writer.write_parts(broken(), tmp_path, SCHEMA)
    assert list(tmp_path.glob("*.parquet")) == []


def test_batches_made_ahead_come_in_order_and_errors_come_through():
    assert [b.num_rows for b in writer.ahead(batches(1, 2, 3))] == [1, 2, 3]

    def broken():
        yield 1
        raise KeyError("x")

    ahead = writer.ahead(broken())
    assert next(ahead) == 1
    with pytest.raises(KeyError):
        next(ahead)


def test_nothing_keeps_running_when_the_taker_stops():
    made = []

    def endless():
        while True:
            made.append(None)
            yield len(made)

    ahead = writer.ahead(endless(), depth=2)
    next(ahead)
    ahead.close()
    count = len(made)
    assert count <= 6 and len(made) == count
