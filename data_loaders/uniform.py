"""The short way for most columns of most logs: plain numbers of one Arrow type, no null among them.

Arrow brings such columns together into one matrix, one reduction checks it and one copy converts it, a few thousand
rows at a time, which stay in the CPU's cache between these steps: half a nanosecond a value, several times less than
column by column. A column in which the check finds anything is decoded again by its own decoder, which knows what to do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_loaders.column_decoders import Single, largest_valid

_ROWS = 2048  # with 40 columns of 8 bytes, a third of a core's second-level cache


@dataclass(frozen=True)
class _Line:
    """A line of ``Columns.numbers`` or ``Columns.ids``. ``number``: its place among all lines, numbers first."""

    number: int
    index: int
    is_id: bool
    column: str
    limit: int | None


class UniformColumns:
    """``uniform(table, start, numbers, ids)`` writes rows [start, start + len(table)) of both matrices [lines, R], and
    returns which lines, numbers first, are done. It is used by several threads at a time."""

    def __init__(self, numbers: Sequence[Single], ids: Sequence[Single]) -> None:
        lines = [(index, False, line) for index, line in enumerate(numbers)]
        lines += [(index, True, line) for index, line in enumerate(ids)]
        self._lines = [
            _Line(number, index, is_id, line.column, line.limit)
            for number, (index, is_id, line) in enumerate(lines)
            if line.plain
        ]
        self._groups: tuple[pa.Schema, list[_Group]] = (pa.schema([]), [])

    def __call__(self, table: pa.Table, start: int, numbers: NDArray[np.float32], ids: NDArray[np.integer]) -> set[int]:
        schema, groups = self._groups
        if table.schema != schema:  # seldom: files of one data set mostly have one
            groups = _groups(self._lines, table.schema)
            self._groups = table.schema, groups
        done: set[int] = set()
        for group in groups:
            done |= group.decode(table, start, numbers, ids)
        return done


def _groups(lines: list[_Line], schema: pa.Schema) -> "list[_Group]":
    by_type: dict[pa.DataType, list[_Line]] = {}
    for line in lines:
        kind = schema.field(line.column).type
        # A floating-point column is checked for infinity and NaN only.
        if pa.types.is_integer(kind) or (line.limit is None and kind in (pa.float32(), pa.float64())):
            by_type.setdefault(kind, []).append(line)
    return [_Group(found, kind) for kind, found in by_type.items() if len(found) > 1]


class _Group:
    """Lines whose columns have one Arrow type."""

    def __init__(self, lines: list[_Line], kind: pa.DataType) -> None:
        self._lines = lines = [line for line in lines if line.is_id] + [line for line in lines if not line.is_id]
        self._kind = kind
        self._names = [line.column for line in self._lines]
        self._ids = _part([line.index for line in self._lines if line.is_id])
        self._numbers = _part([line.index for line in self._lines if not line.is_id])
        self._num_ids = sum(line.is_id for line in self._lines)
        self._is_integer = pa.types.is_integer(kind)
        dtype = np.dtype(kind.to_pandas_dtype())
        self._unsigned = np.dtype(f"u{dtype.itemsize}")
        # Ids lie first; the label's limit is the only one among the numbers.
        self._checks = [slice(0, self._num_ids)] if self._num_ids else []
        self._checks += [slice(i, i + 1) for i, line in enumerate(lines) if not line.is_id and line.limit is not None]
        self._largest = np.zeros(len(lines), self._unsigned)
        for i, line in enumerate(lines):
            if line.limit is not None:
                self._largest[i] = largest_valid(dtype, line.limit)

    def decode(self, table: pa.Table, start: int, numbers: NDArray[np.float32], ids: NDArray[np.integer]) -> set[int]:
        bad = np.zeros(len(self._lines), bool)
        at = start
        for batch in table.select(self._names).to_batches():
            for begin in range(0, batch.num_rows, _ROWS):
                part = batch.slice(begin, _ROWS)
                try:
                    values = part.to_tensor(row_major=False).to_numpy().T  # [lines, rows], contiguous
                except (pa.ArrowInvalid, pa.ArrowTypeError):  # a null: which is cheaper to find here than to look for
                    return self._decode_rest(table, start, numbers, ids)
                stop = at + part.num_rows
                bad |= self._write(values, numbers[:, at:stop], ids[:, at:stop])
                at = stop
        return {line.number for line, is_bad in zip(self._lines, bad) if not is_bad}

    def _write(
        self, values: NDArray[np.number], numbers: NDArray[np.float32], ids: NDArray[np.integer]
    ) -> NDArray[np.bool_]:
        """Returns which lines [lines] hold what needs more than a copy."""
        bad = np.zeros(len(self._lines), bool)
        for part in self._checks:
            bad[part] = np.maximum.reduce(values[part].view(self._unsigned), axis=1) > self._largest[part]
        if self._num_ids:
            ids[self._ids] = values[: self._num_ids]
        if self._num_ids < len(values):
            with np.errstate(over="ignore", invalid="ignore"):
                numbers[self._numbers] = values[self._num_ids :]
                if not self._is_integer:  # a sum is finite only where all its terms are
                    bad[self._num_ids :] |= ~np.isfinite(np.add.reduce(numbers[self._numbers], axis=1))
        return bad

    def _decode_rest(
        self, table: pa.Table, start: int, numbers: NDArray[np.float32], ids: NDArray[np.integer]
    ) -> set[int]:
        """Without the columns that have nulls in this table."""
        lines = [line for line in self._lines if not table.column(line.column).null_count]
        return _Group(lines, self._kind).decode(table, start, numbers, ids) if len(lines) > 1 else set()


def _part(indices: list[int]) -> slice | list[int]:
    """A slice where they are consecutive, which NumPy copies much faster."""
    first = indices[0] if indices else 0
    consecutive = indices == list(range(first, first + len(indices)))
    return slice(first, first + len(indices)) if consecutive else indices
