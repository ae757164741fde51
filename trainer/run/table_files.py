"""Initial rows of tables from files of vectors (``tables.….init_from``): matched by id, into the shards that this rank holds.

Every rank reads the file, a few thousand rows at a time, and keeps what is its own; no rank holds the file or a table. Where two
ids share a row, as hashed ones may, the later one in the file has it.

Letters: N rows of a part of the file, K entries of a vector.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data_loaders.arrow import flat, is_integer, null_mask, numbers, type_kind
from data_loaders.column_decoders import Counters, RowError, Source, Vectors
from data_loaders.column_types import check_types
from data_loaders.errors import UserError
from data_loaders.hashing import hash_ids, rows_from_hashes
from data_loaders.manifest import Manifest
from data_loaders.messages import note
from data_loaders.reader import Handle, RowGroups
from data_loaders.schema import Feature, Layout, Schema
from data_loaders.state_files import write_json
from trainer.config.data import DataConfig
from trainer.run.build import Built
from trainer.runtime.distributed import Ranks, from_first
from trainer.runtime.run_folder import INITIAL_ROWS
from trainer.sharding.initialize import local_shards
from trainer.sharding.table_plan import TablePlan
from trainer.warm_start.vocabularies import read_vocabulary, vocabulary_file

READ_ROWS = 1 << 13
NOWHERE = -1

RowsOf = Callable[[pa.Array], NDArray[np.int64]]


@dataclass
class Found:
    """What became of the vectors of a file: how many there are, how many of ids outside the table, and without an id or a
    vector; and of the ``rows`` of the table how many have one, and how many keep their other initial values."""

    table: str
    file: str
    vectors: int = 0
    outside: int = 0
    empty: int = 0
    rows: int = 0
    missing: int = 0
    filled: list[Tensor] = field(default_factory=list, repr=False)  # of the shards of this rank, bool [their rows]

    def read(self, vectors: int, empty: int) -> None:
        self.vectors += vectors
        self.empty += empty

    def leave_out(self, vectors: int) -> None:
        self.outside += vectors

    def count(self, table: TablePlan, columns: list[int]) -> None:
        """The rows, over all ranks; shards of the same rows, which begin at other ``columns``, count once."""
        mine = sum(int(filled.sum()) for column, filled in zip(columns, self.filled, strict=True) if column == 0)
        total = torch.tensor(mine)
        if dist.get_world_size() > 1 and not table.data_parallel:
            dist.all_reduce(total)
        self.rows, self.missing = int(total), table.rows - int(total)

    def line(self) -> str:
        return (
            f"table '{self.table}': {self.rows:,} rows from {self.vectors:,} vectors of {self.file} ({self.outside:,} of ids "
            f"outside the table, {self.empty:,} without id or vector); {self.missing:,} rows without one"
        )

    def facts(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "filled"}


def fill_tables(built: Built, data: DataConfig, trained: Manifest, ranks: Ranks, folder: Path | None = None) -> None:
    """Writes the rows of all tables with ``init_from``, after their other initial values; rank 0 says what was found, and
    writes it into ``folder``. ``trained``: the training data. Raises ``UserError`` on every rank."""
    state = built.task.state_dict()
    report = []
    for table in built.tables:
        if table.name in data.schema.tables and data.schema.tables[table.name].init_from.file:
            report.append(_fill(table, state[table.parameter], data, trained))
            if ranks.is_first:
                note(report[-1].line())
    if report and folder is not None and ranks.is_first:
        write_json(folder / INITIAL_ROWS, [found.facts() for found in report])


def _fill(table: TablePlan, weight: Tensor, data: DataConfig, trained: Manifest) -> Found:
    source = data.schema.tables[table.name].init_from
    manifest = from_first(lambda: Manifest.scan([source.file], data.root, [source.id, source.vector]))
    rows_of = _rows_of(table.name, data, manifest, trained)
    shards = local_shards(weight)
    filled = [torch.zeros(len(values), dtype=torch.bool) for values, *_ in shards]
    found = Found(table.name, source.file, filled=filled)
    for ids, vectors in _vectors(table.name, data.schema, manifest, found):
        rows = rows_of(ids)
        outside = (rows < 0) | (rows >= table.rows)
        found.leave_out(int(outside.sum()))
        rows, vectors = _last_of_each(rows[~outside], vectors[~outside])
        for (values, row, column), filled in zip(shards, found.filled, strict=True):
            _write(values, row, column, filled, rows, vectors)
    found.count(table, [column for _, _, column in shards])
    if not found.rows:
        raise UserError(
            f"schema.tables.{table.name}.init_from: no id of column '{source.id}' of {source.file} is in the table: give ids as "
            "the training data have them (with a vocabulary, data.prepared, raw values)"
        )
    return found


def _write(
    values: Tensor, row: int, column: int, filled: Tensor, rows: NDArray[np.int64], vectors: NDArray[np.float32]
) -> None:
    """What of [N, K] lies in the shard; columns beyond K are 0."""
    mine = (rows >= row) & (rows < row + len(values))
    places = torch.from_numpy(rows[mine] - row)
    own = torch.zeros(len(places), values.shape[1])
    part = torch.from_numpy(vectors[mine][:, column : column + values.shape[1]])
    own[:, : part.shape[1]] = part
    values.index_copy_(0, places.to(values.device), own.to(values))
    filled[places] = True


def _vectors(
    table: str, schema: Schema, manifest: Manifest, found: Found
) -> Iterator[tuple[pa.Array, NDArray[np.float32]]]:
    """Ids [N] and vectors [N, K] of the file, part by part. Raises ``UserError`` for a vector of another width, or one that is
    not finite."""
    source, where = schema.tables[table].init_from, f"tables.{table}.init_from"
    dim = source.dim or schema.dim(table)
    feature = Feature("vector", column=source.vector, dim=dim, on_null="drop", on_non_finite="error")
    alone = Schema(features={where: feature})
    groups, handle, begin = RowGroups(manifest, [source.id, source.vector], set()), Handle(), 0
    for _, types in manifest.types([source.vector]):
        check_types(alone, Layout(()), types, labeled=False)
    decode = Vectors(where, alone, Counters()).decode
    for number in range(groups.count):
        for part in groups.read(number, READ_ROWS, handle):
            rows = Source(part, 0)
            try:
                vectors = decode(rows)
            except RowError as error:
                raise UserError(
                    f"{source.file}, row {begin + error.row}: '{source.vector}' is no list of {dim} finite numbers: mend the "
                    f"file, or set schema.{where}.dim (not given: the table's embedding_dim) to what it holds"
                ) from None
            ids = flat(part.column(source.id))
            kept = np.ones(len(ids), bool) if rows.dropped is None else ~rows.dropped
            if (nulls := null_mask(ids)) is not None:
                kept &= ~nulls
            begin += len(ids)
            found.read(len(ids), int((~kept).sum()))
            yield ids.filter(pa.array(kept)), vectors[kept]


def _rows_of(table: str, data: DataConfig, manifest: Manifest, trained: Manifest) -> RowsOf:
    """What makes rows of ids [N], ``NOWHERE`` for one without. Raises ``UserError`` where they cannot be told."""
    schema, source, where = data.schema, data.schema.tables[table].init_from, f"schema.tables.{table}.init_from"
    rows = schema.tables[table].num_embeddings
    kinds = {type_kind(types[source.id]) for _, types in manifest.types([source.id])}
    vocabulary = vocabulary_file(Path(data.prepared), table) if data.prepared else None
    if vocabulary is not None:
        known = read_vocabulary(vocabulary, rows)
        _check_kind(where, kinds, type_kind(known.schema.field("value").type))
        return lambda ids: _known(ids, known)
    readers = [name for name, feature in schema.features.items() if feature.table == table]
    modes = {schema.features[name].ids for name in readers}
    if len(modes) > 1:
        raise UserError(
            f"{where}: some features of the table hash their ids and others do not: give the table one of the two"
        )
    if modes == {"hash"}:
        (types, *_) = (types for _, types in trained.types([schema.column(readers[0])]))
        kind = type_kind(types[schema.column(readers[0])]).removeprefix("list of ")
        _check_kind(where, kinds, kind)
        return lambda ids: rows_from_hashes(hash_ids(ids), rows)
    _check_kind(where, kinds, "number")
    return _numbers


def _numbers(ids: pa.Array) -> NDArray[np.int64]:
    if not is_integer(ids.type):
        raise UserError(f"init_from.id: the ids are {ids.type}, but rows of the table are numbered: give integers")
    found = numbers(ids)
    return (
        np.where(found > np.iinfo(np.int64).max, NOWHERE, found).astype(np.int64)
        if found.dtype == np.uint64
        else found.astype(np.int64)
    )


def _known(ids: pa.Array, vocabulary: pa.Table) -> NDArray[np.int64]:
    value = vocabulary.column("value")
    places = pc.index_in(ids.cast(value.type), value_set=value).fill_null(NOWHERE).to_numpy(zero_copy_only=False)
    return np.where(places >= 0, vocabulary.column("id").to_numpy()[places], NOWHERE).astype(np.int64)


def _check_kind(where: str, kinds: set[str], expected: str) -> None:
    """Ids are hashed and looked up by their type: 7 and "7" are two ids."""
    if kinds != {expected}:
        found = ", ".join(sorted(kinds))
        raise UserError(
            f"{where}.id: the file's ids are {found}, those of the training data {expected}: give them that type"
        )


def _last_of_each(
    rows: NDArray[np.int64], vectors: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Each row once, with the last of its vectors."""
    kept, first = np.unique(rows[::-1], return_index=True)
    return kept, vectors[::-1][first]
