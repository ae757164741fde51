"""Parquet files with values that cannot be used."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from data_loaders.loader import Loader
from data_loaders.manifest import Manifest
from data_loaders.schema import Feature, Schema, Table
from trainer.runtime.process import explanation

H_ROWS, T_ROWS = 1000, 50


def log(rows=30, first=0, **columns):
    """Row i is told by its dense feature ``row``. ``columns`` replace or add; None takes one out."""
    ids = list(range(first, first + rows))
    table = {
        "label": pa.array([i % 2 for i in ids], "int8"),
        "row": pa.array(ids, "int64"),
        "price": pa.array([0.5 * i for i in ids]),
        "item": pa.array([1 + i % 40 for i in ids], "int64"),
        "user": pa.array([f"user {i % 7}" for i in ids]),
        "past": pa.array([[1 + j % 40 for j in range(i % 4)] for i in ids], pa.list_(pa.int64())),
        "kinds": pa.array([[j % 9 for j in range(i % 4)] for i in ids], pa.list_(pa.int64())),
        **columns,
    }
    return pa.table({name: column for name, column in table.items() if column is not None})


def schema(on_bad_label="error", drop=(), **changes):
    """``changes``: keyword arguments by feature."""
    features = {
        "row": {"kind": "dense"},
        "price": {"kind": "dense"},
        "item": {"kind": "sparse", "table": "t"},
        "user": {"kind": "sparse", "table": "h", "ids": "hash"},
        "past": {"kind": "sequence", "table": "t", "max_length": 5, "target": "item", "history": "past"},
        "kinds": {"kind": "sequence", "table": "t", "max_length": 5, "target": "item", "history": "past"},
    }
    found = {
        name: Feature(**{**given, **changes.get(name, {})}) for name, given in features.items() if name not in drop
    }
    return Schema(on_bad_label=on_bad_label, tables={"t": Table(T_ROWS), "h": Table(H_ROWS)}, features=found)


def write(path, table, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **{"row_group_size": 10, **options})
    return path


@dataclass
class Read:
    """``rows``: one dict a row that came, padding left out: weight, label, and the features' values or lists of ids."""

    rows: list
    counters: dict
    batches: list

    def __getitem__(self, name):
        return [row[name] for row in self.rows]


GIVEN = {
    "batch_size": 8,
    "shards": 1,
    "shuffle": False,
    "shuffle_rows": 16,
    "threads": 1,
    "prefetch_batches": 2,
    "rank": 0,
    "world_size": 1,
    "seed": 0,
}


def loader(root, given=None, paths=(".",), **options):
    given = given or schema()
    layout = given.layout(crosses=True)
    manifest = Manifest.scan(list(paths), str(root), [given.label, *given.columns(layout)])
    return Loader(manifest, given, layout, **{**GIVEN, **options})


def read(root, given=None, epoch=0, **options):
    """All rows of an epoch, in file order unless ``shuffle``."""
    given = given or schema()
    one = loader(root, given, **options)
    batches = list(one.epoch(epoch))
    return Read([row for batch in batches for row in rows_of(batch, given)], one.counters, batches)


def rows_of(batch, given):
    dense = batch.dense.numpy()
    ids = {
        key: [part.tolist() for part in found.values().split(found.lengths().tolist())]
        for key, found in ((key, batch.sparse[key]) for key in batch.sparse.keys())
    }
    padding = slice(batch.cursor.local_rows, None)
    assert not batch.weights[padding].any() and not any(sum((found[padding] for found in ids.values()), []))
    for i in range(batch.cursor.local_rows):
        values = {name: float(dense[i, column]) for column, name in enumerate(given.dense)}
        yield {
            "weight": batch.weights[i].item(),
            "label": batch.labels[i].item(),
            **values,
            **{key: found[i] for key, found in ids.items()},
        }


def told(message, *parts):
    message = explanation(message)
    assert message and "Traceback" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    return message
