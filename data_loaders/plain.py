"""The fast path for most columns of most logs: plain numbers without nulls.

Such a column needs one check and one copy, on Arrow's own memory: a nanosecond a value. A column in which the check finds
anything else goes to its own decoder.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_loaders.column_decoders import Single, largest_valid


class PlainColumns:
    """``plain(table, start, numbers, ids)`` writes rows [start, start + len(table)) of both matrices [lines, R], and returns
    which lines, numbers first, are done. Threads may share it."""

    def __init__(self, numbers: Sequence[Single], ids: Sequence[Single]) -> None:
        lines = [(number, index, False, line) for number, (index, line) in enumerate(enumerate(numbers))]
        lines += [(len(numbers) + index, index, True, line) for index, line in enumerate(ids)]
        self._lines = [_Line(*line) for line in lines if line[3].plain]
        self._names = [line.column for line in self._lines]
        self._types: tuple[pa.Schema, list[np.dtype | None]] | None = None  # of the last table's schema

    def __call__(self, table: pa.Table, start: int, numbers: NDArray[np.float32], ids: NDArray[np.integer]) -> set[int]:
        types = self._types_of(table.schema)
        done = {line.number for line, dtype in zip(self._lines, types) if dtype is not None}
        for batch in table.select(self._names).to_batches():
            stop = start + batch.num_rows
            for line, dtype, array in zip(self._lines, types, batch.columns):
                if line.number in done and not line.write(array, dtype, ids if line.is_id else numbers, start, stop):
                    done.remove(line.number)
            start = stop
        return done

    def _types_of(self, schema: pa.Schema) -> list[np.dtype | None]:
        """Of each line: NumPy's type of its column, None where that is no plain number."""
        known = self._types
        if known is None or schema != known[0]:  # seldom: the files of a data set mostly have one schema
            known = self._types = schema, [line.dtype(schema.field(line.column).type) for line in self._lines]
        return known[1]


class _Line:
    """A line of ``Columns.numbers`` or ``Columns.ids``; ``number``: its place among all lines, numbers first."""

    def __init__(self, number: int, index: int, is_id: bool, line: Single) -> None:
        self.number, self.index, self.is_id = number, index, is_id
        self.column, self._limit = line.column, line.limit

    def dtype(self, kind: pa.DataType) -> np.dtype | None:
        """Where there is a limit, only integers are plain."""
        floats = (pa.float32(), pa.float64()) if self._limit is None else ()
        return np.dtype(kind.to_pandas_dtype()) if pa.types.is_integer(kind) or kind in floats else None

    def write(self, array: pa.Array, dtype: np.dtype, lines: NDArray[np.generic], start: int, stop: int) -> bool:
        """Whether the column holds nothing that needs more than a copy, and is written."""
        if array.null_count or not len(array):
            return not len(array)
        values = np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)
        if self._limit is not None:
            # As unsigned numbers, negative ones lie above all valid ones: one comparison tests both ends.
            top = np.maximum.reduce(values.view(f"u{dtype.itemsize}"))
            if top > largest_valid(dtype, self._limit):
                return False
        line = lines[self.index, start:stop]
        if dtype.kind != "f":
            line[:] = values
            return True
        with np.errstate(over="ignore", invalid="ignore"):  # a sum is finite only where all its terms are
            line[:] = values
            return bool(np.isfinite(np.add.reduce(line)))
