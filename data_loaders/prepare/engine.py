"""What an engine does: the contract that ``duckdb_engine`` (one machine) and ``spark_engine`` (a cluster) fulfil.

Every transformation of this package is an Ibis expression, written once. An engine only moves data: it reads raw files,
stores intermediate tables, and writes the output. That is all that is written twice.
"""

import fnmatch
import hashlib
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa

from data_loaders import footers
from data_loaders.errors import UserError
from data_loaders.prepare import text_files
from data_loaders.prepare.declaration import Source, is_file_name
from data_loaders.prepare.text_files import TextFile
from data_loaders.schema import one_of
from data_loaders.secrets import scrub
from data_loaders.storage import Storage

ROW, PART, SPLIT = "__row", "__part", "__split"
KEY = (ROW, PART)  # the raw order of rows, and what identifies them
# The two halves of __row, where an engine skips what it need not read by them, but not by their sum.
FILE, PLACE = "__source_file", "__source_place"
FILE_SHIFT = 40  # __row is (number of the file) · 2^40 + place in the file


class EngineError(RuntimeError):
    """The engine could not finish, though nothing was declared wrongly: a full disk, too little memory, a lost worker.
    Nothing that was there before is lost; the same command resumes from what is already stored."""


@dataclass
class Inputs:
    """What was found of a source. ``files``: those read; ``empty``: without a byte of text; ``ignored``: the marks and
    checksums that Spark, Hive and others leave beside their parts. ``bad_rows``: those left out, with ``first_bad``, the
    first of them."""

    files: int = 0
    empty: int = 0
    ignored: int = 0
    bad_rows: int = 0
    first_bad: str | None = None

    def leave_out(self, rows: int, first: str | None) -> None:
        self.bad_rows += rows
        self.first_bad = self.first_bad or first

    def notes(self, name: str) -> list[str]:
        """For people, one a line."""
        found = []
        if self.empty or self.ignored:
            found.append(
                f"sources.{name}: {self.files:,} file(s) read, {self.empty:,} empty one(s) and {self.ignored:,} that hold no "
                "data (_SUCCESS and the like) left out"
            )
        if self.bad_rows:
            found.append(f"sources.{name}: {self.bad_rows:,} bad row(s) left out, the first: {self.first_bad}")
        return found


@dataclass(frozen=True)
class Shuffle:
    """``key``: a column of random-looking numbers from 0 to below ``bound``, by which rows are sorted. ``parts``: how many to
    divide the rows into, for one to fit in memory."""

    key: str
    bound: int
    parts: int


class Engine(ABC):
    """Tables that it returns belong to ``backend`` and are lazy, unless said otherwise."""

    name: str
    backend: Any
    chunk_bytes: int | None  # integer columns that ``write`` should get at a time, in their memory; None: all at once
    joins_at_once: int | None  # columns of one table of a chunk; None: a chunk is one table

    def __init__(self, work: Path) -> None:
        """``work``: the folder of intermediate tables. What an interrupted run stored there is used again."""
        self.work = work
        self.inputs: dict[str, Inputs] = {}  # by source, once it is read
        self._views = 0

    @abstractmethod
    def confine(self, reads: list[str]) -> None:
        """From here on the engine reads the files ``reads`` (and those below folders among them) and what it stores
        itself, and no setting of it can be changed: as far as the engine can (docs/prepare.md says what holds)."""

    @abstractmethod
    def read(
        self,
        name: str,
        source: Source,
        root: str,
        optional: frozenset[str] = frozenset(),
        needed: frozenset[str] | None = None,
    ) -> ibis.Table:
        """The declared columns of a source, with ``__row`` and ``__part`` (0); one of ``optional`` that the files lack is
        null. ``needed``: the names that matter where a source declares no columns (default: all). Raises ``UserError``:
        file, column and line of what does not fit the declaration."""

    def read_parquet(self, path: Path) -> ibis.Table:
        """A file that an earlier ``write_file`` wrote."""
        return self.backend.read_parquet(path)

    @abstractmethod
    def store(self, table: ibis.Table, name: str) -> ibis.Table:
        """Computes a table once and keeps it as Parquet in the work folder; returns a table that reads it."""

    @abstractmethod
    def write(
        self,
        chunks: Iterable[list[ibis.Table]],
        folder: Path,
        schema: pa.Schema,
        keys: list[str],
        by: str | None = None,
        shuffle: Shuffle | None = None,
    ) -> int:
        """Writes the columns of ``schema`` to Parquet files in ``folder``, whose names sort in the order of the rows: chunk
        after chunk, each sorted by ``keys``. The tables of a chunk hold columns of the same rows, which ``keys``
        identify; all but the first are held in memory. ``by``: a column of the first that names each row's
        folder in ``folder``. ``shuffle``: the rows of all chunks are sorted together, by a column of the first and then by
        ``keys``, and the files say that they are shuffled. Returns the number of rows. Raises ``UserError`` where a column that
        ``schema`` calls not null has a null."""

    @abstractmethod
    def write_file(self, table: ibis.Table, path: Path, schema: pa.Schema, keys: list[str]) -> int:
        """The same for one table and one file, which is there for no rows too."""

    @abstractmethod
    def explain(self, error: Exception) -> Exception | None:
        """The ``UserError`` or ``EngineError`` to raise in place of the engine's own error; None for other errors."""

    @abstractmethod
    def close(self) -> None:
        """Ends the engine; intermediate tables stay."""

    def fetch(self, table: ibis.Table) -> pa.Table:
        """A small result."""
        return self.backend.to_pyarrow(table)

    def raw_files(self, name: str, source: Source, root: str) -> list[str]:
        """As ``raw_files``; begins the source's ``inputs``."""
        files, ignored = raw_files(name, source, root)
        self.inputs[name] = Inputs(len(files), ignored=ignored)
        return files

    def text_files(self, name: str, source: Source, root: str) -> list[TextFile]:
        """The text files that are not empty, in order. Raises ``UserError`` where all are, and as ``text_files.sniff``."""
        storage = Storage(root)
        names = self.raw_files(name, source, root)
        files = [file for file in (text_files.sniff(name, source, storage, file) for file in names) if file is not None]
        if not files:
            raise UserError(
                f"sources.{name}.files: each of the {len(names)} file(s) is empty, such as '{names[0]}': check input= and "
                f"sources.{name}.files"
            )
        self.inputs[name] = replace(self.inputs[name], files=len(files), empty=len(names) - len(files))
        return files

    def store_error(self, error: Exception) -> str:
        """Stores the engine's own message and returns where, for the end of ours."""
        path = self.work / "engine-error.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(scrub(f"{type(error).__name__}: {error}\n"))
        except OSError:
            return "the engine's own message could not be stored"
        return f"the engine's own message is in {path}"

    def sql(self, table: ibis.Table, select: str) -> ibis.Table:
        """``select``: a query in DuckDB's dialect, in which the table is called ``rows``."""
        self._views += 1
        name = f"rows_{id(self)}_{self._views}"
        self.backend.create_view(name, table, overwrite=True)
        return self.backend.sql(f"WITH rows AS (SELECT * FROM {name}) {select}", dialect="duckdb")


def file_name(text: str) -> str:
    """A name of a file in the work folder for any text of a recipe's, the same for the same text."""
    return text if is_file_name(text) else "_" + hashlib.sha256(text.encode()).hexdigest()[:24]


_PACKED = (".gz", ".zst", ".bz2", ".xz", ".lz4")


def raw_files(name: str, source: Source, root: str) -> tuple[list[str], int]:
    """Full names of a source's files, in order, and the number of those left out because they hold no data: hidden ones,
    checksums, ``_SUCCESS`` and other marks, unless a pattern of ``files`` asks for such names. Raises ``UserError`` for
    none, for a file that is there compressed as well as not: its rows would count twice, and for a text where Parquet is
    declared."""
    storage = Storage(root)
    found = storage.expand(source.files)
    stats = [stat for stat in found if not _is_mark(posixpath.basename(stat.name), source.files)]
    if not stats:
        raise UserError(
            f"sources.{name}.files finds marks and checksums alone, such as '{found[0].name}': where are the data files?"
        )
    files = [stat.name for stat in stats]
    _check_packed(name, files)
    if source.format == "parquet":
        _check_no_text(name, files)
    return files, len(found) - len(files)


def _check_packed(name: str, files: list[str]) -> None:
    there = set(files)
    for file in files:
        for ending in _PACKED:
            if file + ending in there:
                raise UserError(
                    f"sources.{name}.files: both {file} and {file}{ending} are there, so each row would count twice: move one "
                    f"away, or name one (sources.{name}.files=[{posixpath.basename(file)}])"
                )


def _is_mark(base: str, patterns: list[str]) -> bool:
    """Whether a file's name is that of a mark; not where a pattern begins or ends in the same way."""
    asked = [posixpath.basename(pattern) for pattern in patterns]
    if base.startswith((".", "_")):
        return not any(one.startswith(base[0]) and fnmatch.fnmatch(base, one) for one in asked)
    return base.endswith(".crc") and not any(one.endswith(".crc") for one in asked)


def _check_no_text(name: str, files: list[str]) -> None:
    text = next(filter(footers.is_text, files), None)
    if text:
        raise UserError(
            f"sources.{name}.format is parquet, and '{text}' has the name of text: correct sources.{name}.format (csv or json) "
            f"or sources.{name}.files"
        )


def declared_columns(
    name: str, source: Source, present: Iterable[str], where: str, optional: frozenset[str] = frozenset()
) -> list[str]:
    """The columns to read: those declared, or all. Raises ``UserError`` for one that is not ``present``, unless it is
    ``optional``."""
    present = list(present)
    for column in source.columns:
        if column not in optional:
            one_of(column, present, f"sources.{name}.columns: {where} lacks a column")
    wanted = [column for column in source.columns if column in present]
    return wanted or [column for column in present if not column.startswith("__")]
