"""What a ledger holds against what was recorded, in whatever pieces it was written and cut."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders.batch import Cursor
from data_loaders.manifest import Manifest
from trainer.monitoring import row_log
from trainer.monitoring.row_log import RowLog, cut

FILES = {"day=1/a.parquet": 5, "day=1/b.parquet": 0, "day=2/c d.parquet": 4, "é.parquet": 3}
PLACES = [(name, row) for name, rows in FILES.items() for row in range(rows)]  # by number in the manifest


@pytest.fixture
def manifest(tmp_path):
    for name, rows in FILES.items():
        path = tmp_path / "log" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"x": pa.array(range(rows), "int32")}), path)
    return Manifest.scan(list(FILES), str(tmp_path / "log"), ["x"])


def cursor(origin, epoch=0, dropped=None):
    origin = np.array(origin, np.int64)
    return Cursor(epoch, 1, len(origin), len(origin), None if dropped is None else np.array(dropped), origin)


def entries(folder):
    table = pq.read_table(folder)
    names = [*table.schema.names]
    return Counter(tuple(row[name] for name in names) for row in table.to_pylist()), table.schema


def test_all_that_was_recorded_is_read_back_from_any_number_of_ranks(manifest, tmp_path):
    folder, random = tmp_path / "ledger", np.random.default_rng(0)
    expected = Counter()
    for rank, flush_rows in ((0, 1000), (1, 3), (2, 1)):
        one = RowLog(folder, manifest, rank, flush_rows)
        for step in range(1, 8):
            origin = random.permutation(len(PLACES))[: 0 if rank == step else 3]
            dropped = None if step % 2 else origin % 4 == 0
            one.record(cursor(origin, epoch=step // 4, dropped=dropped), step)
            expected.update(
                (step, step // 4, *PLACES[number], bool(not step % 2 and number % 4 == 0)) for number in origin
            )
        one.flush()
    found, schema = entries(folder)
    assert found == expected
    assert schema.remove_metadata() == row_log.SCHEMA
    assert all(path.suffix == ".parquet" and path.name[0] != "." for path in folder.iterdir())


def test_nothing_is_written_without_a_record(manifest, tmp_path):
    one = RowLog(tmp_path / "ledger", manifest, 0, flush_rows=1)
    one.record(Cursor(0, 1, 3, 3), 1)
    one.record(cursor([]), 2)
    one.flush()
    assert not (tmp_path / "ledger").exists()
    assert cut(tmp_path / "ledger", 5) == 0


def test_memory_is_bounded_by_rows(manifest, tmp_path):
    one = RowLog(tmp_path / "ledger", manifest, 0, flush_rows=10)
    for step in range(1, 21):
        one.record(cursor([0, 1, 2]), step)
        assert one._pending_rows < 10
    assert pq.read_table(tmp_path / "ledger").num_rows >= 20 * 3 - 10


@pytest.mark.parametrize("step", [0, 1, 4, 6, 9, 10, 30])
def test_a_cut_leaves_exactly_the_steps_up_to_it(manifest, tmp_path, step):
    """Also where a piece reaches over the cut, and where a crash left an unfinished one; twice is the same as once."""
    folder = tmp_path / "ledger"
    for rank, flush_rows in ((0, 6), (1, 4)):
        one = RowLog(folder, manifest, rank, flush_rows)
        for number in range(1, 11):
            one.record(cursor([number, (number + rank) % 12]), number)
        one.flush()
    before, _ = entries(folder)
    (folder / ".000000000001-000000000002-rank-00000.parquet.part").write_bytes(b"torn")
    (folder / "notes.txt").write_text("not ours")
    for _ in range(2):
        assert cut(folder, step) == min(step, 10)
        assert not any(path.name.endswith(".part") for path in folder.iterdir())
        assert (folder / "notes.txt").exists()
    (folder / "notes.txt").unlink()
    expected = Counter({entry: count for entry, count in before.items() if entry[0] <= step})
    assert (entries(folder)[0] if any(folder.iterdir()) else Counter()) == expected


def test_a_failed_write_keeps_what_was_recorded(manifest, tmp_path):
    (tmp_path / "ledger").write_text("a file where the folder should be")
    one = RowLog(tmp_path / "ledger", manifest, 0)
    one.record(cursor([3, 4]), 1)
    with pytest.raises(OSError):
        one.flush()
    (tmp_path / "ledger").unlink()
    one.flush()
    assert pq.read_table(tmp_path / "ledger").num_rows == 2
