"""Which row of the new table was which row of the old one: raw value -> old id -> new id.

A vocabulary is ``vocabulary/<table>.parquet`` of a folder that ``clicktrainer prepare`` made, with columns value and id;
ids begin at ``FIRST_ID``, the rows below belong to missing and unknown values on both sides.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_loaders.errors import UserError
from data_loaders.prepare.declaration import FIRST_ID


@dataclass(frozen=True)
class Ids:
    """``rows`` [new rows] int64: the old row of each new one, -1 for none; None: every old row stays where it is.
    ``moved``: whether any value has another id than before. ``known``, ``kept``: how many ids the old table had, and how
    many of them the new one has."""

    rows: NDArray[np.int64] | None
    moved: bool
    known: int
    kept: int


def unmoved(old_rows: int) -> Ids:
    """Of a table whose every row stays."""
    return Ids(None, False, old_rows, old_rows)


@dataclass(frozen=True)
class Vocabularies:
    """The prepared folders of both runs, where they have one."""

    old: Path | None = None
    new: Path | None = None
    _followed: dict[tuple[Path, Path, int, int], Ids] = field(default_factory=dict, repr=False)

    def files(self, old_table: str, new_table: str) -> tuple[Path | None, Path | None]:
        """The vocabulary files of a table, None for what is not there."""
        return vocabulary_file(self.old, old_table), vocabulary_file(self.new, new_table)

    def follow(self, *way: Any) -> Ids:
        """As the function ``follow``; once for all tables that share a vocabulary."""
        if way not in self._followed:
            self._followed[way] = follow(*way)
        return self._followed[way]


def follow(old_file: Path, new_file: Path, old_rows: int, new_rows: int) -> Ids:
    """The way of each id from one vocabulary to the other. Raises ``UserError`` where a file is no vocabulary of a table
    of so many rows, or their values are of different types."""
    old, new = read_vocabulary(old_file, old_rows), read_vocabulary(new_file, new_rows)
    if old.schema.field("value").type != new.schema.field("value").type:
        kinds = [str(table.schema.field("value").type) for table in (old, new)]
        raise UserError(
            f"the values of {old_file} are {kinds[0]}, those of {new_file} {kinds[1]}: skip the table (warm_start.skip), or "
            "prepare the data with the type of before"
        )
    # Where each new value is among the old ones, null for nowhere. (A join took ten times as long.)
    places = pc.index_in(new.column("value"), value_set=old.column("value"))
    known = places.is_valid().to_numpy()
    before = old.column("id").to_numpy()[places.drop_null().to_numpy()]
    ids = new.column("id").to_numpy()[known]
    moved = bool((ids != before).any())
    if not moved and len(ids) == len(old) and new_rows >= old_rows:
        return Ids(None, False, len(old), len(old))
    rows = np.full(new_rows, -1, np.int64)
    rows[:FIRST_ID] = np.arange(FIRST_ID)
    rows[ids] = before
    return Ids(rows, moved, len(old), len(ids))


def vocabulary_file(folder: Path | None, table: str) -> Path | None:
    """Of a prepared folder; None where it has none for this table."""
    path = None if folder is None else folder / "vocabulary" / f"{table}.parquet"
    return path if path is not None and path.is_file() else None


def read_vocabulary(path: Path, rows: int) -> pa.Table:
    """(value, id) of a vocabulary whose ids fit a table of ``rows`` rows, each once."""
    table = pq.read_table(path, columns=["value", "id"])
    value = table.column("value")
    if pa.types.is_string(value.type):
        table = table.set_column(0, "value", value.cast(pa.large_string()))
    ids = table.column("id").to_numpy()
    if len(ids) and (ids.min() < FIRST_ID or ids.max() >= rows):
        raise UserError(
            f"{path} has ids {ids.min()} … {ids.max()}, its table rows {FIRST_ID} … {rows - 1}: name the folder that the "
            "run's data come from (data.prepared, warm_start.prepared)"
        )
    if len(np.unique(ids)) < len(ids) or pc.count_distinct(value).as_py() < len(ids):
        raise UserError(f"{path} is damaged: a value or an id is there twice; prepare the data again")
    return table
