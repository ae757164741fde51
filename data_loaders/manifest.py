"""What the data is: files, row groups and column types, read from Parquet footers once, before the first step.

Everything that could go wrong with a file later (missing, empty, truncated, without a column, of another type than its
neighbours) is one ``ValueError`` here that names the file and the remedy. The fingerprint tells whether a resumed run
sees the same data.
"""

import difflib
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from data_loaders.arrow import type_kind

_SUFFIX = ".parquet"
_FOOTER_THREADS = 16


@dataclass(frozen=True)
class File:
    """One Parquet file: ``path`` is absolute, ``row_groups`` are rows of each row group, ``schema`` an index into
    ``Manifest.schemas``."""

    path: str
    size: int
    mtime_ns: int
    row_groups: tuple[int, ...]
    schema: int

    @property
    def num_rows(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True)
class Manifest:
    """``files`` in reading order; ``schemas``: the distinct Arrow schemas among them. Types of one column may differ in
    width between files (int32 and int64), not in kind."""

    root: str
    files: tuple[File, ...]
    schemas: tuple[pa.Schema, ...]

    @classmethod
    def scan(cls, paths: list[str], root: str, columns: Iterable[str]) -> "Manifest":
        """Reads the footers of all files that ``paths`` (files, folders, globs, under ``root``) stand for.

        A folder stands for the ``*.parquet`` files below it. Each path's files come sorted, each file once. Raises
        ``ValueError`` for a path without files, an unreadable file, no rows at all, a column of ``columns`` that a file
        lacks or has twice, and a column whose kind of type differs between files.
        """
        root = os.path.abspath(root)
        names = expand(paths, root)
        with ThreadPoolExecutor(max_workers=_FOOTER_THREADS) as pool:
            footers = list(pool.map(_read_footer, names))
        schemas: list[pa.Schema] = []
        files = []
        for name, (stat, row_groups, schema) in zip(names, footers):
            # Thousands of files share a few schemas; comparing is cheap beside reading the footers.
            if schema not in schemas:
                schemas.append(schema)
            files.append(File(name, stat.st_size, stat.st_mtime_ns, row_groups, schemas.index(schema)))
        manifest = cls(root, tuple(files), tuple(schemas))
        manifest.check_columns(columns)
        if not manifest.num_rows:
            raise ValueError(f"no rows in {_shown(paths)} under '{root}' ({len(files)} files): check data and paths")
        return manifest

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises ``ValueError`` unless every file has these columns, each once and of one kind of type."""
        _check_columns(self, tuple(columns))

    def types(self, columns: Iterable[str]) -> list[tuple[str, dict[str, pa.DataType]]]:
        """The types of these columns in each distinct schema, with the path of the first file that has it."""
        example = _examples(self)
        return [(example[i], {c: schema.field(c).type for c in columns}) for i, schema in enumerate(self.schemas)]

    @property
    def fingerprint(self) -> str:
        """sha256, hex, of paths relative to the root, sizes, row counts and schemas: equal for equal data, also where
        it lies in another folder."""
        digest = hashlib.sha256()
        for file in self.files:
            schema = str(self.schemas[file.schema])
            digest.update(json.dumps([self.relative(file), file.size, file.row_groups, schema]).encode())
        return digest.hexdigest()

    def relative(self, file: File) -> str:
        return os.path.relpath(file.path, self.root).replace(os.sep, "/")


def expand(paths: list[str], root: str) -> list[str]:
    """The files that ``paths`` stand for, absolute, each once. Raises ``ValueError`` where a path has none."""
    if not paths:
        raise ValueError("no data paths are given: name files, folders or globs")
    found: dict[str, None] = {}
    for path in paths:
        found.update(dict.fromkeys(_expand_one(path, root)))
    return list(found)


def _expand_one(path: str, root: str) -> list[str]:
    full = os.path.normpath(os.path.join(root, path))
    if os.path.isdir(full):
        inside = (os.path.join(folder, name) for folder, _, names in os.walk(full) for name in names)
        files = sorted(name for name in inside if name.endswith(_SUFFIX))
        if not files:
            raise ValueError(f"data folder '{full}' holds no *{_SUFFIX} file: check the path")
        return files
    # A file first: a name may well contain '[' or '*'.
    if os.path.exists(full):
        return [full]
    files = sorted(name for name in glob.glob(full, recursive=True) if os.path.isfile(name))
    if not files:
        what = "glob matches no file" if glob.has_magic(full) else "path does not exist"
        raise ValueError(f"data {what}: '{full}'; check data.root and the path")
    return files


def _read_footer(path: str) -> tuple[os.stat_result, tuple[int, ...], pa.Schema]:
    try:
        stat = os.stat(path)
        if stat.st_size == 0:
            raise ValueError(f"data file '{path}' has 0 bytes: write it again, or take it away")
        with pq.ParquetFile(path) as file:
            footer = file.metadata
            row_groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
            return stat, row_groups, file.schema_arrow.remove_metadata()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"data file '{path}' cannot be read as Parquet ({error}): it may be truncated, not Parquet, or without "
            "read permission; write it again, or take it away"
        ) from error


def _examples(manifest: Manifest) -> dict[int, str]:
    """The path of the first file of each schema."""
    return {file.schema: file.path for file in reversed(manifest.files)}


def _check_columns(manifest: Manifest, columns: tuple[str, ...]) -> None:
    example = _examples(manifest)
    for index, schema in enumerate(manifest.schemas):
        _check_names(schema.names, columns, example[index])
    for column in columns:
        found = [schema.field(column).type for schema in manifest.schemas]
        kinds = {type_kind(kind): index for index, kind in reversed(list(enumerate(found)))}
        kinds.pop("null", None)  # a column of nulls only goes with any kind, one of empty lists with any list
        if any(kind.startswith("list of") and kind != "list of null" for kind in kinds):
            kinds.pop("list of null", None)
        if len(kinds) > 1:
            shown = "; ".join(f"{found[index]} in '{example[index]}'" for index in sorted(kinds.values()))
            raise ValueError(f"column '{column}' has types of different kinds: {shown}; write it with one type")


def _check_names(names: list[str], columns: tuple[str, ...], path: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1 and name in columns]
    if twice:
        raise ValueError(f"data file '{path}' has more than one column named {_shown(twice)}: rename all but one")
    missing = [column for column in columns if column not in names]
    if not missing:
        return
    hints = []
    for column in missing:
        near = difflib.get_close_matches(column, names, n=3, cutoff=0.5)
        hints.append(f"'{column}'" + (f" (near: {', '.join(near)})" if near else ""))
    raise ValueError(
        f"data file '{path}' lacks {len(missing)} column(s): {'; '.join(hints)}. It has: {', '.join(names[:50])}"
        f"{', …' if len(names) > 50 else ''}. Correct schema.features.*.column, or write the column"
    )


def _shown(values: Iterable[str]) -> str:
    return ", ".join(f"'{value}'" for value in values)
