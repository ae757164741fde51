"""Arrow tables to ``Columns``: the decoders of all columns, put together by schema and layout."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from data_loaders.arrow import is_list, lists_of
from data_loaders.buffers import Buffers
from data_loaders.column_decoders import (
    Counters,
    CrossIds,
    Dense,
    Label,
    ListIds,
    RowError,
    Single,
    SingleIds,
    Source,
    Vectors,
    Weight,
    check_events,
    check_history,
)
from data_loaders.column_types import check_types
from data_loaders.columns import Bags, Columns, concat_bags
from data_loaders.group_ids import check_group_types, group_ids_of
from data_loaders.magnitudes import Magnitudes
from data_loaders.plain import PlainColumns
from data_loaders.schema import Layout, Schema

_JOIN_ROWS = 1 << 11
_PADDING = 80
_LOG_ROWS = 1 << 14  # below PyTorch's threshold for several threads


@dataclass(frozen=True)
class Slot:
    """Where a key's ids are: ``Columns.bags[index]`` if ``bag``, else ``Columns.ids[index]``."""

    bag: bool
    index: int


class Decoder:
    """``decoder(tables, count) -> Columns`` for tables with the columns of ``schema.columns(layout)``, label and
    weight.

    ``types``: the Arrow type of each column (widths may differ in the tables). ``labeled``: without it neither label
    nor weight are read. ``group_by``: columns whose group ids come along. What is missing, truncated, replaced or dropped
    is added to ``counters``.

    Raises ``UserError`` at once for a type that a feature cannot use, and ``RowError`` when decoding for a value that
    it cannot.
    """

    def __init__(
        self,
        schema: Schema,
        layout: Layout,
        types: Mapping[str, pa.DataType],
        counters: Counters,
        *,
        labeled: bool = True,
        group_by: Sequence[str] = (),
    ) -> None:
        check_types(schema, layout, types, labeled=labeled)
        check_group_types(group_by, types)
        self._counters = counters
        self._group_by = tuple(group_by)
        self.num_dense = len(schema.dense_columns)
        self._log1p = [index for index, name in enumerate(schema.numbers) if schema.features[name].log1p]
        self._numbers: list[Single] = [Dense(name, schema, counters) for name in schema.numbers]
        for name in schema.vectors:
            self._numbers += Vectors(name, schema, counters).entries()
        if labeled:
            self._numbers.append(Label(schema, counters))
        if labeled and schema.weight:
            self._numbers.append(Weight(schema.weight))
        self.slots: dict[str, Slot] = {}
        self._singles: list[Single] = []
        self._bags: list[ListIds] = []
        rows = [0]
        for key in dict.fromkeys(layout.keys):
            rows.append(schema.num_embeddings(key))
            self._add_key(key, schema, types, counters, weighted=key in layout.weighted)
        histories = ([b for b in self._bags if b.name in group] for group in schema.histories.values())
        self._histories = [group for group in histories if len(group) > 1]
        for group in self._histories:
            check_history(group)
        self.magnitudes = Magnitudes(len(self._numbers))
        self._plain = PlainColumns(self._numbers, self._singles)
        self._buffers = Buffers()
        # Half the memory and time of everything that moves ids, the device's copies among them.
        self._dtype = np.int32 if max(rows) <= np.iinfo(np.int32).max else np.int64

    def _add_key(
        self, key: str, schema: Schema, types: Mapping[str, pa.DataType], counters: Counters, *, weighted: bool
    ) -> None:
        if key in schema.crosses:
            self.slots[key] = Slot(False, len(self._singles))
            self._singles.append(CrossIds(key, schema))
        elif schema.features[key].kind == "sequence" or is_list(types[schema.column(key)]):
            self.slots[key] = Slot(True, len(self._bags))
            self._bags.append(ListIds(key, schema, counters, weighted=weighted))
        else:
            self.slots[key] = Slot(False, len(self._singles))
            self._singles.append(SingleIds(key, schema, counters))

    @property
    def is_light(self) -> bool:
        """Whether most of the work is one copy: plain columns only, no hashing, no lists."""
        return not self._bags and not self._group_by and all(line.plain for line in (*self._numbers, *self._singles))

    def __call__(self, tables: Iterable[pa.Table], count: int, purpose: str = "") -> Columns:
        """The ``count`` rows of all tables, one table after the other.

        Each table is decoded as it comes, while it is in the CPU's cache. The memory is that of columns of the same
        ``purpose`` that are no longer in use.
        """
        columns = self.empty(count, purpose)
        bags: list[list[Bags]] = []
        stop = 0
        for table in _joined(tables):
            source = Source(table, stop)
            try:
                bags.append(self._decode(source, columns))
            except RowError as error:
                raise RowError(str(error), source.start + error.row) from error
            stop = source.stop
        assert stop == count, (stop, count)
        return replace(columns, bags=[concat_bags(list(found)) for found in zip(*bags)]) if bags else columns

    def empty(self, count: int, purpose: str) -> Columns:
        """Columns of ``count`` rows to write to, without bags."""
        # Lines a power of two apart would share a few sets of the CPU's cache.
        width = count + _PADDING
        numbers = self._buffers.empty(f"{purpose} numbers", (len(self._numbers), width), np.float32)
        ids = self._buffers.empty(f"{purpose} ids", (len(self._singles), width), self._dtype)
        groups = self._buffers.empty(f"{purpose} groups", (len(self._group_by), width), np.int64)
        return Columns(
            self.num_dense,
            numbers[:, :count],
            ids[:, :count],
            [Bags(np.zeros(1, np.int64), np.empty(0, self._dtype)) for _ in self._bags],
            complete=True,
            group_ids=groups[:, :count] if self._group_by else None,
        )

    def _decode(self, source: Source, columns: Columns) -> list[Bags]:
        """Writes the source's rows of both matrices, and returns its bags."""
        done = self._plain(source.table, source.start, columns.numbers, columns.ids)
        lines = zip((*self._numbers, *self._singles), (*columns.numbers, *columns.ids))
        for number, (column, line) in enumerate(lines):
            if number not in done:
                part = line[source.start : source.stop]
                column.decode(source, part)
                if part.dtype == self._dtype:
                    columns.look_for_missing(part)
        for index in self._log1p:
            _log1p(columns.numbers[index, source.start : source.stop])
        self.magnitudes.look(columns.numbers[:, source.start : source.stop])
        for index, name in enumerate(self._group_by):
            columns.group_ids[index, source.start : source.stop] = group_ids_of(source.array(name))
        lists = {bag.name: lists_of(source.array(bag.column)) for bag in self._bags}
        found = [bag.decode(source, lists[bag.name], self._dtype) for bag in self._bags]
        bags, removed = [bags for bags, _ in found], {bag.name: rows for bag, (_, rows) in zip(self._bags, found)}
        for group in self._histories:
            check_events(group, lists, removed, source.dropped)
        if source.dropped is None:
            return bags
        self._counters.add("rows.dropped", source.dropped.sum())
        columns.drop(slice(source.start, source.stop), source.dropped)
        return [bag.without(source.dropped) for bag in bags]


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Joins neighbours while they are small, which costs a copy and saves a decoding of each; never tables of different
    types, which files may have."""
    waiting: list[pa.Table] = []
    for table in itertools.chain(tables, [None]):
        full = sum(each.num_rows for each in waiting) >= _JOIN_ROWS
        if waiting and (table is None or full or table.schema != waiting[0].schema):
            yield waiting[0] if len(waiting) == 1 else pa.concat_tables(waiting).combine_chunks()
            waiting = []
        waiting.append(table)


def _log1p(line: NDArray[np.float32]) -> None:
    """log(1 + max(x, 0)) in place. PyTorch's is vectorised, NumPy's is not."""
    np.maximum(line, 0, out=line)
    for begin in range(0, len(line), _LOG_ROWS):
        torch.from_numpy(line[begin : begin + _LOG_ROWS]).log1p_()
