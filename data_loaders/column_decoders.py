"""One decoder a column: Arrow values to numbers and table rows, following the schema, vectorised throughout.

What a column holds that cannot be used ends in one of three ways, by the policy of its feature: a replacement, which is
counted; the whole row left out, which is counted; or a ``RowError``.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_loaders.arrow import Lists, empty_mask, flat, is_text, lists_of, null_mask, numbers, value_type
from data_loaders.columns import NO_ID, Bags, offsets_of
from data_loaders.errors import UserError
from data_loaders.hashing import combine, hash_ids, rows_from_hashes
from data_loaders.schema import Feature, Schema

RowsOf = Callable[[NDArray[np.integer]], NDArray[np.integer]]  # positions in a flat array to rows


class RowError(UserError):
    """A value that the schema does not allow. ``row`` counts from the start of what was decoded."""

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


class Source:
    """A table's columns as flat arrays and their hashes, each made once: crosses and features share columns. Its rows
    are [start, stop) of all; ``dropped`` bool [rows], None while no row is."""

    def __init__(self, table: pa.Table, start: int) -> None:
        self.start, self.stop = start, start + table.num_rows
        self.table = table
        self.dropped: NDArray[np.bool_] | None = None
        self._arrays: dict[str, pa.Array] = {}
        self._hashes: dict[str, NDArray[np.uint64]] = {}
        self._vectors: dict[str, NDArray[np.float32]] = {}

    def array(self, column: str) -> pa.Array:
        if column not in self._arrays:
            self._arrays[column] = flat(self.table.column(column))
        return self._arrays[column]

    def hashes(self, column: str) -> NDArray[np.uint64]:
        if column not in self._hashes:
            self._hashes[column] = hash_ids(self.array(column))
        return self._hashes[column]

    def vectors(self, name: str, decode: Callable[["Source"], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Those of a feature, float32 [rows, dim]."""
        if name not in self._vectors:
            self._vectors[name] = decode(self)
        return self._vectors[name]

    def drop(self, rows: NDArray[np.integer]) -> None:
        if self.dropped is None:
            self.dropped = np.zeros(self.table.num_rows, bool)
        self.dropped[rows] = True


class Single(Protocol):
    """A column or a cross with one value a row. ``plain``: finite numbers that are not null need nothing but a copy,
    once they are found to be integers from 0 to below ``limit`` (where there is one)."""

    column: str
    plain: bool
    limit: int | None

    def decode(self, source: Source, out: NDArray[Any]) -> None: ...


# Numbers


class Dense:
    limit: int | None = None

    def __init__(self, name: str, schema: Schema, counters: Counters) -> None:
        self.column = schema.column(name)
        self._name, self._feature, self._counters = name, schema.features[name], counters
        self.plain = (self._feature.offset, self._feature.scale) == (0, 1)

    def decode(self, source: Source, out: NDArray[np.float32]) -> None:
        array = source.array(self.column)
        nulls = null_mask(array)
        values = numbers(array)
        with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 it becomes infinite, and so non-finite
            if not self.plain:
                values = (values.astype(np.float64) - self._feature.offset) * self._feature.scale
            out[:] = values
        if nulls is not None:
            self._replace(source, out, nulls, "null")
        if values.dtype.kind == "f":
            bad = ~np.isfinite(out)
            if bad.any():
                self._replace(source, out, bad, "non_finite")

    def _replace(self, source: Source, out: NDArray[np.float32], bad: NDArray[np.bool_], what: str) -> None:
        policy, fill = getattr(self._feature, f"on_{what}"), self._feature.fill
        if policy == "error" or (policy == "missing" and fill is None):
            row = int(bad.argmax())
            value = "null" if what == "null" else out[row]
            where = f"schema.features.{self._name}"
            raise RowError(
                f"dense feature '{self._name}' (column '{self.column}') is {value}: give {where}.fill to replace such "
                f"values, {where}.on_{what}=drop to leave such rows out, or mend the data",
                row,
            )
        self._counters.add(f"{self._name}.{what}", bad.sum())
        if policy == "drop":
            source.drop(bad.nonzero()[0])
        out[bad] = fill or 0.0


class Vectors:
    """Lists of so many numbers."""

    def __init__(self, name: str, schema: Schema, counters: Counters) -> None:
        self.name, self.column = name, schema.column(name)
        self._feature, self._counters = schema.features[name], counters

    def entries(self) -> list["VectorEntry"]:
        return [VectorEntry(self, place) for place in range(self._feature.dim)]

    def decode(self, source: Source) -> NDArray[np.float32]:
        """float32 [rows, dim]. A vector with an entry that is null, or none at all, is null."""
        lists = lists_of(source.array(self.column))
        nulls = np.zeros(len(lists.lengths), bool) if lists.nulls is None else lists.nulls
        self._check_lengths(lists.lengths, nulls)
        found = np.zeros((len(nulls), self._feature.dim), np.float32)
        if len(lists.child):
            starts = np.where(nulls, 0, lists.starts)
            with np.errstate(over="ignore", invalid="ignore"):
                found[:] = _runs(numbers(lists.child), starts, self._feature.dim)
            if (of_entries := null_mask(lists.child)) is not None:
                nulls = np.logical_or(nulls, _runs(of_entries, starts, self._feature.dim).any(1))
        found[nulls] = 0  # what lies under a null is arbitrary
        self._replace(source, found, nulls, "null")
        self._replace(source, found, np.any(~np.isfinite(found), axis=1), "non_finite")
        return found

    def _check_lengths(self, lengths: NDArray[np.int64], nulls: NDArray[np.bool_]) -> None:
        bad = (lengths != self._feature.dim) & ~nulls
        if bad.any():
            row = int(bad.argmax())
            raise RowError(
                f"vector feature '{self.name}' (column '{self.column}') has {lengths[row]} entries, but "
                f"schema.features.{self.name}.dim is {self._feature.dim}: mend the data, or write null where there is none",
                row,
            )

    def _replace(self, source: Source, found: NDArray[np.float32], bad: NDArray[np.bool_], what: str) -> None:
        policy, fill = getattr(self._feature, f"on_{what}"), self._feature.fill
        if not bad.any():
            return
        if policy == "error" or (policy == "missing" and fill is None):
            where = f"schema.features.{self.name}"
            raise RowError(
                f"vector feature '{self.name}' (column '{self.column}') is {what.replace('_', '-')}: give {where}.fill for each "
                f"entry of such vectors, {where}.on_{what}=drop to leave such rows out, or mend the data",
                int(bad.argmax()),
            )
        self._counters.add(f"{self.name}.{what}", bad.sum())
        if policy == "drop":
            source.drop(bad.nonzero()[0])
        found[bad] = fill or 0.0


def _runs(values: NDArray[Any], starts: NDArray[np.int64], width: int) -> NDArray[Any]:
    """``values[start : start + width]`` for each start, [starts, width]; a view where they follow each other."""
    first = int(starts[0]) if len(starts) else 0
    if np.array_equal(starts, first + np.arange(len(starts)) * width):
        return values[first : first + len(starts) * width].reshape(-1, width)
    return values[starts[:, None] + np.arange(width)]


class VectorEntry:
    """One number of each vector: lines of ``Columns.numbers`` are shuffled and batched alike, whatever they are of."""

    plain = False
    limit: int | None = None

    def __init__(self, vectors: Vectors, place: int) -> None:
        self.column, self._vectors, self._place = vectors.column, vectors, place

    def decode(self, source: Source, out: NDArray[np.float32]) -> None:
        out[:] = source.vectors(self._vectors.name, self._vectors.decode)[:, self._place]


class Label:
    plain = True
    limit: int | None = 2

    def __init__(self, schema: Schema, counters: Counters) -> None:
        self.column, self._drops, self._counters = schema.label, schema.on_bad_label == "drop", counters

    def decode(self, source: Source, out: NDArray[np.float32]) -> None:
        array = source.array(self.column)
        values = numbers(array)
        nulls = null_mask(array)
        if nulls is not None:
            self._reject(source, nulls, "null", lambda _: "null")
        bad = (values != 0) & (values != 1)
        if nulls is not None:
            bad &= ~nulls  # what lies under a null is arbitrary
        if bad.any():
            self._reject(source, bad, "not_0_or_1", lambda row: values[row])
        with np.errstate(over="ignore"):
            out[:] = values

    def _reject(self, source: Source, bad: NDArray[np.bool_], what: str, shown: Callable[[int], object]) -> None:
        if not self._drops:
            row = int(bad.argmax())
            raise RowError(
                f"label '{self.column}' is {shown(row)}: it must be 0 or 1; mend the data, or set "
                "schema.on_bad_label=drop to leave such rows out",
                row,
            )
        self._counters.add(f"{self.column}.{what}", bad.sum())
        source.drop(bad.nonzero()[0])


class Weight:
    plain = False
    limit: int | None = None
    _EXPECTED = "a finite number ≥ 0"

    def __init__(self, column: str) -> None:
        self.column = column

    def decode(self, source: Source, out: NDArray[np.float32]) -> None:
        array = source.array(self.column)
        nulls = null_mask(array)
        if nulls is not None:
            message = f"weight '{self.column}' is null: it must be {self._EXPECTED}; mend the data"
            raise RowError(message, int(nulls.argmax()))
        values = numbers(array)
        with np.errstate(over="ignore"):
            out[:] = values
        bad = ~(np.isfinite(out) & (out >= 0))
        if bad.any():
            row = int(bad.argmax())
            raise RowError(f"weight '{self.column}' is {values[row]}: it must be {self._EXPECTED}; mend the data", row)


# Ids


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
        self, source: Source, array: pa.Array, hashes: Callable[[], NDArray[np.uint64]], rows_of: RowsOf
    ) -> NDArray[np.integer]:
        """Table rows, or ``NO_ID``, of the ids in a flat array. ``rows_of`` finds the log's rows of its elements."""
        nulls = self._nulls(array)
        ids: NDArray[np.integer]
        if self._feature.ids == "hash":
            ids = rows_from_hashes(hashes(), self._rows)
        else:
            ids = self._in_range(source, array, nulls, rows_of)
        if nulls is None:
            return ids
        self._apply_policy(source, nulls, "null", lambda _: "is null", rows_of)
        ids = ids.astype(np.int64)  # a copy that holds NO_ID
        ids[nulls] = self._missing
        return ids

    def _nulls(self, array: pa.Array) -> NDArray[np.bool_] | None:
        return null_mask(array)

    def _in_range(
        self, source: Source, array: pa.Array, nulls: NDArray[np.bool_] | None, rows_of: RowsOf
    ) -> NDArray[np.integer]:
        ids = numbers(array)
        # As unsigned numbers, negative ones lie above all valid ones: one comparison tests both ends.
        unsigned = ids.view(f"u{ids.dtype.itemsize}")
        largest = largest_valid(ids.dtype, self._rows)
        if not len(ids) or unsigned.max() <= largest:
            return ids
        bad = unsigned > largest
        if nulls is not None:
            bad &= ~nulls  # what lies under a null is arbitrary
        if bad.any():
            valid = f"table '{self._feature.table}' has rows 0 … {self._rows - 1}"
            self._apply_policy(source, bad, "out_of_range", lambda i: f"has id {ids[i]}, but {valid}", rows_of)
        ids = ids.astype(np.int64)
        ids[bad] = self._missing
        return ids

    def _apply_policy(
        self, source: Source, bad: NDArray[np.bool_], what: str, says: Callable[[int], str], rows_of: RowsOf
    ) -> None:
        policy = getattr(self._feature, f"on_{what}")
        if policy == "error":
            first = int(bad.argmax())
            remedy = f"set schema.features.{self.name}.on_{what} to 'missing' or 'drop'"
            if what == "out_of_range":
                remedy = f"raise schema.tables.{self._feature.table}.num_embeddings, {remedy}, use 'ids: hash'"
            raise RowError(
                f"feature '{self.name}' (column '{self.column}') {says(first)}: {remedy}, or mend the data",
                int(rows_of(np.array([first]))[0]),
            )
        self._counters.add(f"{self.name}.{what}", bad.sum())
        if policy == "drop":
            source.drop(rows_of(bad.nonzero()[0]))


def largest_valid(dtype: np.dtype, rows: int) -> int:
    """The largest integer of this type, seen as unsigned, that is a row of a table of ``rows`` rows."""
    return min(rows - 1, np.iinfo(dtype).max)


class SingleIds(_Ids):
    def __init__(self, name: str, schema: Schema, counters: Counters) -> None:
        super().__init__(name, schema, counters)
        self.plain, self.limit = self._feature.ids == "identity", self._rows

    def decode(self, source: Source, out: NDArray[np.integer]) -> None:
        array = source.array(self.column)
        out[:] = self._lookup(source, array, lambda: source.hashes(self.column), lambda positions: positions)


class CrossIds:
    """A cross of columns: hashes of the raw values combined; row 0 where any is null."""

    plain = False
    limit: int | None = None

    def __init__(self, name: str, schema: Schema) -> None:
        self.column = ""  # several
        self._columns = [schema.column(feature) for feature in schema.crosses[name].columns]
        self._buckets = schema.crosses[name].num_buckets

    def decode(self, source: Source, out: NDArray[np.integer]) -> None:
        out[:] = rows_from_hashes(combine([source.hashes(column) for column in self._columns]), self._buckets)
        for column in self._columns:
            nulls = null_mask(source.array(column))
            if nulls is not None:
                out[nulls] = 0


# Lists of ids


class ListIds(_Ids):
    """Lists to bags: the last ``max_length`` ids of each, and ids without a table row taken out. ``weighted``: with what a
    sum over rows multiplies each by, its weight (1 without ``weights``), or of a table that is averaged its share of them."""

    def __init__(self, name: str, schema: Schema, counters: Counters, *, weighted: bool = False) -> None:
        super().__init__(name, schema, counters)
        self._weighted, self._mean = weighted, schema.tables[self._feature.table].pooling == "mean"

    def decode(self, source: Source, lists: Lists, dtype: type) -> tuple[Bags, NDArray[np.integer]]:
        """The bags, and the rows (with repeats) from which ids were taken out."""
        removed: NDArray[np.integer] = np.empty(0, np.int64)
        if lists.nulls is not None:
            self._apply_policy(source, lists.nulls, "null", lambda _: "is null", lambda rows: rows)
        child, offsets = self._kept(lists)
        weights = self._weights(source, lists, offsets)
        rows_of = partial(_rows_of, offsets)
        values = self._lookup(source, child, lambda: hash_ids(child), rows_of).astype(dtype, copy=False)
        if self._missing == NO_ID and (missing := values == NO_ID).any():
            removed = rows_of(missing.nonzero()[0])
            offsets = np.concatenate([[0], np.cumsum(~missing)])[offsets]
            values = values[~missing]
            weights = None if weights is None else weights[~missing]
        if weights is not None and self._mean:
            weights = _shares(weights, offsets)
        return Bags(offsets, values, weights), removed

    def _weights(self, source: Source, ids: Lists, offsets: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """float32, one for each element that is kept; None where bags have none."""
        column = self._feature.weights
        if not self._weighted or column is None:
            return np.ones(int(offsets[-1]), np.float32) if self._weighted else None
        lists = lists_of(source.array(column))
        self._check_rows(lists.lengths != ids.lengths, lambda row: f"{lists.lengths[row]} for {ids.lengths[row]} ids")
        child, _ = self._kept(lists, count=False)
        with np.errstate(over="ignore", invalid="ignore"):
            found = numbers(child).astype(np.float32)
        bad = ~np.isfinite(found) if (nulls := null_mask(child)) is None else nulls | ~np.isfinite(found)
        if self._mean:
            bad |= found < 0
        rows = np.zeros(len(ids.lengths), bool)
        rows[_rows_of(offsets, bad.nonzero()[0])] = True
        self._check_rows(rows, lambda row: "null, not finite or, in a mean, negative")
        return found

    def _check_rows(self, bad: NDArray[np.bool_], says: Callable[[int], str]) -> None:
        """Raises ``RowError`` for the first row whose weights are ``bad``."""
        if bad.any():
            row = int(bad.argmax())
            raise RowError(
                f"the weights of feature '{self.name}' (column '{self._feature.weights}') are {says(row)}: write a finite number "
                f"for each id of column '{self.column}'",
                row,
            )

    def _nulls(self, array: pa.Array) -> NDArray[np.bool_] | None:
        """An empty string in a list is what splitting a text leaves where there was no id."""
        nulls = null_mask(array)
        empty = empty_mask(array) if self._feature.ids == "hash" and is_text(value_type(array.type)) else None
        return nulls if empty is None else empty if nulls is None else empty | nulls

    def _kept(self, lists: Lists, *, count: bool = True) -> tuple[pa.Array, NDArray[np.int64]]:
        """The elements in use, as one array, and each row's offsets into it."""
        starts, lengths = lists.starts, lists.lengths
        if self.max_length is not None and len(lengths) and int(lengths.max()) > self.max_length:
            if count:
                self._counters.add(f"{self.name}.truncated", (lengths > self.max_length).sum())
            kept = np.minimum(lengths, self.max_length)
            starts, lengths = starts + (lengths - kept), kept
        offsets = offsets_of(lengths)
        first = int(starts[0]) if len(starts) else 0
        if np.array_equal(starts - first, offsets[:-1]):
            return lists.child.slice(first, int(offsets[-1])), offsets
        return lists.child.take(pa.array(_ragged_index(starts, lengths))), offsets


def _shares(weights: NDArray[np.float32], offsets: NDArray[np.int64]) -> NDArray[np.float32]:
    """Of each bag's sum of weights; zeros where that is 0."""
    bags = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    sums = np.bincount(bags, weights, minlength=len(offsets) - 1)
    return (weights / np.where(sums == 0, 1, sums)[bags]).astype(np.float32)


def check_history(group: list[ListIds]) -> None:
    """Members of one history are cut alike, or their events would not match."""
    for other in group[1:]:
        if other.max_length != group[0].max_length:
            raise UserError(
                f"schema.features.{group[0].name}.max_length is {group[0].max_length}, but that of "
                f"schema.features.{other.name} is {other.max_length}: features of one history need the same"
            )


def check_events(
    group: list[ListIds],
    lists: dict[str, Lists],
    removed: dict[str, NDArray[np.integer]],
    dropped: NDArray[np.bool_] | None,
) -> None:
    """Raises ``RowError`` for a row in which the members of a history differ in length, or one of them lost an id: its
    events would be shifted against those of the others. Not for rows that are dropped."""
    for member in group:
        rows = removed[member.name]
        if dropped is not None:
            rows = rows[~dropped[rows]]
        if len(rows):
            raise RowError(
                f"feature '{member.name}' (column '{member.column}') has a missing id in a history of several features, "
                f"where leaving it out would shift the others: set schema.features.{member.name}.missing_id",
                int(rows[0]),
            )
    first = lists[group[0].name].lengths
    for other in group[1:]:
        lengths = lists[other.name].lengths
        bad = first != lengths
        if dropped is not None:
            bad &= ~dropped
        if bad.any():
            row = int(bad.argmax())
            raise RowError(
                f"sequences '{group[0].name}' (column '{group[0].column}') and '{other.name}' (column "
                f"'{other.column}') belong to one history but have {first[row]} and "
                f"{lengths[row]} ids: write lists of equal length",
                row,
            )


def _rows_of(offsets: NDArray[np.int64], elements: NDArray[np.integer]) -> NDArray[np.integer]:
    return np.searchsorted(offsets, elements, side="right") - 1


def _ragged_index(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[0], starts[0] + 1, …, starts[0] + lengths[0] - 1, starts[1], …"""
    ends = np.cumsum(lengths)
    index = np.arange(int(ends[-1]) if len(ends) else 0)
    index += np.repeat(starts - (ends - lengths), lengths)
    return index
