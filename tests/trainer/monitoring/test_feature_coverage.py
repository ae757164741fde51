"""What batches held, against counting by hand."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_loaders.batch import Cursor
from data_loaders.hashing import mix, rows_from_hashes
from data_loaders.loader import Loader
from data_loaders.manifest import Manifest
from data_loaders.schema import Feature, Layout, Schema, Table
from tests.helpers import tiny
from trainer.monitoring.feature_coverage import LOOK_EVERY, ROWS_WATCHED, FeatureCoverage, Hashed, is_sampled

CPU = torch.device("cpu")


def looked_at(root, schema, layout):
    """FeatureCoverage of one epoch, and the batches that were looked at."""
    manifest = Manifest.scan(["train"], str(root), [])
    options = {"batch_size": 240, "shards": 4, "shuffle": True, "shuffle_rows": 3000, "threads": 1, "seed": 1}
    loader = Loader(manifest, schema, layout, **options, prefetch_batches=2, rank=0, world_size=1)
    seen, batches = FeatureCoverage(schema, layout, CPU), []
    for batch in loader.epoch(0):
        seen.look(batch)
        if batch.cursor.step % LOOK_EVERY == 0:
            batches.append(batch)
    return seen, batches


def test_counts_are_those_of_the_batches_looked_at(click_log):
    schema = tiny.job(click_log).config.data.schema
    layout = schema.layout(crosses=True, attention=True)
    seen, batches = looked_at(click_log, schema, layout)
    found = seen.compute(lambda sums: sums)
    assert len(batches) == 3 and found.rows == sum(int((batch.weights > 0).sum()) for batch in batches) == 720
    rows = {}
    for key in (*layout.pooled, *layout.unpooled):
        ids = [(b.sparse if key in layout.pooled else b.sequence)[key].values() for b in batches]
        rows[key] = torch.cat(ids)
        missing = 0 if key in ("user_id", "hour_x_category") else -1
        assert found.present[key] == int((rows[key] != missing).sum()) > 0
    price = torch.cat([batch.dense[:, schema.dense.index("price")] for batch in batches])
    assert found.present["price"] == int((price != 0).sum()) and "age" not in found.present, "age has no fill"
    occupied = {key: len(rows[key][rows[key] > 0].unique()) for key in ("user_id", "hour_x_category")}
    assert found.hashed == [
        Hashed("user", 499, 499, occupied["user_id"]),
        Hashed("hour_x_category", 299, 299, occupied["hour_x_category"]),
    ]


def test_what_is_never_there_is_not_counted(tmp_path):
    root = tiny.write_log(tmp_path / "log")
    for path in (root / "train").glob("*.parquet"):
        table = pq.read_table(path)
        for name in ("user_id", "price", "tags"):
            nothing = pa.nulls(len(table), table.schema.field(name).type)
            table = table.set_column(table.column_names.index(name), name, nothing)
        pq.write_table(table, path)
    schema = tiny.job(root).config.data.schema
    seen, _ = looked_at(root, schema, schema.layout(crosses=True))
    present = seen.compute(lambda sums: sums).present
    assert {name for name, count in present.items() if not count} == {"user_id", "price", "tags"}


@pytest.mark.parametrize("share", [0.3, 1.0, 2.5])
def test_the_number_of_values_follows_from_the_rows_they_fill(share):
    """Of 100,000 rows 1024 are watched: occupied is a share 1 - e^-t of them, up to a binomial error, which is one of
    sqrt((e^t - 1) / 1024) of t."""
    rows = 100_001
    schema = Schema("label", embedding_dim=4, tables={"t": Table(rows)}, features={"f": _hash("t")})
    seen = FeatureCoverage(schema, Layout(("f",)), CPU)
    values = rows_from_hashes(mix(np.arange(int(share * rows), dtype=np.uint64)), rows)
    occupied = len(np.unique(values[values <= ROWS_WATCHED]))
    seen.sums[seen._first + torch.arange(occupied)] = 1
    (found,) = seen.compute(lambda sums: sums).hashed
    error = math.sqrt((math.exp(share) - 1) / ROWS_WATCHED) / share
    assert found.values == pytest.approx(share * rows, rel=3 * error)


def _hash(table):
    return Feature("sparse", table=table, ids="hash")


def test_a_table_that_plain_ids_share_is_not_taken_for_hashed():
    tables, both = {"t": Table(10), "u": Table(10)}, {"a": _hash("t"), "b": Feature("sparse", table="t")}
    schema = Schema(embedding_dim=4, tables=tables, features={**both, "c": _hash("u"), "d": _hash("u")})
    seen = FeatureCoverage(schema, Layout(("a", "b", "c", "d")), CPU)
    assert [table.name for table in seen.compute(lambda sums: sums).hashed] == ["u"]


def test_looks_become_rarer():
    def sampled(epoch, steps):
        return [step for step in range(1, steps + 1) if is_sampled(Cursor(epoch, step, rows=1, local_rows=1))]

    assert sampled(0, 450) == [*range(4, 257, 4), 320, 384, 448]
    assert sampled(1, 130) == [64, 128]
