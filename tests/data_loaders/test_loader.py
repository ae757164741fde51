"""Every row once an epoch, in an order that does not depend on ranks, threads or where a run was resumed; no failure
is swallowed and no thread left behind."""

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders import reader, streams
from data_loaders.footer_checks import ROW_ORDER, shuffled_mark
from data_loaders.hashing import hash_ids, rows_from_hashes
from data_loaders.loader import Loader
from data_loaders.manifest import Manifest
from data_loaders.schema import Cross, Feature, Schema, Table

SCHEMA = Schema(
    tables={"row": Table(100_000), "h": Table(500), "t": Table(30)},
    features={
        "number": Feature("dense"),
        "maybe": Feature("dense", fill=0.0),
        "id": Feature("sparse", table="row"),
        "text": Feature("sparse", table="h", ids="hash"),
        "tags": Feature("sparse", table="h", ids="hash", max_length=2),
        "past": Feature("sequence", table="row", target="id", max_length=3),
    },
    crosses={"id_x_text": Cross(["id", "text"], 1000)},
)
LAYOUT = SCHEMA.layout(crosses=True, attention=True)
COLUMNS = ("label", *SCHEMA.columns(LAYOUT))


def write(path, first, rows, row_group_size=1000, marked=False):
    """Row i is told by its id, its number and the last id of its history. ``marked``: as shuffled by ``prepare``."""
    ids = np.arange(first, first + rows)
    columns = {
        "label": pa.array(ids % 2, "int8"),
        "number": pa.array(ids, "int64"),
        "maybe": pa.array([None if i % 10 == 0 else float(i) for i in ids], "float64"),
        "id": pa.array(ids, "int32"),
        "text": pa.array([None if i % 5 == 0 else f"text {i % 40}" for i in ids], "string"),
        "tags": pa.array([[str(t) for t in range(i % 4)] for i in ids], pa.list_(pa.string())),
        "past": pa.array([list(range(max(0, i - i % 5), i + 1)) for i in ids.tolist()], pa.list_(pa.int64())),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table, row_group_size=max(row_group_size, 1))
        if marked:
            writer.add_key_value_metadata({ROW_ORDER.decode(): shuffled_mark(rows).decode()})


GIVEN = {
    "batch_size": 16,
    "shards": 4,
    "shuffle": True,
    "shuffle_rows": 64,
    "threads": 2,
    "prefetch_batches": 2,
    "seed": 5,
}


def loader(root, rank=0, world_size=1, **changes):
    manifest = Manifest.scan(["."], str(root), COLUMNS)
    return Loader(manifest, SCHEMA, LAYOUT, rank=rank, world_size=world_size, **{**GIVEN, **changes})


def ids_of(batch):
    """The batch's row numbers, after checking that everything else in the row belongs to it."""
    real = batch.cursor.local_rows
    ids = batch.sequence["id"].values().tolist()
    assert len(ids) == real
    assert batch.dense[:real, 0].tolist() == ids and not batch.dense[real:].any()
    assert batch.dense[:real, 1].tolist() == [0 if i % 10 == 0 else i for i in ids]
    assert batch.labels[:real].tolist() == [i % 2 for i in ids]
    assert batch.weights.tolist() == [1.0] * real + [0.0] * (len(batch.weights) - real)
    lengths = batch.sequence["past"].lengths().tolist()
    values = iter(batch.sequence["past"].values().tolist())
    for i, length in zip(ids, lengths):
        assert [next(values) for _ in range(length)] == list(range(max(0, i - i % 5), i + 1))[-3:]
    assert batch.sparse["tags"].lengths()[:real].tolist() == [min(i % 4, 2) for i in ids]
    assert [row == 0 for row in batch.sparse["text"].values().tolist()] == [i % 5 == 0 for i in ids]
    assert [row == 0 for row in batch.sparse["id_x_text"].values().tolist()] == [i % 5 == 0 for i in ids]
    return ids


def stream(one, epoch=0, start_step=0):
    return [ids_of(batch) for batch in one.epoch(epoch, start_step)]


def write_shape(root, shape, marked=False):
    """``shape``: for each file its rows and its row group size."""
    first = 0
    for number, (rows, row_group_size) in enumerate(shape):
        write(root / f"part-{number}.parquet", first, rows, row_group_size, marked)
        first += rows
    return first


SHAPES = [
    [(1, 1)],
    [(3, 1000)],
    [(5, 2), (0, 1), (9, 4)],
    [(100, 7), (33, 1000)],
    [(230, 1), (1, 1)],
    [(97, 40), (301, 50), (0, 1), (12, 5)],
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("shuffle", "marked"), [(True, False), (True, True), (False, False)])
def test_every_row_once_and_equal_batches_for_every_world_size(tmp_path, shape, shuffle, marked):
    total = write_shape(tmp_path, shape, marked)
    alone = stream(loader(tmp_path, shuffle=shuffle))
    assert sorted(sum(alone, [])) == list(range(total))
    for world_size in (2, 3, 4):
        ranks = [loader(tmp_path, rank, world_size, shuffle=shuffle) for rank in range(world_size)]
        batches = [list(one.epoch(0)) for one in ranks]
        size = -(-4 // world_size) * 4
        assert {one.local_batch_size for one in ranks} == {size} == {len(b.labels) for part in batches for b in part}
        assert {one.steps_per_epoch for one in ranks} == {len(part) for part in batches} == {len(alone)}
        for step, (together, parts) in enumerate(zip(alone, zip(*batches))):
            assert sorted(sum(map(ids_of, parts), [])) == sorted(together)
            assert {batch.cursor.rows for batch in parts} == {len(together)}
            assert {(batch.cursor.epoch, batch.cursor.step) for batch in parts} == {(0, step + 1)}
            assert {batch.normalizer.item() for batch in parts} == {np.float32(len(together) / world_size)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("marked", [False, True])
def test_resuming_continues_the_stream(tmp_path, shape, marked):
    write_shape(tmp_path, shape, marked)
    one = loader(tmp_path)
    for epoch in (0, 3):
        whole = stream(one, epoch)
        for start in {0, 1, 3, 4, 5, 9, len(whole) - 1, len(whole)} & set(range(len(whole) + 1)):
            assert stream(loader(tmp_path, threads=1, prefetch_batches=7), epoch, start) == whole[start:]
    with pytest.raises(ValueError, match="start_step is 999: an epoch has"):
        one.epoch(0, 999)


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_go_on_over_epochs(tmp_path, shuffle):
    write_shape(tmp_path, [(90, 20), (30, 7)])
    one = loader(tmp_path, shuffle=shuffle)
    every = [(epoch, batch) for epoch in (2, 3, 4) for batch in stream(one, epoch)]
    steps = one.steps_per_epoch
    for start, count in ((0, 0), (0, 3 * steps), (3, 2 * steps), (steps, steps + 1), (2, 1)):
        taken = list(one.batches(2, start, count))
        assert [(b.cursor.epoch, ids_of(b)) for b in taken] == every[start : start + count]
        numbers = [(b.cursor.epoch - 2) * steps + b.cursor.step for b in taken]
        assert numbers == list(range(start + 1, start + count + 1))


def test_rows_that_prepare_has_shuffled_are_taken_as_they_lie_in_row_groups_of_a_random_order(tmp_path):
    total = write_shape(tmp_path, [(400, 20), (80, 20)], marked=True)
    epochs = [stream(loader(tmp_path), epoch) for epoch in (0, 1)]
    for steps in epochs:
        rows = [row for shard in range(4) for step in steps for row in step[4 * shard : 4 * shard + 4]]
        assert sorted(rows) == list(range(total)) != rows
        assert all(b == a + 1 for a, b in zip(rows, rows[1:]) if b % 20)  # within a row group
    assert epochs[0] != epochs[1] != stream(loader(tmp_path, seed=6), 1)
    assert stream(loader(tmp_path, shuffle_rows=400, threads=3), 1) == epochs[1]


def test_one_file_without_the_mark_or_with_another_s_has_all_shuffled_in_the_buffer(tmp_path):
    write_shape(tmp_path / "plain", [(300, 50), (200, 50)])
    expected = stream(loader(tmp_path / "plain"))
    write(tmp_path / "mixed" / "part-0.parquet", 0, 300, 50, marked=True)
    write(tmp_path / "mixed" / "part-1.parquet", 300, 200, 50)
    assert stream(loader(tmp_path / "mixed")) == expected
    table = pq.read_table(tmp_path / "mixed" / "part-0.parquet")
    with pq.ParquetWriter(tmp_path / "cut.parquet", table.schema) as writer:  # by a tool that copies metadata
        writer.write_table(table.slice(0, 290))
        writer.add_key_value_metadata({ROW_ORDER.decode(): shuffled_mark(300).decode()})
    assert not Manifest.scan(["cut.parquet"], str(tmp_path), COLUMNS).is_shuffled
    assert Manifest.scan(["part-0.parquet"], str(tmp_path / "mixed"), COLUMNS).is_shuffled


def test_epochs_seeds_and_shuffling(tmp_path):
    write_shape(tmp_path, [(500, 30), (400, 1000)])
    streams = [sum(stream(loader(tmp_path, seed=seed), epoch), []) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(rows) for rows in streams}) == 4
    wide = sum(stream(loader(tmp_path, shuffle_rows=900, shards=1)), [])
    assert abs(np.corrcoef(wide, np.arange(900))[0, 1]) < 0.15
    assert stream(loader(tmp_path, threads=1)) == [
        batch.sequence["id"].values().tolist() for batch in loader(tmp_path, threads=3, prefetch_batches=1).epoch(0)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_prediction_keeps_the_order_of_the_files(tmp_path, world_size):
    total = write_shape(tmp_path, [(50, 7), (3, 1), (61, 100)])
    given = {"shards": world_size, "shuffle": False, "contiguous": True, "batch_size": 6}
    parts = [loader(tmp_path, rank, world_size, **given) for rank in range(world_size)]
    assert sum((sum(stream(one), []) for one in parts), []) == list(range(total))


def test_large_row_groups_are_read_table_by_table(tmp_path, monkeypatch):
    monkeypatch.setattr("data_loaders.reader.READ_ROWS", 10)
    total = write_shape(tmp_path, [(300, 300), (500, 450)])
    expected = stream(loader(tmp_path))
    assert sorted(sum(expected, [])) == list(range(total))
    monkeypatch.setattr("data_loaders.streams.SHARED_BYTES", 0)  # none are read whole for several shards
    assert stream(loader(tmp_path)) == expected
    assert stream(loader(tmp_path), 0, 7) == expected[7:]


def test_shared_row_groups_are_read_once_and_let_go(tmp_path, monkeypatch):
    reads, spies = [], []

    class Spy(streams.SharedRowGroups):
        def __init__(self, *given):
            super().__init__(*given)
            spies.append(self)

    def read(self, row_group, *given, original=reader.RowGroups.read):
        reads.append(row_group)
        return original(self, row_group, *given)

    monkeypatch.setattr("data_loaders.loader.SharedRowGroups", Spy)
    monkeypatch.setattr(reader.RowGroups, "read", read)
    write_shape(tmp_path, [(400, 200)])
    stream(loader(tmp_path, shards=8, threads=3))
    assert sorted(reads) == [0, 1]
    assert not spies[0]._entries and spies[0]._bytes == 0


def test_counters_count_each_row_once(tmp_path):
    total = write_shape(tmp_path, [(150, 40), (30, 7)])
    expected = {"maybe.null": len(range(0, total, 10)), "text.null": len(range(0, total, 5))}
    expected["tags.truncated"] = sum(i % 4 > 2 for i in range(total))
    expected["past.truncated"] = sum(len(range(max(0, i - i % 5), i + 1)) > 3 for i in range(total))
    for world_size in (1, 3):
        ranks = [loader(tmp_path, rank, world_size) for rank in range(world_size)]
        for one in ranks:
            for epoch in (0, 1):
                stream(one, epoch)
            assert one.wait_seconds > 0
        found = {name: sum(one.counters.get(name, 0) for one in ranks) for name in expected}
        assert found == {name: 2 * count for name, count in expected.items()}


def test_types_may_drift_between_files(tmp_path):
    write(tmp_path / "a.parquet", 0, 60)
    write(tmp_path / "b.parquet", 60, 50)
    table = pq.read_table(tmp_path / "b.parquet")
    for name, kind in (("id", pa.int64()), ("number", pa.int16()), ("text", pa.large_string()), ("label", pa.bool_())):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    other = tmp_path / "other"
    write(other / "a.parquet", 0, 60)
    write(other / "b.parquet", 60, 50)
    expected = stream(loader(other))
    pq.write_table(table, tmp_path / "b.parquet", compression="zstd", use_dictionary=False)
    manifest = Manifest.scan(["a.parquet", "b.parquet"], str(tmp_path), COLUMNS)
    assert stream(Loader(manifest, SCHEMA, LAYOUT, rank=0, world_size=1, **GIVEN)) == expected


def test_column_names_with_dots_spaces_and_umlauts(tmp_path):
    names = ["a", "a.b", "größe (m²)", "a b.c"]
    table = pa.table({"label": [0, 1] * 20, **{name: [f"{name}{i}" for i in range(40)] for name in names}})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=15)
    features = {f"f{i}": Feature("sparse", column=name, table="h", ids="hash") for i, name in enumerate(names)}
    schema = Schema(tables={"h": Table(1 << 30)}, features=features)
    manifest = Manifest.scan(["."], str(tmp_path), ["label", *names])
    given = {**GIVEN, "batch_size": 40, "shards": 1, "shuffle": False}
    (batch,) = Loader(manifest, schema, schema.layout(), rank=0, world_size=1, **given).epoch(0)
    for i, name in enumerate(names):
        expected = rows_from_hashes(hash_ids(table[name].combine_chunks()), 1 << 30)
        assert batch.sparse[f"f{i}"].values().tolist() == expected.tolist()


# Failures


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("loader")}


def test_leaving_early_leaves_no_thread(tmp_path):
    write_shape(tmp_path, [(2000, 50)])
    for threads_given in (1, 3):
        batches = loader(tmp_path, threads=threads_given).epoch(0)
        next(batches)
        assert threads()
        batches.close()
        assert not threads()
    for batch in loader(tmp_path).epoch(0):
        break
    del batch
    gc.collect()
    assert not threads()
    loader(tmp_path).epoch(0)  # never started
    assert not threads()


def test_a_bad_value_names_file_row_group_and_row(tmp_path):
    write(tmp_path / "a.parquet", 0, 95, 10)
    table = pq.read_table(tmp_path / "a.parquet")
    bad = pa.array([2 if i == 57 else 0 for i in range(95)], "int8")
    pq.write_table(table.set_column(0, "label", bad), tmp_path / "b.parquet", row_group_size=10)
    for world_size in (1, 3):
        failed = 0
        for rank in range(world_size):
            try:
                for _ in loader(tmp_path, rank, world_size).epoch(0):
                    pass
            except ValueError as error:
                assert "b.parquet', row group 5, row 7: label 'label' is 2" in str(error)
                failed += 1
            assert not threads()
        assert failed == 1


def test_an_id_outside_its_table_names_feature_and_value(tmp_path):
    write(tmp_path / "a.parquet", 99_990, 20)
    with pytest.raises(ValueError, match=r"a\.parquet', row group 0, row 10: feature 'id' .* has id 100000"):
        stream(loader(tmp_path, shuffle=False, shards=1))


def test_a_file_replaced_deleted_or_damaged_is_named(tmp_path):
    write(tmp_path / "a.parquet", 0, 40)
    write(tmp_path / "b.parquet", 40, 40, 10)
    one = loader(tmp_path)
    data = (tmp_path / "b.parquet").read_bytes()
    stat = os.stat(tmp_path / "b.parquet")

    def times():
        os.utime(tmp_path / "b.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))

    (tmp_path / "b.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"b\.parquet' has changed since it was scanned"):
        list(one.epoch(0))
    (tmp_path / "b.parquet").write_bytes(data[:4] + b"\xff" * 300 + data[304:])
    times()
    with pytest.raises((ValueError, OSError), match=r"b\.parquet', row group 0: "):
        list(one.epoch(0))
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(OSError, match=r"b\.parquet', row group \d: .*No such file"):
        list(loader_of(one).epoch(0))
    assert not threads()


def loader_of(one):
    """Forgets footers, as another process would."""
    one._row_groups._footers.clear()
    return one


def test_refusals_before_any_row(tmp_path):
    write(tmp_path / "a.parquet", 0, 40)
    with pytest.raises(ValueError, match="5 ranks cannot share 4 logical shards: set data.stream.shards to 8"):
        loader(tmp_path, 0, 5)
    with pytest.raises(ValueError, match="18 rows cannot be shared by 4 logical shards"):
        loader(tmp_path, batch_size=18)
    manifest = Manifest.scan(["."], str(tmp_path), ["label"])
    strings = Schema(tables={"t": Table(9)}, features={"text": Feature("sparse", table="t")})
    with pytest.raises(ValueError, match=r"a\.parquet': sparse feature 'text': column 'text' has type string"):
        Loader(manifest, strings, strings.layout(), rank=0, world_size=1, **GIVEN)
    absent = Schema(tables={"t": Table(9)}, features={"txt": Feature("sparse", table="t")})
    with pytest.raises(ValueError, match=r"a\.parquet' lacks 1 column\(s\): 'txt' \(near: text\)"):
        Loader(manifest, absent, absent.layout(), rank=0, world_size=1, **GIVEN)


# Real data


DATA = Path(__file__).parents[3] / "shared" / "data"


def hashed(table="h", kind="sparse", **options):
    return Feature(kind, table=table, ids="hash", **options)


REAL = {
    "criteo39": Schema(
        tables={"h": Table(10_000)},
        features={
            **{f"I{i}": Feature("dense", fill=0, log1p=True) for i in range(1, 14)},
            **{f"C{i}": hashed() for i in range(1, 27)},
        },
    ),
    "ml1m": Schema(
        tables={"movie": Table(4000), "genre": Table(100), "h": Table(10_000)},
        features={
            "user_id": hashed(),
            "zip": hashed(),
            "movie_id": Feature("sparse", table="movie"),
            "genre1": hashed("genre"),
            "genres": hashed("genre"),
            "hist_movie_id": Feature("sequence", table="movie", max_length=20, target="movie_id", history="past"),
            "hist_genre1": hashed("genre", kind="sequence", max_length=20, target="genre1", history="past"),
        },
    ),
    "trivago": Schema(
        tables={"h": Table(10_000)},
        features={
            "price": Feature("dense", log1p=True),
            "city": hashed(),
            "item_id": hashed(),
            "hist_items": hashed(kind="sequence", max_length=10, target="item_id"),
        },
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"no real click logs at ../shared/data/{name}")
    schema = REAL[name]
    layout = schema.layout(attention=bool(schema.sequences))
    manifest = Manifest.scan(["valid.parquet"], str(DATA / name), ["label", *schema.columns(layout)])
    given = {**GIVEN, "batch_size": 2048, "shards": 64, "shuffle_rows": 1 << 20}
    table = pq.read_table(DATA / name / "valid.parquet")
    clicks, lengths = 0.0, 0
    for rank in range(3):
        for batch in Loader(manifest, schema, layout, rank=rank, world_size=3, **given).epoch(0):
            clicks += batch.labels.sum().item()
            assert batch.dense.isfinite().all() and len(batch.labels) == 22 * 32
            for kjt in filter(None, (batch.sparse, batch.sequence)):
                lengths += kjt.lengths().sum().item()
                for key in kjt.keys():
                    values = kjt[key].values()
                    assert not len(values) or values.min() >= 0 and values.max() < schema.num_embeddings(key)
    assert clicks == sum(table["label"].to_pylist())
    keys = (*layout.pooled, *layout.unpooled)
    assert lengths == sum(expected_lengths(table[schema.column(key)], schema.features[key]) for key in keys)


def expected_lengths(column, feature):
    if not pa.types.is_list(column.type):
        return len(column)  # a missing single id takes the missing row
    lengths = column.combine_chunks().value_lengths().fill_null(0).to_numpy()
    return int(np.minimum(lengths, feature.max_length or 1 << 30).sum())
