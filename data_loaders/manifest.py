"""What the data is: files, row groups and column types, read from Parquet footers once, before the first step.

Everything that could go wrong with a file later (missing, empty, truncated, without a column, of another type than its
neighbours) is one ``UserError`` here that names the file and the remedy. The fingerprint shows whether a resumed run
sees the same data.

A *column* is a file's column of that name; or a child of a struct column, ``geo.city``; or a *partition column*: the
folder ``day=2024-01-02`` gives all rows below it that ``day``. A file's own column goes before a partition's, and a whole
name before a struct's child.
"""

import base64
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from data_loaders import footers
from data_loaders.arrow import type_kind
from data_loaders.errors import UserError
from data_loaders.storage import NoParquetError, Storage, full_name, is_uri, relative_name, root_name

_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_VERSION = 1  # of ``to_dict``
_MOST = 1 << 62  # bytes, rows or nanoseconds of a file


@dataclass(frozen=True)
class File:
    """One Parquet file: ``path`` is its full name (see ``storage``), ``row_groups`` are rows of each row group, ``schema``
    is an index into ``Manifest.schemas``, ``footer`` the sha256, hex, of the Parquet footer's bytes: equal for an equal
    copy, other for a file written anew. ``partitions``: (name, value or None) of the folders ``name=value`` between the
    root and the file. ``shuffled``: whether the file says that ``prepare`` has shuffled its rows; part of its footer, so not
    stored beside it."""

    path: str
    size: int
    mtime_ns: int
    row_groups: tuple[int, ...]
    schema: int
    footer: str
    partitions: tuple[tuple[str, str | None], ...] = ()
    shuffled: bool = False

    @property
    def num_rows(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True)
class Changes:
    """How data differ from what they were, in paths relative to the root: files no longer there, files of other content,
    files that came."""

    missing: tuple[str, ...]
    changed: tuple[str, ...]
    added: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """``files`` in reading order; ``schemas``: the distinct Arrow schemas among them. Types of one column may differ in
    width between files (int32 and int64), not in kind. ``root`` may carry a URI's options."""

    root: str
    files: tuple[File, ...]
    schemas: tuple[pa.Schema, ...]

    @classmethod
    def scan(cls, paths: Sequence[str], root: str, columns: Iterable[str]) -> "Manifest":
        """Reads the footers of all files that ``paths`` (files, folders, globs, under ``root`` or full names) stand for.

        A folder stands for the ``*.parquet`` files below it. Each path's files come sorted, each file once. Raises
        ``UserError`` for a path without files, an unreadable file, no rows at all, a column of ``columns`` that a file
        lacks or has twice, and a column whose kind of type differs between files; ``StorageError`` where the storage
        keeps failing.
        """
        if not paths:
            raise UserError("no data paths are given: name files, folders or globs")
        storage = Storage(root)
        root = root if not storage.local else storage.root
        try:
            stats = storage.expand(paths)
        except NoParquetError as error:
            raise UserError(f"{error}; {footers.PREPARE}") from error
        indices: dict[bytes, int] = {}
        schemas: list[pa.Schema] = []
        files = []
        for stat, footer in zip(stats, footers.scan(storage, stats)):
            # Thousands of files share a few schemas.
            index = indices.setdefault(footer.schema.serialize().to_pybytes(), len(schemas))
            schemas += [footer.schema] if index == len(schemas) else []
            partitions = _partitions(relative_name(stat.name, storage.root))
            facts = (footer.row_groups, index, footer.digest, partitions, footer.shuffled)
            files.append(File(stat.name, stat.size, stat.mtime_ns, *facts))
        manifest = cls(root, tuple(files), tuple(schemas))
        manifest.check_columns(columns)
        if not manifest.num_rows:
            raise UserError(
                f"no rows in {_shown(paths)} under '{storage.root}' ({len(files)} files): check data and paths"
            )
        return manifest

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    @property
    def is_shuffled(self) -> bool:
        """Whether ``prepare`` has shuffled all rows: one file that it has not makes it no."""
        return all(file.shuffled for file in self.files if file.num_rows)

    @cached_property
    def partition_types(self) -> dict[str, pa.DataType]:
        """int64 for a partition column whose values are all integers, else string. Files without it have nulls."""
        values: dict[str, set[str | None]] = {}
        for file in self.files:
            for name, value in file.partitions:
                values.setdefault(name, set()).add(value)
        return {name: pa.int64() if _all_integers(found) else pa.string() for name, found in values.items()}

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises ``UserError`` unless every file has these columns, each once and of one kind of type."""
        _check_columns(self, tuple(columns))

    def types(self, columns: Iterable[str]) -> list[tuple[str, dict[str, pa.DataType]]]:
        """The types of these columns in each distinct schema, with the path of the first file that has it."""
        example = _examples(self)
        columns = tuple(columns)
        return [(example[i], {c: self._type(schema, c) for c in columns}) for i, schema in enumerate(self.schemas)]

    def _type(self, schema: pa.Schema, column: str) -> pa.DataType:
        path = find_column(schema, column)
        return self.partition_types[column] if path is None else column_type(schema, path)

    @property
    def fingerprint(self) -> str:
        """sha256, hex, of paths relative to the root, sizes, row counts, footers and schemas: equal for equal data, also
        where it is in another folder or was copied."""
        digest = hashlib.sha256()
        schemas = [hashlib.sha256(schema.serialize()).hexdigest() for schema in self.schemas]
        for file in self.files:
            facts = [self.relative(file), file.size, file.row_groups, file.footer, schemas[file.schema]]
            digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    def relative(self, file: File) -> str:
        return relative_name(file.path, root_name(self.root))

    def select(self, paths: Iterable[str]) -> "Manifest":
        """The same manifest with only these files, given by their paths relative to the root. Raises ``UserError`` for
        one it does not have."""
        wanted = set(paths)
        files = [file for file in self.files if self.relative(file) in wanted]
        if len(files) < len(wanted):
            absent = sorted(wanted - {self.relative(file) for file in files})
            raise UserError(f"the data lack {len(absent)} of the files asked for: {_shown(absent[:5])}")
        return _compact(self.root, files, self.schemas)

    def changes(self, saved: "Manifest") -> Changes:
        """How the data, as this manifest has them, differ from ``saved``."""
        now = {self.relative(file): file for file in self.files}
        then = {saved.relative(file): file for file in saved.files}
        return Changes(
            missing=tuple(path for path in then if path not in now),
            changed=tuple(path for path in then if path in now and _content(now[path]) != _content(then[path])),
            added=tuple(path for path in now if path not in then),
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the root, under which ``from_dict`` puts the files again."""
        schemas = [base64.b64encode(schema.serialize()).decode() for schema in self.schemas]
        files = [
            [self.relative(file), file.size, file.mtime_ns, list(file.row_groups), file.schema, file.footer]
            for file in self.files
        ]
        return {"version": _VERSION, "schemas": schemas, "files": files}

    @classmethod
    def from_dict(cls, values: dict[str, Any], root: str) -> "Manifest":
        """The manifest that ``to_dict`` described, its files under ``root``. Raises ``UserError`` for another version, and
        for what ``to_dict`` would not describe so."""
        if values.get("version") != _VERSION:
            raise UserError(f"a data manifest of version {values.get('version')!r:.50}: this program reads {_VERSION}")
        lists = values.get("schemas"), values.get("files")
        if not all(isinstance(it, list) for it in lists) or not lists[1]:
            raise UserError("a data manifest without schemas or files")
        base = root_name(root)
        schemas = [_stored_schema(text) for text in lists[0]]
        files = [_stored_file(facts, base, len(schemas)) for facts in lists[1]]
        if len({file.path for file in files}) < len(files):
            raise UserError("a data manifest that names a file twice")
        return cls(root if is_uri(base) else base, tuple(files), tuple(schemas))


def _stored_schema(text: Any) -> pa.Schema:
    try:
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text, validate=True)))
    except (pa.ArrowException, OSError, TypeError, ValueError, MemoryError):
        raise UserError("a data manifest with a schema that is none") from None


def _stored_file(facts: Any, base: str, num_schemas: int) -> File:
    """A file of ``to_dict``, under ``base``."""
    kinds = (str, int, int, list, int, str)
    if not isinstance(facts, list) or [*map(type, facts)] != [*kinds]:
        raise UserError(f"a data manifest with the file {facts!r:.200}")
    path, size, mtime_ns, row_groups, schema, footer = facts
    counts = [size, *row_groups]
    sound = all(type(count) is int and 0 <= count < _MOST for count in counts) and sum(row_groups) < _MOST
    if not (sound and path and "\0" not in path and 0 <= schema < num_schemas and abs(mtime_ns) < _MOST):
        raise UserError(f"a data manifest with the file {facts!r:.200}")
    return File(full_name(path, base), size, mtime_ns, tuple(row_groups), schema, footer, _partitions(path))


def _content(file: File) -> tuple[Any, ...]:
    return file.size, file.row_groups, file.footer


def _compact(root: str, files: list[File], schemas: tuple[pa.Schema, ...]) -> Manifest:
    """Leaves out the schemas that no file has."""
    used = sorted({file.schema for file in files})
    places = {old: new for new, old in enumerate(used)}
    kept = tuple(replace(file, schema=places[file.schema]) for file in files)
    return Manifest(root, kept, tuple(schemas[index] for index in used))


# Columns


def find_column(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Where a file has a column: its name, or a struct column's and its children's; None where it has none."""
    if column in schema.names:
        return (column,)
    return next((path for field in schema if (path := _child_path(field, column))), None)


def _child_path(field: pa.Field, column: str) -> tuple[str, ...] | None:
    if column == field.name:
        return (field.name,)
    if not pa.types.is_struct(field.type) or not column.startswith(f"{field.name}."):
        return None
    rest = column[len(field.name) + 1 :]
    below = next((path for child in field.type if (path := _child_path(child, rest))), None)
    return below and (field.name, *below)


def column_type(schema: pa.Schema, path: tuple[str, ...]) -> pa.DataType:
    kind = schema.field(path[0]).type
    for name in path[1:]:
        kind = kind.field(name).type
    return kind


def _names(field: pa.Field, prefix: str = "") -> list[str]:
    """The names of a column or, of a struct, of its children."""
    name = prefix + field.name
    below = (
        [each for child in field.type for each in _names(child, f"{name}.")] if pa.types.is_struct(field.type) else []
    )
    return below or [name]


def _partitions(path: str) -> tuple[tuple[str, str | None], ...]:
    """Of the folders of a relative path; the inner one wins where a name comes twice."""
    found: dict[str, str | None] = {}
    for folder in path.split("/")[:-1]:
        name, equals, value = folder.partition("=")
        if equals and name:
            found[unquote(name)] = None if value == _NULL_PARTITION else unquote(value)
    return tuple(found.items())


def _all_integers(values: set[str | None]) -> bool:
    """And at least one, each within int64."""
    texts = [value for value in values if value is not None]
    whole = all(re.fullmatch(r"[+-]?[0-9]{1,19}", text) for text in texts)
    return bool(texts) and whole and all(-(1 << 63) <= int(text) < 1 << 63 for text in texts)


def _examples(manifest: Manifest) -> dict[int, str]:
    """The path of the first file of each schema."""
    return {file.schema: file.path for file in reversed(manifest.files)}


def _check_columns(manifest: Manifest, columns: tuple[str, ...]) -> None:
    example = _examples(manifest)
    for index, schema in enumerate(manifest.schemas):
        _check_names(schema, list(manifest.partition_types), columns, example[index])
    types = manifest.types(columns)
    for column in columns:
        found = [kinds[column] for _, kinds in types]
        kinds = {type_kind(kind): index for index, kind in reversed(list(enumerate(found)))}
        kinds.pop("null", None)  # a column of nulls only goes with any kind, one of empty lists with any list
        if any(kind.startswith("list of") and kind != "list of null" for kind in kinds):
            kinds.pop("list of null", None)
        if len(kinds) > 1:
            shown = "; ".join(f"{found[index]} in '{example[index]}'" for index in sorted(kinds.values()))
            raise UserError(f"column '{column}' has types of different kinds: {shown}; write it with one type")


def _check_names(schema: pa.Schema, partitions: list[str], columns: tuple[str, ...], path: str) -> None:
    paths = {column: find_column(schema, column) for column in columns}
    asked = {found[0] for found in paths.values() if found}
    twice = [name for name, count in Counter(schema.names).items() if count > 1 and name in asked]
    if twice:
        raise UserError(f"data file '{path}' has more than one column named {_shown(twice)}: rename all but one")
    missing = [column for column in columns if not paths[column] and column not in partitions]
    if not missing:
        return
    names = [name for field in schema for name in _names(field)] + partitions
    hints = []
    for column in missing:
        near = difflib.get_close_matches(column, names, n=3, cutoff=0.5)
        hints.append(f"'{column}'" + (f" (near: {', '.join(near)})" if near else ""))
    raise UserError(
        f"data file '{path}' lacks {len(missing)} column(s): {'; '.join(hints)}. It has: {', '.join(names[:50])}"
        f"{', …' if len(names) > 50 else ''}. Correct schema.features.*.column, or write the column"
    )


def _shown(values: Iterable[str]) -> str:
    return ", ".join(f"'{value}'" for value in values)
