"""Tables: what becomes of each, and how old rows get into the new one's shards.

Rows are read in slabs, whatever the size of the table; those of a table whose ids have moved in the old order, of each slab
the rows that this shard holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.checkpoint.format import Reader, convert_widths
from trainer.checkpoint.piece import Piece
from trainer.config.optim import TableOptimizerConfig
from trainer.modules.embeddings import is_wide_table
from trainer.warm_start.matching import DROPPED, GROWN, KEPT, NEW, REMAPPED, Matching
from trainer.warm_start.sides import Side
from trainer.warm_start.vocabularies import Ids, unmoved

SLAB_BYTES = 64 << 20
FTRL = "ftrl"


@dataclass(frozen=True)
class TableTransfer:
    """``source``: the old table. ``factor``: what optimizer state is multiplied by; None: it starts anew. ``linear``:
    whether FTRL's state, in the rows themselves, is part of the old table or of the new one."""

    table: str
    source: str | None
    status: str
    old_rows: int
    new_rows: int
    ids: Ids | None
    factor: float | None
    has_state: bool
    linear: bool = False

    @property
    def rows_kept(self) -> int:
        """Rows that come from the old table."""
        if self.ids is None:
            return 0
        return self.old_rows if self.ids.rows is None else int((self.ids.rows >= 0).sum())


def plan_tables(matching: Matching) -> list[TableTransfer]:
    found = [_plan(matching, table) for table in sorted(matching.new.tables)]
    used = {plan.source for plan in found}
    for table in sorted(set(matching.old.tables) - used):
        _check_lost(matching, table)
        found.append(TableTransfer(table, None, DROPPED, matching.old.rows(table), 0, None, None, has_state=False))
    return found


def load_table(plan: TableTransfer, piece: Piece, reader: Reader, wide: TableOptimizerConfig) -> None:
    """Writes the old rows of a weight or state into the rectangle that ``piece`` holds. ``wide``: the new run's optimizer
    of linear weights."""
    state = piece.name.rpartition("/")[2]
    if plan.source is None or (state != "weight" and plan.factor is None):
        return
    name = f"tables/{plan.source}/{state}"
    for rows, values in _old_rows(plan, name, piece, reader):
        if state != "weight" and plan.factor != 1:
            values = values * plan.factor
        if state == "weight" and plan.linear and plan.factor != 1:
            values = _linear_rows(values, plan.factor or 0.0, wide)
        _write(piece, rows, values)


def load_clock(plan: TableTransfer, piece: Piece, reader: Reader) -> None:
    """Rows that come from the old table were trained when it says; nobody knows when, where it had no clock."""
    name = f"clock/{plan.source}"
    if plan.source is not None and name in reader.entries:
        for rows, values in _old_rows(plan, name, piece, reader):
            _write(piece, rows, values)


def _write(piece: Piece, rows: Tensor | slice, values: Tensor) -> None:
    if isinstance(rows, slice):
        piece.tensor[rows] = values.to(piece.tensor)
    else:
        piece.tensor.index_copy_(0, rows.to(piece.tensor.device), values.to(piece.tensor))


# What becomes of a table.


def _plan(matching: Matching, table: str) -> TableTransfer:
    name, new = f"tables/{table}", matching.new
    readers, rows = new.readers(table), new.rows(table)
    fresh = TableTransfer(table, None, NEW, 0, rows, None, None, has_state=_has_state(new, table))
    if matching.skips(name, readers):
        return fresh
    source = matching.source_table(table)
    if source is None:
        if not matching.explained_by_features(readers, new):
            matching.new_one(name, (f"tables/{old}" for old in matching.old.tables))
        return fresh
    old_rows = matching.old.rows(source)
    ids = _ids(matching, table, source)
    if not _comparable(matching, table, source) or ids is None:
        return TableTransfer(table, source, NEW, old_rows, rows, None, None, has_state=False)
    factor, linear = _state(matching, table, source)
    status = REMAPPED if ids.rows is not None else GROWN if rows > old_rows else KEPT
    return TableTransfer(table, source, status, old_rows, rows, ids, factor, _has_state(new, table) or linear, linear)


def _comparable(matching: Matching, table: str, source: str) -> bool:
    """Rows of another type are rounded to it."""
    before, now = (
        side.tables[name]["weight"].shape[1] for side, name in ((matching.old, source), (matching.new, table))
    )
    if before != now:
        matching.problem(f"tables/{table}", f"has {now} columns, had {before}", f"skip: ['tables/{table}']")
    return before == now


def _state(matching: Matching, table: str, source: str) -> tuple[float | None, bool]:
    """(factor, whether FTRL has a part in it)."""
    old, new = matching.old, matching.new
    names = [side.optimizers.get(name) for side, name in ((old, source), (new, table))]
    differ = f"{names[0]}, now {names[1]}" if None not in names and names[0] != names[1] else None
    before, now = (
        {key: spec for key, spec in side.tables[name].items() if key != "weight"}
        for side, name in ((old, source), (new, table))
    )
    return matching.state(f"tables/{table}", before, now, differ), is_wide_table(table) and FTRL in names


def _ids(matching: Matching, table: str, source: str) -> Ids | None:
    """None where it is recorded as a problem."""
    name, new, old = f"tables/{table}", matching.new, matching.old
    rows, old_rows = new.rows(table), old.rows(source)
    problem = _hashed_differently(matching, table, source)
    if problem:
        matching.problem(name, problem, f"skip: ['{name}']")
        return None
    if _is_hashed(new, table):
        return unmoved(old_rows)
    files = matching.vocabularies.files(old.vocabulary(source), new.vocabulary(table))
    if None not in files:
        return matching.vocabularies.follow(*files, old_rows, rows)
    by_rule = matching.grows(name)
    remedy = f"grow: ['{name}'] if no id has moved, else name both runs' vocabularies, or skip: ['{name}']"
    if rows < old_rows:
        matching.problem(
            name, f"has {rows:,} rows, had {old_rows:,}", f"name both runs' vocabularies, or skip: ['{name}']"
        )
    elif any(files) and not by_rule:
        matching.problem(name, f"has a vocabulary in the {'old' if files[0] else 'new'} run only", remedy)
    elif rows > old_rows and not by_rule:
        matching.problem(name, f"has {rows:,} rows, had {old_rows:,}, and no vocabulary shows its ids", remedy)
    else:
        return unmoved(old_rows)
    return None


def _is_hashed(side: Side, table: str) -> bool:
    return any(key in side.schema.crosses or side.schema.features[key].ids == "hash" for key in side.readers(table))


def _hashed_differently(matching: Matching, table: str, source: str) -> str | None:
    """What makes the hash of a value another row than before, None where nothing does."""
    old, new = matching.old, matching.new
    if _is_hashed(new, table) != _is_hashed(old, source):
        return "has hashed ids in one of the runs only"
    if not _is_hashed(new, table):
        return None
    if new.rows(table) != old.rows(source):
        return f"has hashed ids and {new.rows(table):,} rows, had {old.rows(source):,}, which sends every id elsewhere"
    crossed = [(side.readers(name), side.schema) for side, name in ((new, table), (old, source))]
    (now, schema), (before, old_schema) = (
        ([part for key in keys if key in schema.crosses for part in schema.crosses[key].columns], schema)
        for keys, schema in crossed
    )
    if [matching.source_part(part) for part in now] != before:
        return f"crosses {now}, crossed {before}"
    for part, was in zip(now, before):
        if schema.features[part].ids == old_schema.features[was].ids == "hash":
            continue
        files = matching.vocabularies.files(old_schema.features[was].table, schema.features[part].table)
        sizes = old_schema.num_embeddings(was), schema.num_embeddings(part)
        other_kind = schema.features[part].ids != old_schema.features[was].ids
        if other_kind or (None not in files and matching.vocabularies.follow(*files, *sizes).moved):
            return f"crosses '{part}', whose ids have moved"
    return None


def _has_state(side: Side, table: str) -> bool:
    return len(side.tables[table]) > 1 or side.optimizers.get(table) == FTRL


def _check_lost(matching: Matching, table: str) -> None:
    name, readers = f"tables/{table}", matching.old.readers(table)
    skipped = table in matching.new.tables and matching.skips(name, matching.new.readers(table))
    explained = matching.explained_by_features(readers, matching.old)
    if not (skipped or explained or matching.drops(name, readers)):
        matching.lost_one(name)


# Rows.


def _old_rows(plan: TableTransfer, name: str, piece: Piece, reader: Reader) -> Iterator[tuple[Tensor | slice, Tensor]]:
    """(rows of the piece, their old values [rows, columns of the piece]), slab by slab."""
    height = max(1, SLAB_BYTES // (reader.dtype(name).itemsize * reader.shape(name)[1]))
    first, count = piece.offset[0] if piece.tensor.numel() else 0, len(piece.tensor)
    assert plan.ids is not None
    if plan.ids.rows is None:
        for row in range(first, min(first + count, plan.old_rows), height):
            end = min(row + height, first + count, plan.old_rows)
            yield slice(row - first, end - first), _read(name, piece, reader, row, end)
        return
    rows, old = _in_old_order(plan.ids.rows[first : first + count])
    start = 0
    while start < len(rows):
        row = int(old[start])
        end = int(np.searchsorted(old, row + height))
        values = _read(name, piece, reader, row, int(old[end - 1]) + 1)
        yield torch.from_numpy(rows[start:end]), values[torch.from_numpy(old[start:end] - row)]
        start = end


def _in_old_order(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the piece that have an old row, and those, ascending."""
    rows = np.flatnonzero(ids >= 0)
    rows = rows[np.argsort(ids[rows], kind="stable")]
    return rows, ids[rows]


def _read(name: str, piece: Piece, reader: Reader, row: int, end: int) -> Tensor:
    """Rows ``row`` to ``end`` of the old tensor, the columns that ``piece`` has: [end - row, columns]."""
    column, columns = piece.offset[1], piece.tensor.shape[1]
    widths = reader.widths(name)
    if widths == piece.widths:
        return reader.read(name, (row, column), (end - row, columns))
    whole = reader.read(name, (row, 0), (end - row, len(widths)))
    return convert_widths(whole, widths, piece.widths)[:, column : column + columns]


def _linear_rows(rows: Tensor, factor: float, wide: TableOptimizerConfig) -> Tensor:
    """Rows ``[w, z, n, 0]`` [N, 4] with n times ``factor``, and z such that FTRL comes to the same w from there (0 where
    the new optimizer is another)."""
    if wide.name != FTRL:
        return torch.cat((rows[:, :1], torch.zeros_like(rows[:, 1:])), dim=1)
    w, n = rows[:, 0], rows[:, 2] * factor
    z = -w * ((wide.beta + n.sqrt()) / wide.lr + wide.l2) - w.sign() * wide.l1
    # Within l1 every z means a weight of 0.
    z = torch.where(w == 0, rows[:, 1].clamp(-wide.l1, wide.l1) * factor, z)
    return torch.stack((w, z, n, torch.zeros_like(w)), dim=1)
