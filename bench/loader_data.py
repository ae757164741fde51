"""The data of ``bench.loader`` and of its peers: logs made once, from fixed seeds, as Parquet."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bench.harness import made
from bench.prepare_logs import CARDINALITIES
from bench.prepare_logs import CATEGORIES as IDS
from bench.prepare_logs import NUMBERS as DENSE
from data_loaders.footer_checks import ROW_ORDER, shuffled_mark
from data_loaders.loader import Loader
from data_loaders.manifest import Manifest
from data_loaders.schema import Feature, Layout, Schema, Table

BATCH_SIZE = 8192
ROW_GROUP = 1 << 17
# The trainer's defaults (``trainer.config.data.StreamConfig``).
STREAM = {"shards": 64, "shuffle": True, "shuffle_rows": 1 << 18, "threads": 1, "prefetch_batches": 4}
CRITEO_FILES, CRITEO_NULLS_FILES, SEQUENCE_FILES, PEERS_FILES = 8, 4, 4, 2
CRITEO_ROWS = 4 * ROW_GROUP  # of a file
ITEMS, CATEGORIES, MEAN_LENGTH = 1_000_000, 1000, 50
SMALL_ROW_GROUP = ROW_GROUP // 32  # of the shuffle section, in which everything is 1/32 of the criteo section's


@dataclass(frozen=True)
class Data:
    """Parquet files of one folder, and what their columns mean."""

    folder: Path
    schema: Schema
    layout: Layout

    @property
    def files(self) -> list[str]:
        return sorted(map(str, self.folder.glob("*.parquet")))

    @property
    def num_rows(self) -> int:
        return sum(pq.read_metadata(path).num_rows for path in self.files)

    def loader(self, **changes: Any) -> Loader:
        """One rank of one, with the trainer's defaults but for ``changes``."""
        columns = (self.schema.label, *self.schema.columns(self.layout))
        manifest = Manifest.scan([str(self.folder)], str(self.folder), columns)
        settings = {"batch_size": BATCH_SIZE, "rank": 0, "world_size": 1, "seed": 1} | STREAM | changes
        return Loader(manifest, self.schema, self.layout, **settings)


def described(data: Data) -> dict[str, Any]:
    footers = [pq.read_metadata(path) for path in data.files]
    mb = sum(os.path.getsize(path) for path in data.files) / 1e6
    groups = sum(footer.num_row_groups for footer in footers)
    return {"data": f"{data.num_rows:,} rows, {len(footers)} files, {groups} row groups, {mb:,.0f} MB", **STREAM}


def criteo_data(root: Path, kind: str) -> Data:
    """``kind``: int64 (nullable columns, snappy, dictionaries: pyarrow's defaults), prepared (int32, NOT NULL, plain,
    uncompressed; the same values), preshuffled (the same, marked as shuffled: these rows are random anyway) or nulls (int64
    with 0 to 75 % nulls in each feature; half as many rows)."""
    folder = made(root / "criteo-marked", write_criteo)
    return Data(folder / kind, criteo_schema(fill=0.0 if kind == "nulls" else None), Layout(IDS))


def criteo_schema(fill: float | None = None) -> Schema:
    tables = {name: Table(num_embeddings=max(size, 2)) for name, size in zip(IDS, CARDINALITIES)}
    dense = {name: Feature(kind="dense", fill=fill) for name in DENSE}
    ids = {name: Feature(kind="sparse", table=name) for name in IDS}
    return Schema(tables=tables, features={**dense, **ids})


def write_criteo(folder: Path) -> None:
    for number in range(CRITEO_FILES):
        rng = np.random.default_rng([1, number])
        table = criteo_table(rng, CRITEO_ROWS)
        name = f"part-{number}.parquet"
        write(table, folder / "int64" / name)
        narrow = pa.schema([pa.field(column, pa.int32(), nullable=False) for column in table.column_names])
        for kind in ("prepared", "preshuffled"):
            path, marked = folder / kind / name, kind == "preshuffled"
            write(table.cast(narrow), path, marked=marked, use_dictionary=False, compression="none")
        if number < CRITEO_NULLS_FILES:
            write(with_nulls(table, rng), folder / "nulls" / name)


def criteo_table(rng: np.random.Generator, rows: int) -> pa.Table:
    columns: dict[str, NDArray[np.int64]] = {"label": (rng.random(rows) < 0.25).astype(np.int64)}
    for index, name in enumerate(DENSE):
        columns[name] = np.exp(rng.normal(index / 2, 1.5, rows)).astype(np.int64)  # counts with a long tail
    for name, cardinality in zip(IDS, CARDINALITIES):
        columns[name] = zipf(rng, rows, cardinality)
    return pa.table(columns)


def zipf(rng: np.random.Generator, rows: int, cardinality: int) -> NDArray[np.int64]:
    """Ids of which the k-th most frequent has a probability of about 1/k; frequent ones lie anywhere in the table."""
    rank = (cardinality ** rng.random(rows)).astype(np.int64) - 1
    return rank * 2_654_435_761 % cardinality  # a prime: no two ranks meet


def with_nulls(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    columns = {}
    for index, name in enumerate(table.column_names):
        share = 0 if name == "label" else index % 4 / 4
        columns[name] = pa.array(table[name].to_numpy(), mask=rng.random(table.num_rows) < share)
    return pa.table(columns)


def sequence_data(root: Path) -> Data:
    """Label, an item and its category, and the histories of both: 0 to 100 events."""
    schema = Schema(
        tables={"item": Table(num_embeddings=ITEMS), "category": Table(num_embeddings=CATEGORIES)},
        features={
            "item": Feature(kind="sparse", table="item"),
            "category": Feature(kind="sparse", table="category"),
            "items": history("item"),
            "categories": history("category"),
        },
    )
    return Data(made(root / "sequence", write_sequences), schema, schema.layout(attention=True))


def history(target: str) -> Feature:
    return Feature(kind="sequence", table=target, target=target, history="events", max_length=2 * MEAN_LENGTH)


def write_sequences(folder: Path) -> None:
    rows = 2 * ROW_GROUP
    for number in range(SEQUENCE_FILES):
        rng = np.random.default_rng([2, number])
        offsets = np.zeros(rows + 1, np.int32)
        offsets[1:] = np.cumsum(rng.integers(0, 2 * MEAN_LENGTH + 1, rows))
        columns = {
            "label": rng.integers(0, 2, rows),
            "item": zipf(rng, rows, ITEMS),
            "category": zipf(rng, rows, CATEGORIES),
            "items": pa.ListArray.from_arrays(offsets, zipf(rng, int(offsets[-1]), ITEMS)),
            "categories": pa.ListArray.from_arrays(offsets, zipf(rng, int(offsets[-1]), CATEGORIES)),
        }
        write(pa.table(columns), folder / f"part-{number}.parquet")


def numbered_data(root: Path, row_groups: int, *, shuffled: bool = False) -> Data:
    """One file whose rows are numbered from 0, in small row groups; ``shuffled`` as ``prepare`` does it."""

    def write_numbers(folder: Path) -> None:
        numbers = np.arange(row_groups * SMALL_ROW_GROUP)
        if shuffled:
            numbers = np.random.default_rng(3).permutation(numbers)
        table = pa.table({"label": numbers % 2, "row": numbers})
        write(table, folder / "part-0.parquet", marked=shuffled, row_group_size=SMALL_ROW_GROUP)

    schema = Schema(
        tables={"row": Table(num_embeddings=row_groups * SMALL_ROW_GROUP)},
        features={"row": Feature(kind="sparse", table="row")},
    )
    name = f"{'shuffled' if shuffled else 'numbered'}-{row_groups}"
    return Data(made(root / name, write_numbers), schema, Layout(("row",)))


def peers_files(root: Path, rows: int, row_groups: int) -> Path:
    """A folder with the first row groups of the first files of criteo's int64 data, again as Parquet and as NumPy's npz,
    which one of the peers reads: parquet/, blocks/ (a file each) and one.npz (all rows)."""
    source = criteo_data(root, "int64")

    def write_peers(folder: Path) -> None:
        tables = [pq.read_table(path).slice(0, rows * row_groups) for path in source.files[:PEERS_FILES]]
        for number, table in enumerate(tables):
            write(table, folder / "parquet" / f"part-{number}.parquet", row_group_size=rows)
            write_npz(table, folder / "blocks" / f"part-{number}.npz")
        write_npz(pa.concat_tables(tables), folder / "one.npz")

    return made(root / f"peers-{rows}x{row_groups}", write_peers)


def write_npz(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: table[name].to_numpy() for name in table.column_names})


def several_times(folder: Path, times: int) -> Path:
    """The files of a folder under several names each: as many times the data, on no more of the disk."""

    def link(target: Path) -> None:
        target.mkdir(parents=True)
        for path in folder.glob("*.parquet"):
            for copy in range(times):
                os.link(path, target / f"{path.stem}-{copy}.parquet")

    return made(folder.parent / f"{folder.name}-{times}-times", link)


def write(
    table: pa.Table, path: Path, *, marked: bool = False, row_group_size: int = ROW_GROUP, **options: Any
) -> None:
    """``marked``: as shuffled by ``prepare``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        writer.write_table(table, row_group_size=row_group_size)
        if marked:
            writer.add_key_value_metadata({ROW_ORDER.decode(): shuffled_mark(table.num_rows).decode()})
