"""The rows of a table as a file: every row once, in order, beside the value that the vocabulary gave it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_loaders.errors import UserError
from tests.helpers import made_checkpoints as made
from tests.helpers import tiny
from trainer import embeddings
from trainer.checkpoint import Reader, newest
from trainer.config import arguments

ROWS, DIM = 200, 8


@pytest.fixture
def trained(tmp_path):
    """``(run, rows)``: a checkpoint of two ranks, each with pieces of the table item, as column- and row-wise plans leave it."""
    run, rows = tmp_path / "run", made.table(ROWS, DIM)
    pieces = made.cut(np.random.default_rng(1), rows, "tables/item/weight")
    others = [
        made.whole("tables/category/weight", made.table(20, 4)),
        made.whole("tables/wide_hour/weight", made.table(24, 4)),
    ]
    made.commit(run / "checkpoints" / "step-5", pieces[::2], [*pieces[1::2], *others], facts={"progress": {"step": 5}})
    (run / "config.yaml").write_text(tiny.job(tmp_path / "log").text)
    return run, rows.numpy()


def write(run, output, *given):
    words = [str(run), "--output", str(output), *given]
    embeddings.run(arguments.embeddings().parse_intermixed_args(words))
    return pq.read_table(output)


def vectors(table):
    return table["embedding"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)


@pytest.mark.parametrize("slab", [1 << 20, 4 * DIM * 7])
@pytest.mark.parametrize("name", ["item", "item_id", "clicked_items"])
def test_rows_of_any_sharding_in_slabs_of_any_size(trained, tmp_path, monkeypatch, slab, name):
    monkeypatch.setattr(embeddings, "SLAB_BYTES", slab)
    found = write(trained[0], tmp_path / "items.parquet", "--table", name)
    assert found.column_names == ["row", "embedding"] and found["row"].to_pylist() == list(range(ROWS))
    assert np.array_equal(vectors(found), trained[1])
    assert found.schema.field("embedding").type.list_size == DIM
    write(trained[0], tmp_path / "items.parquet", "--table", "category")  # replaces its own


def vocabulary(folder, ids, values):
    (folder / "vocabulary").mkdir(parents=True)
    table = pa.table({"value": values, "id": pa.array(ids, pa.int32()), "count": [1] * len(ids)})
    pq.write_table(table, folder / "vocabulary" / "item.parquet", row_group_size=5)
    return f"data.prepared={folder}"


@pytest.mark.parametrize("slab", [1 << 20, 4 * DIM * 7])
def test_a_row_stands_beside_its_value(trained, tmp_path, monkeypatch, slab):
    monkeypatch.setattr(embeddings, "SLAB_BYTES", slab)
    monkeypatch.setattr(embeddings, "_STEP", 3)
    ids = [*range(2, 30), *range(60, 90), 150]  # rows of evicted and of no values between
    given = vocabulary(tmp_path / "prepared", ids, [f"é{i}" for i in ids])
    found = write(trained[0], tmp_path / "items.parquet", "--table", "item", given)
    assert found["value"].to_pylist() == [f"é{row}" if row in ids else None for row in range(ROWS)]
    assert np.array_equal(vectors(found), trained[1])


@pytest.mark.parametrize("ids", [[2, 4, 3], [2, 2], [2, ROWS]])
def test_a_vocabulary_of_another_table_is_refused_and_nothing_is_left(trained, tmp_path, ids):
    given = vocabulary(tmp_path / "prepared", ids, ids)
    with pytest.raises(UserError, match="no vocabulary of a table of 200 rows: .* data.prepared=DIR"):
        write(trained[0], tmp_path / "out" / "items.parquet", "--table", "item", given)
    assert not list((tmp_path / "out").iterdir())


def test_mistakes_are_named(trained, tmp_path):
    run, output = trained[0], tmp_path / "items.parquet"
    with pytest.raises(UserError, match="--table: 'itme' is not known; did you mean 'item'"):
        write(run, output, "--table", "itme")
    with pytest.raises(UserError, match="--table: 'wide_hour' is not known"):
        write(run, output, "--table", "wide_hour")
    with pytest.raises(UserError, match="data.prepared=gone, .* is not there: .* data.prepared=null"):
        write(run, output, "--table", "item", "data.prepared=gone")
    pq.write_table(pa.table({"mine": [1]}), output)
    with pytest.raises(UserError, match="is not what this command writes"):
        write(run, output, "--table", "item")


@pytest.mark.slow
def test_a_run_saved_by_two_ranks(click_log, tmp_path):
    done = tiny.train(2, click_log, tmp_path / "run", "data.test=[]", "model=deepfm", "steps=2")
    assert done.returncode == 0, done.stderr
    found = write(tmp_path / "run", tmp_path / "items.parquet", "--table", "item")
    expected = Reader(newest(tmp_path / "run" / "checkpoints")).read("tables/item/weight")
    assert torch.equal(torch.from_numpy(vectors(found).copy()), expected) and found.num_rows == ROWS
