"""Tables that begin with vectors from a file, against a reading of the file by hand: by number, by hash and by vocabulary, on any
sharding; frozen, projected, exported."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.errors import UserError
from data_loaders.hashing import hash_ids, rows_from_hashes
from data_loaders.schema import Feature, Schema, Table, VectorFile
from tests.helpers import tiny
from tests.helpers.exported import export
from tests.helpers.jobs import built_job, check_against_unsharded, ranks_of
from tests.helpers.ranks import run_distributed
from tests.helpers.whole_tables import gather_table
from trainer import train
from trainer.modules.embeddings import Projections
from trainer.run import build, table_files
from trainer.serve.scorer import Scorer, probabilities

DIM = 8  # of the tables
FILE = "data.schema.tables.{}.init_from={{file: '{}', id: key, vector: v, dim: {}}}"


def write(path, ids, dim, seed=0, **changed):
    """A file of vectors, in row groups of 50; returns them."""
    vectors = np.random.default_rng(seed).standard_normal((len(ids), dim)).astype(np.float32)
    values = [None if i == changed.get("null") else vector for i, vector in enumerate(vectors.tolist())]
    table = pa.table({"key": pa.array(ids), "v": pa.array(values, pa.list_(pa.float32()))})
    pq.write_table(table, path, row_group_size=50)
    return vectors


def check_filled(rank, world_size, root, overrides, folder, name, expected, untouched):
    """``expected``: {row: vector}; the other rows are as without a file."""
    config, layout, _, built = built_job(root, rank, world_size, overrides)
    before = gather_table(built.task, name).clone()
    manifest = build.scan(config.data, "train", layout)
    table_files.fill_tables(built, config.data, manifest, ranks_of(rank, world_size), folder)
    after = gather_table(built.task, name)
    rows = sorted(expected)
    assert torch.equal(after[rows], torch.tensor(np.stack([expected[row] for row in rows])))
    others = [row for row in range(len(after)) if row not in expected]
    assert torch.equal(after[others], before[others]) and len(others) == untouched


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise", "data_parallel"])
def test_rows_are_found_by_number_on_any_sharding(click_log, tmp_path, sharding):
    ids = [3, 150, 7, 199, 200, -1, 3, 11]  # a table of 200 rows
    vectors = write(tmp_path / "v.parquet", ids, DIM, null=7)
    expected = {150: vectors[1], 7: vectors[2], 199: vectors[3], 3: vectors[6]}  # the later one of two
    overrides = [
        "model=deepfm",
        FILE.format("item", tmp_path / "v.parquet", DIM),
        f"+sharding.by_table={{item: {sharding}}}",
    ]
    for world_size in (1, 2):
        if sharding in ("column_wise", "data_parallel") and world_size == 1:
            continue
        run_distributed(check_filled, world_size, click_log, overrides, tmp_path, "item", expected, 196)
        (report,) = json.loads((tmp_path / "initial_rows.json").read_text())
        assert {**report, "file": ""} == {
            **{"table": "item", "file": "", "vectors": 8, "outside": 2, "empty": 1, "rows": 4, "missing": 196}
        }


def test_rows_are_found_by_hash_and_by_vocabulary(click_log, tmp_path):
    ids = list(range(1000, 1120))
    vectors = write(tmp_path / "v.parquet", ids, DIM)
    hashed = rows_from_hashes(hash_ids(pa.array(ids, pa.int64())), 500)
    expected = {int(row): vector for row, vector in zip(hashed, vectors)}
    overrides = ["model=deepfm", FILE.format("user", tmp_path / "v.parquet", DIM)]
    run_distributed(check_filled, 2, click_log, overrides, tmp_path, "user", expected, 500 - len(expected))

    (tmp_path / "prepared" / "vocabulary").mkdir(parents=True)
    known = pa.table({"value": pa.array([f"t{i}" for i in range(20)]), "id": pa.array(range(2, 22))})
    pq.write_table(known, tmp_path / "prepared" / "vocabulary" / "tag.parquet")
    vectors = write(tmp_path / "tags.parquet", ["t3", "nobody", "t19"], DIM)
    overrides = [
        "model=deepfm",
        f"data.prepared={tmp_path / 'prepared'}",
        FILE.format("tag", tmp_path / "tags.parquet", DIM),
    ]
    run_distributed(check_filled, 2, click_log, overrides, tmp_path, "tag", {5: vectors[0], 21: vectors[2]}, 38)


def test_projected_rows_compute_on_two_ranks_what_they_do_unsharded(click_log, tmp_path):
    write(tmp_path / "v.parquet", list(range(40)), 6)
    for model, table in (("deepfm", "item"), ("din", "tag")):
        overrides = [f"model={model}", FILE.format(table, tmp_path / "v.parquet", 6)]
        run_distributed(check_against_unsharded, 2, click_log, overrides)


def test_pooled_rows_are_projected_and_nothing_else():
    tables = {"item": Table(9, init_from=VectorFile("f", dim=6)), "user": Table(9)}
    schema = Schema(embedding_dim=4, tables=tables, features={n: Feature("sparse", table=n) for n in tables})
    assert (schema.stored_dim("item"), schema.dim("item"), schema.stored_dim("user")) == (8, 4, 4)
    module, values = Projections(schema, ["item", "user"]), torch.randn(5, 8 + 4 + 4)
    made = module(KeyedTensor(["item@item", "user", "item@wide_item"], [8, 4, 4], values))
    (linear,) = module.linear.values()
    assert made.length_per_key() == [4, 4, 4] and made.keys() == ["item@item", "user", "item@wide_item"]
    np.testing.assert_allclose(
        made.values()[:, :4].detach(), values[:, :8] @ linear.weight.detach().T, rtol=1e-5, atol=1e-6
    )
    assert torch.equal(made.values()[:, 4:], values[:, 8:])


def test_a_frozen_projected_table_trains_nothing_but_the_map_and_exports(click_log, tmp_path):
    vectors = write(tmp_path / "v.parquet", list(range(150)), 6)
    options = [FILE.format("item", tmp_path / "v.parquet", 6), "data.schema.tables.item.freeze=true", "steps=4"]
    run = train(tiny.job(click_log, "model=deepfm", f"run.dir={tmp_path / 'run'}", *options))
    rows = run.embeddings("item")
    assert rows.shape == (200, 8) and np.array_equal(rows[:150, :6], vectors) and not rows[:150, 6:].any()
    again = train(
        tiny.job(click_log, "model=deepfm", f"run.dir={tmp_path / 'run'}", *options[:-1], "steps=6")
    )  # resumes
    assert np.array_equal(again.embeddings("item"), rows)
    learned = train(tiny.job(click_log, "model=deepfm", f"run.dir={tmp_path / 'b'}", options[0], "steps=4"))
    assert not np.array_equal(learned.embeddings("item"), rows)
    scorer = Scorer.load(export(again.path, tmp_path / "export"))
    table = pa.concat_tables(pq.read_table(path) for path in sorted((click_log / "test").glob("*.parquet")))
    np.testing.assert_allclose(probabilities(scorer.logits_of_rows(table)), again.predict(table), rtol=0, atol=1e-6)


def bad(log, tmp_path, *changes, model="deepfm", dim=DIM, name="item"):
    overrides = [
        f"model={model}",
        FILE.format(name, tmp_path / "v.parquet", dim),
        f"run.dir={tmp_path / 'run'}",
        *changes,
    ]
    train(tiny.job(log, *overrides))


def test_files_that_cannot_be(click_log, tmp_path):
    write(tmp_path / "v.parquet", [500, 501], DIM)
    with pytest.raises(UserError, match="no id of column 'key' of .* is in the table"):
        bad(click_log, tmp_path)
    write(tmp_path / "v.parquet", list(range(60)), DIM - 1)
    with pytest.raises(
        UserError, match="v.parquet, row 0: 'v' is no list of 8 finite numbers: mend the file, or set schema.tables"
    ):
        bad(click_log, tmp_path)
    table = pa.table({"key": range(60), "v": [[0.0] * DIM] * 53 + [[math.nan] * DIM] * 7})
    pq.write_table(table, tmp_path / "v.parquet", row_group_size=50)
    with pytest.raises(UserError, match="v.parquet, row 53: "):
        bad(click_log, tmp_path)
    write(tmp_path / "v.parquet", ["a", "b"], DIM)
    with pytest.raises(UserError, match="init_from.id: the file's ids are text, those of the training data number"):
        bad(click_log, tmp_path, name="user")
    with pytest.raises(
        UserError, match="reads 'item_id' id by id, which is not projected; give the table embedding_dim=8"
    ):
        bad(click_log, tmp_path, "data.schema.tables.item.embedding_dim=4", model="din")
    with pytest.raises(UserError, match="freeze leaves random rows as they are"):
        Schema(tables={"item": Table(9, freeze=True)})
    with pytest.raises(UserError, match="freeze and optim.by_table.item: leave out one"):
        bad(click_log, tmp_path, "data.schema.tables.item.freeze=true", "+optim.by_table={item: {name: sgd, lr: 1.0}}")
