"""Small tables for the engines, and back."""

import itertools

import pyarrow as pa
import pyarrow.parquet as pq

_numbers = itertools.count()


def make(engine, folder, **columns):
    """A table of an engine from columns (lists, or Arrow arrays for types of their own), with ``__row`` and ``__part``."""
    arrays = {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()}
    rows = len(next(iter(arrays.values())))
    arrays.setdefault("__row", pa.array(range(rows), pa.int64()))
    arrays.setdefault("__part", pa.array([0] * rows, pa.int64()))
    path = folder / f"table-{next(_numbers)}.parquet"
    pq.write_table(pa.table(arrays), path)
    return engine.backend.read_parquet(str(path))


def rows(engine, table):
    """A table's rows, in raw order, as dictionaries."""
    return sorted(engine.fetch(table).to_pylist(), key=lambda row: (row["__row"], row["__part"]))


def column(engine, table, name):
    return [row[name] for row in rows(engine, table)]
