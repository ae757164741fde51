"""Arrow columns to NumPy arrays ready for batching, following the schema: one decoder a column, vectorised throughout.

Letters: R rows of a table, D dense features, S keys with at most one id a row (columns of single ids, and crosses), J
keys with any number (lists). Arrays are feature-major: a column is decoded by one contiguous write, shuffled inside the
CPU's cache, and already lies as KeyedJaggedTensor wants it.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_loaders.arrow import Lists, flat, is_integer, is_list, is_text, lists_of, null_mask, numbers, value_type
from data_loaders.hashing import combine, hash_ids, rows_from_hashes
from data_loaders.schema import Feature, Layout, Schema

_JOIN_ROWS = 1 << 12
NO_ID = -1  # in ``Columns.ids``: this row has no id (its table has no row for missing ids)


class RowError(ValueError):
    """A value that the schema does not allow. ``row`` counts from the start of the decoded table."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


class Counters:
    """Named counts that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def add(self, name: str, count: int) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + int(count)

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)


@dataclass
class Bags:
    """Lists of ids of one key: row i has ``values[offsets[i] : offsets[i + 1]]``; ``offsets`` int64 [R + 1]."""

    offsets: NDArray[np.int64]
    values: NDArray[np.integer]

    def take(self, rows: NDArray[np.int64]) -> "Bags":
        lengths = np.diff(self.offsets)[rows]
        return Bags(_offsets(lengths), self.values[_ragged_index(self.offsets[rows], lengths)])


@dataclass
class Columns:
    """R decoded rows: ``numbers`` float32 [D + 0 … 2, R], the dense features, then label and weight where they are
    read; ``ids`` int32 or int64 [S, R], ``NO_ID`` where there is none; ``bags``: one each of J keys."""

    num_dense: int
    numbers: NDArray[np.float32]
    ids: NDArray[np.integer]
    bags: list[Bags]

    @property
    def num_rows(self) -> int:
        return self.numbers.shape[1]


@dataclass(frozen=True)
class Slot:
    """Where a key's ids lie: ``Columns.bags[index]`` if ``bag``, else ``Columns.ids[index]``; ``optional``: there may
    be ``NO_ID`` among them."""

    bag: bool
    index: int
    optional: bool = False


class Decoder:
    """``decoder(tables, count, rows) -> Columns`` for tables with the columns of ``schema.columns(layout)``, label and
    weight.

    ``types``: the Arrow type of each column (widths may differ in the tables). ``labeled``: without it neither label
    nor weight are read, and labels are 0. What is missing, truncated or replaced is added to ``counters``.

    Raises ``ValueError`` at once for a type that a feature cannot use, and ``RowError`` when decoding for a value that
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
    ) -> None:
        check_types(schema, layout, types, labeled=labeled)
        self.num_dense = len(schema.dense)
        self._numbers: list[_Single] = [_Dense(name, schema, counters) for name in schema.dense]
        if labeled:
            self._numbers.append(_Label(schema.label))
        if labeled and schema.weight:
            self._numbers.append(_Weight(schema.weight))
        self.slots: dict[str, Slot] = {}
        self._singles: list[_SingleIds | _Cross] = []
        self._bags: list[_ListIds] = []
        rows = [0]
        for key in dict.fromkeys((*layout.pooled, *layout.unpooled)):
            rows.append(schema.num_embeddings(key))
            self._add_key(key, schema, types, counters)
        histories = ([b for b in self._bags if b.name in group] for group in schema.histories.values())
        self._histories = [group for group in histories if len(group) > 1]
        for group in self._histories:
            _check_history(group)
        self._local = threading.local()
        # Half the memory and time of a shuffle; batches are int64.
        self._dtype = np.int32 if max(rows) <= np.iinfo(np.int32).max else np.int64

    def _add_key(self, key: str, schema: Schema, types: Mapping[str, pa.DataType], counters: Counters) -> None:
        if key in schema.crosses:
            self.slots[key] = Slot(False, len(self._singles))
            self._singles.append(_Cross(key, schema))
        elif schema.features[key].kind == "sequence" or is_list(types[schema.column(key)]):
            self.slots[key] = Slot(True, len(self._bags))
            self._bags.append(_ListIds(key, schema, counters))
        else:
            self.slots[key] = Slot(False, len(self._singles), schema.missing_id(key) is None)
            self._singles.append(_SingleIds(key, schema, counters))

    def __call__(
        self,
        tables: Iterable[pa.Table],
        count: int,
        rows: NDArray[np.int64] | None = None,
        reuse: Columns | None = None,
    ) -> Columns:
        """The ``count`` rows of all tables, one table after the other; or those at ``rows``, a permutation, in that
        order.

        Each table is decoded as it comes, while it lies in the CPU's cache. ``reuse``: columns no longer in use, whose
        memory may be written over (new memory costs as much as decoding: the kernel zeroes it).
        """
        numbers = _matrix(len(self._numbers), count, np.float32, None if reuse is None else reuse.numbers)
        ids = _matrix(len(self._singles), count, self._dtype, None if reuse is None else reuse.ids)
        natural = (numbers, ids) if rows is None else self._scratch(count)
        parts: list[list[Bags]] = [[] for _ in self._bags]
        for source in _sources(tables):
            try:
                self._decode(source, *natural, parts)
            except RowError as error:
                raise RowError(str(error), source.start + error.row) from error
        bags = [_concat_bags(found, self._dtype) for found in parts]
        if rows is not None:
            for line, out in zip((*natural[0], *natural[1]), (*numbers, *ids)):
                # mode="clip" writes straight into ``out``; the default checks all indices before it touches it.
                np.take(line, rows, out=out, mode="clip")
            bags = [bag.take(rows) for bag in bags]
        return Columns(self.num_dense, numbers, ids, bags)

    def _decode(
        self, source: "_Source", numbers: NDArray[np.float32], ids: NDArray[np.integer], parts: list[list[Bags]]
    ) -> None:
        """Writes the source's rows of both matrices [lines, count], and adds its bags to ``parts``."""
        for line, column in zip((*numbers, *ids), (*self._numbers, *self._singles)):
            column.decode(source, line[source.start : source.stop])
        lists = {bag.name: lists_of(source.array(bag.column)) for bag in self._bags}
        for group in self._histories:
            _check_equal_lengths(group, lists)
        for bag, found in zip(self._bags, parts):
            found.append(bag.decode(lists[bag.name], self._dtype))

    def _scratch(self, count: int) -> tuple[NDArray[np.float32], NDArray[np.integer]]:
        """Where this thread decodes rows in their natural order."""
        kept = getattr(self._local, "scratch", (None, None))
        numbers = _matrix(len(self._numbers), count, np.float32, kept[0])
        ids = _matrix(len(self._singles), count, self._dtype, kept[1])
        if kept[0] is None or kept[0].shape[1] < count:
            self._local.scratch = (numbers, ids)
        return numbers, ids


class _Source:
    """A table's columns as flat arrays and their hashes, each made once: crosses and features share columns. Its rows
    are [start, stop) of all."""

    def __init__(self, table: pa.Table, start: int) -> None:
        self.start, self.stop = start, start + table.num_rows
        self._table = table
        self._arrays: dict[str, pa.Array] = {}
        self._hashes: dict[str, NDArray[np.uint64]] = {}

    def array(self, column: str) -> pa.Array:
        if column not in self._arrays:
            self._arrays[column] = flat(self._table.column(column))
        return self._arrays[column]

    def hashes(self, column: str) -> NDArray[np.uint64]:
        if column not in self._hashes:
            self._hashes[column] = hash_ids(self.array(column))
        return self._hashes[column]


class _Single(Protocol):
    """A column or a cross with one value a row."""

    def decode(self, source: _Source, out: NDArray[np.generic]) -> None: ...


def _sources(tables: Iterable[pa.Table]) -> Iterator[_Source]:
    """Joins neighbours while they are small, which costs a copy and saves a decoding of each; never tables of different
    types, which files may have."""
    stop = 0
    waiting: list[pa.Table] = []
    for table in itertools.chain(tables, [None]):
        full = sum(each.num_rows for each in waiting) >= _JOIN_ROWS
        if waiting and (table is None or full or table.schema != waiting[0].schema):
            joined = waiting[0] if len(waiting) == 1 else pa.concat_tables(waiting)
            yield _Source(joined, stop)
            stop += joined.num_rows
            waiting = []
        waiting.append(table)


def _matrix(lines: int, count: int, dtype: type, reuse: NDArray[np.generic] | None) -> NDArray[np.generic]:
    """[lines, count], in the memory of ``reuse`` if that is wide enough."""
    return np.empty((lines, count), dtype) if reuse is None or reuse.shape[1] < count else reuse[:, :count]


# Columns of single values


class _Dense:
    def __init__(self, name: str, schema: Schema, counters: Counters) -> None:
        self._name, self._column, self._counters = name, schema.column(name), counters
        self._fill, self._log1p = schema.features[name].fill, schema.features[name].log1p

    def decode(self, source: _Source, out: NDArray[np.float32]) -> None:
        array = source.array(self._column)
        nulls = null_mask(array)
        values = numbers(array)
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which is then non-finite
            out[:] = values
        if nulls is not None:
            self._replace(out, nulls, "null", "null")
        if values.dtype.kind == "f":
            bad = ~np.isfinite(out)
            if bad.any():
                self._replace(out, bad, "non_finite", "non-finite")
        if self._log1p:
            np.maximum(out, 0, out=out)
            np.log1p(out, out=out)

    def _replace(self, out: NDArray[np.float32], bad: NDArray[np.bool_], counter: str, adjective: str) -> None:
        if self._fill is None:
            row = int(bad.argmax())
            value = "null" if counter == "null" else out[row]
            raise RowError(
                f"dense feature '{self._name}' (column '{self._column}') is {value}: give "
                f"schema.features.{self._name}.fill to replace {adjective} values, or mend the data",
                row,
            )
        self._counters.add(f"{self._name}.{counter}", bad.sum())
        out[bad] = self._fill


class _Ids:
    """Raw ids of one feature to table rows."""

    def __init__(self, name: str, schema: Schema, counters: Counters) -> None:
        feature: Feature = schema.features[name]
        missing = schema.missing_id(name)
        self.name, self.column, self.max_length = name, schema.column(name), feature.max_length
        self._feature, self._counters = feature, counters
        self._rows = schema.num_embeddings(name)
        self._missing = NO_ID if missing is None else missing

    def _lookup(
        self, array: pa.Array, hashes: Callable[[], NDArray[np.uint64]], row_of: Callable[[int], int]
    ) -> NDArray[np.integer]:
        """Table rows, or ``NO_ID``, of the ids in a flat array. ``row_of`` finds the table's row of an element."""
        nulls = null_mask(array)
        if self._feature.ids == "hash":
            ids = rows_from_hashes(hashes(), self._rows)
        else:
            ids = self._in_range(array, nulls, row_of)
        if nulls is None:
            return ids
        self._reject_or_count(nulls, "null", lambda _: "is null", row_of)
        ids = ids.astype(np.int64)  # a copy that holds NO_ID
        ids[nulls] = self._missing
        return ids

    def _in_range(
        self, array: pa.Array, nulls: NDArray[np.bool_] | None, row_of: Callable[[int], int]
    ) -> NDArray[np.integer]:
        ids = numbers(array)
        bits = 8 * ids.dtype.itemsize
        # As unsigned numbers, negative ones lie above all valid ones: one comparison tests both ends.
        unsigned = ids.view(f"u{ids.dtype.itemsize}")
        limit = min(self._rows, 1 << (bits - 1) if ids.dtype.kind == "i" else 1 << bits)
        if not len(ids) or int(unsigned.max()) < limit:
            return ids
        bad = unsigned >= limit
        if nulls is not None:
            bad &= ~nulls  # what lies under a null is arbitrary
        if bad.any():
            valid = f"table '{self._feature.table}' has rows 0 … {self._rows - 1}"
            self._reject_or_count(bad, "out_of_range", lambda i: f"has id {ids[i]}, but {valid}", row_of)
        ids = ids.astype(np.int64)
        ids[bad] = self._missing
        return ids

    def _reject_or_count(
        self, bad: NDArray[np.bool_], policy: str, says: Callable[[int], str], row_of: Callable[[int], int]
    ) -> None:
        if getattr(self._feature, f"on_{policy}") == "error":
            first = int(bad.argmax())
            remedy = f"set schema.features.{self.name}.on_{policy} to 'missing'"
            if policy == "out_of_range":
                remedy = f"raise schema.tables.{self._feature.table}.num_embeddings, {remedy}, use 'ids: hash'"
            raise RowError(
                f"feature '{self.name}' (column '{self.column}') {says(first)}: {remedy}, or mend the data",
                row_of(first),
            )
        self._counters.add(f"{self.name}.{policy}", bad.sum())


class _SingleIds(_Ids):
    def decode(self, source: _Source, out: NDArray[np.integer]) -> None:
        out[:] = self._lookup(source.array(self.column), lambda: source.hashes(self.column), lambda index: index)


class _Cross:
    """A cross of columns: hashes of the raw values combined; row 0 where any is null."""

    def __init__(self, name: str, schema: Schema) -> None:
        self._columns = [schema.column(feature) for feature in schema.crosses[name].columns]
        self._buckets = schema.crosses[name].num_buckets

    def decode(self, source: _Source, out: NDArray[np.integer]) -> None:
        out[:] = rows_from_hashes(combine([source.hashes(column) for column in self._columns]), self._buckets)
        for column in self._columns:
            nulls = null_mask(source.array(column))
            if nulls is not None:
                out[nulls] = 0


# Columns of lists


class _ListIds(_Ids):
    """Lists to bags: the last ``max_length`` ids of each, and ids without a table row taken out."""

    def __init__(self, name: str, schema: Schema, counters: Counters) -> None:
        super().__init__(name, schema, counters)
        self.in_history = False  # of several features

    def decode(self, lists: Lists, dtype: type) -> Bags:
        if lists.nulls is not None:
            self._reject_or_count(lists.nulls, "null", lambda _: "is null", lambda index: index)
        child, offsets = self._kept(lists)
        row_of = partial(_row_of, offsets)
        values = self._lookup(child, lambda: hash_ids(child), row_of).astype(dtype, copy=False)
        if self._missing == NO_ID and (dropped := values == NO_ID).any():
            if self.in_history:
                raise RowError(
                    f"feature '{self.name}' (column '{self.column}') has a missing id in a history of several "
                    "features, where leaving it out would shift the others: set "
                    f"schema.features.{self.name}.missing_id",
                    row_of(int(dropped.argmax())),
                )
            offsets = np.concatenate([[0], np.cumsum(~dropped)])[offsets]
            values = values[~dropped]
        return Bags(offsets, values)

    def _kept(self, lists: Lists) -> tuple[pa.Array, NDArray[np.int64]]:
        """The elements in use, as one array, and each row's offsets into it."""
        starts, lengths = lists.starts, lists.lengths
        if self.max_length is not None and len(lengths) and int(lengths.max()) > self.max_length:
            self._counters.add(f"{self.name}.truncated", (lengths > self.max_length).sum())
            kept = np.minimum(lengths, self.max_length)
            starts, lengths = starts + (lengths - kept), kept
        offsets = _offsets(lengths)
        first = int(starts[0]) if len(starts) else 0
        if np.array_equal(starts - first, offsets[:-1]):
            return lists.child.slice(first, int(offsets[-1])), offsets
        return lists.child.take(pa.array(_ragged_index(starts, lengths))), offsets


def _row_of(offsets: NDArray[np.int64], element: int) -> int:
    return int(np.searchsorted(offsets, element, side="right")) - 1


def _check_history(group: list[_ListIds]) -> None:
    """Members of one history are cut alike, or their events would not match."""
    for other in group[1:]:
        if other.max_length != group[0].max_length:
            raise ValueError(
                f"schema.features.{group[0].name}.max_length is {group[0].max_length}, but that of "
                f"schema.features.{other.name} is {other.max_length}: features of one history need the same"
            )
    for member in group:
        member.in_history = True


def _check_equal_lengths(group: list[_ListIds], lists: dict[str, Lists]) -> None:
    first = lists[group[0].name].lengths
    for other in group[1:]:
        lengths = lists[other.name].lengths
        if not np.array_equal(first, lengths):
            row = int((first != lengths).argmax())
            raise RowError(
                f"sequences '{group[0].name}' (column '{group[0].column}') and '{other.name}' (column "
                f"'{other.column}') belong to one history but have {first[row]} and "
                f"{lengths[row]} ids: write lists of equal length",
                row,
            )


# Label and weight


class _Label:
    def __init__(self, column: str) -> None:
        self._column = column

    def decode(self, source: _Source, out: NDArray[np.float32]) -> None:
        values = _never_null(f"label '{self._column}'", "0 or 1", source.array(self._column))
        bad = (values != 0) & (values != 1)
        if bad.any():
            row = int(bad.argmax())
            raise RowError(f"label '{self._column}' is {values[row]}: it must be 0 or 1; mend the data", row)
        out[:] = values


class _Weight:
    _EXPECTED = "a finite number ≥ 0"

    def __init__(self, column: str) -> None:
        self._column = column

    def decode(self, source: _Source, out: NDArray[np.float32]) -> None:
        values = _never_null(f"weight '{self._column}'", self._EXPECTED, source.array(self._column))
        with np.errstate(over="ignore"):
            out[:] = values
        bad = ~(np.isfinite(out) & (out >= 0))
        if bad.any():
            row = int(bad.argmax())
            raise RowError(f"weight '{self._column}' is {values[row]}: it must be {self._EXPECTED}; mend the data", row)


def _never_null(where: str, expected: str, array: pa.Array) -> NDArray[np.number]:
    nulls = null_mask(array)
    if nulls is not None:
        raise RowError(f"{where} is null: it must be {expected}; mend the data", int(nulls.argmax()))
    return numbers(array)


# Types


def check_types(schema: Schema, layout: Layout, types: Mapping[str, pa.DataType], *, labeled: bool = True) -> None:
    """Raises ``ValueError`` naming feature, column, the type found and those expected."""
    for name in schema.dense:
        where = f"dense feature '{name}'"
        _expect(where, schema.column(name), types, _is_number, "a number", "use 'kind: sparse' for ids")
    for key in dict.fromkeys((*layout.pooled, *layout.unpooled)):
        if key in schema.crosses:
            for feature in schema.crosses[key].columns:
                where, expected = f"feature '{feature}' of cross '{key}'", "single integers or strings"
                _expect(where, schema.column(feature), types, _is_hashable, expected, "cross other features")
        else:
            _check_id_type(key, schema, types)
    if labeled:
        _expect("the label", schema.label, types, _is_number, "a number, 0 or 1", "correct schema.label")
        if schema.weight:
            _expect("the weight", schema.weight, types, _is_number, "a number", "correct schema.weight")


def _check_id_type(name: str, schema: Schema, types: Mapping[str, pa.DataType]) -> None:
    feature, column = schema.features[name], schema.column(name)
    found = types[column]
    where = f"{feature.kind} feature '{name}'"
    if feature.kind == "sequence" and not is_list(found):
        _expect(where, column, types, is_list, "a list", "use 'kind: sparse' for single ids")
    element = {column: found.value_type if is_list(found) else found}
    if feature.ids == "hash":
        expected = "integers or strings (ids: hash)"
        _expect(where, column, element, _is_hashable, expected, "write ids as integers or strings")
    else:
        text = is_text(value_type(element[column]))
        remedy = f"set schema.features.{name}.ids to 'hash'" if text else "write ids as integers"
        _expect(where, column, element, is_integer, "integers (ids: identity)", remedy)


def _expect(
    where: str,
    column: str,
    types: Mapping[str, pa.DataType],
    test: Callable[[pa.DataType], bool],
    expected: str,
    remedy: str,
) -> None:
    found = types[column]
    if not (pa.types.is_null(found) or test(value_type(found))):
        raise ValueError(f"{where}: column '{column}' has type {found}, expected {expected}; {remedy}")


def _is_hashable(kind: pa.DataType) -> bool:
    return is_integer(kind) or is_text(kind)


def _is_number(kind: pa.DataType) -> bool:
    return is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_temporal(kind)


# Jagged arrays


def _ragged_index(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[0], starts[0] + 1, …, starts[0] + lengths[0] - 1, starts[1], …"""
    ends = np.cumsum(lengths)
    index = np.arange(int(ends[-1]) if len(ends) else 0)
    index += np.repeat(starts - (ends - lengths), lengths)
    return index


def _offsets(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _concat_bags(parts: list[Bags], dtype: type) -> Bags:
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(part.offsets) for part in parts)])
    return Bags(_offsets(lengths), np.concatenate([np.zeros(0, dtype), *(part.values for part in parts)]))
