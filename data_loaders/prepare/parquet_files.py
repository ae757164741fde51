"""The Parquet files of a source, in groups of one schema each, and what each group gives for the declared columns.

An engine that reads files of unlike schemas together fills what one lacks with nulls and widens what differs, without a
word. So each group is read by itself, and a column that a file lacks, or whose types do not go together, is an error that
names the file. A folder called ``day=2024-01-02`` gives the column ``day`` to files that have none, as text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import ibis
import ibis.expr.datatypes as dt
import pyarrow as pa

from data_loaders import footers
from data_loaders.errors import UserError
from data_loaders.prepare import values
from data_loaders.prepare.declaration import TEMPORARY, Source
from data_loaders.schema import one_of
from data_loaders.storage import Storage

PATH = "__path_"  # before the name of a column: what the folder's name gives, where the file has the column too


@dataclass(frozen=True)
class Group:
    """``files``: their numbers among the source's, and names. ``schema``: what they hold, in their order. ``columns``: those
    to take from the files; ``of_path``: those that folders' names give; ``doubled``: those that both give; ``absent``: those
    that are null, as they are optional or have no type (pyarrow writes so what is null in every row)."""

    files: tuple[tuple[int, str], ...]
    schema: pa.Schema
    columns: tuple[str, ...] = ()
    of_path: tuple[str, ...] = ()
    doubled: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.files]


def groups(
    name: str,
    source: Source,
    files: Sequence[str],
    root: str,
    optional: frozenset[str],
    needed: frozenset[str] | None = None,
) -> list[Group]:
    """In the order of their first files. ``needed``: where no columns are declared, those that others give way to (case
    counts), and that no file may lack; all by default. Raises ``UserError`` for a damaged footer, with which an engine might
    lose rows or crash, for a file that lacks a
    column which is declared or which others have, and for columns that SQL does not distinguish."""
    storage = Storage(root)
    try:
        found = footers.scan(storage, [storage.stat(file) for file in files])
    except ValueError as error:
        raise UserError(f"sources.{name}: {error}") from None
    together: dict[tuple, list[tuple[int, str]]] = {}
    schemas = {}
    for number, (file, footer) in enumerate(zip(files, found)):
        key = (tuple(zip(footer.schema.names, map(str, footer.schema.types))), tuple(path_values(file)))
        together.setdefault(key, []).append((number, file))
        schemas[key] = footer.schema
    made = [Group(tuple(members), schemas[key]) for key, members in together.items()]
    wanted = _wanted(name, source, made, needed)
    return [_chosen(name, source, group, wanted, optional) for group in made]


def path_values(file: str) -> dict[str, str]:
    """``{day: 2024-01-02}`` of ``…/day=2024-01-02/x.parquet``, as Hive and Spark write it."""
    pairs = (folder.partition("=") for folder in file.split("/")[:-1])
    return {name: unquote(value) for name, equals, value in pairs if equals and name and not TEMPORARY.match(name)}


def path_value(file: str, column: str) -> str | None:
    """None for a missing value."""
    value = path_values(file)[column]
    return None if value == "__HIVE_DEFAULT_PARTITION__" else value


def _wanted(name: str, source: Source, made: list[Group], needed: frozenset[str] | None) -> list[str]:
    """The columns to read: those declared, or all but those that cannot be read and are not needed."""
    if source.columns:
        return list(source.columns)
    found: dict[str, str] = {}  # lowercase -> as it is
    for group in made:
        for column in [*group.schema.names, *path_values(group.names[0])]:
            other = found.setdefault(column.lower(), column)
            if other == column or TEMPORARY.match(column) or (needed is not None and column not in needed):
                continue
            if needed is None or other in needed:
                raise UserError(
                    f"sources.{name}: '{group.names[0]}' has the columns '{other}' and '{column}', which SQL does not "
                    f"distinguish: name those that you need, with their types, in sources.{name}.columns"
                )
            found[column.lower()] = column
    columns = [column for column in found.values() if not TEMPORARY.match(column)]
    everywhere = set.intersection(*({*group.schema.names, *path_values(group.names[0])} for group in made))
    lowered = None if needed is None else {one.lower() for one in needed}
    return [c for c in columns if c in everywhere or lowered is None or c.lower() in lowered]


def _chosen(name: str, source: Source, group: Group, wanted: list[str], optional: frozenset[str]) -> Group:
    file, names = group.names[0], group.schema.names
    given = path_values(file)
    for column in wanted:
        if names.count(column) > 1:
            raise UserError(
                f"sources.{name}: '{file}' has the column '{column}' {names.count(column)} times: rename one"
            )
        if column in names or column in given or column in optional:
            continue
        if not source.columns:
            raise UserError(
                f"sources.{name}: '{file}' lacks a column that other files have, '{column}': leave the file out, or "
                f"declare in sources.{name}.columns those that all have"
            )
        one_of(column, [*names, *given], f"sources.{name}.columns: '{file}' lacks a column")
    inside = tuple(c for c in wanted if c in names and not pa.types.is_null(group.schema.field(c).type))
    of_path = tuple(column for column in wanted if column in given and column not in names)
    doubled = tuple(column for column in inside if column in given)
    absent = tuple(column for column in wanted if column not in inside and column not in of_path)
    return Group(group.files, group.schema, inside, of_path, doubled, absent)


def typed(name: str, source: Source, group: Group, table: ibis.Table) -> ibis.Table:
    """The columns of a group's ``table`` as declared, with ``values.BAD``. Raises ``UserError`` for a type that never fits."""
    declared = {column: kind for column, kind in source.columns.items() if column in table.columns}
    same = {column: PATH + column for column in group.doubled}
    rest = [column for column in table.columns if column not in declared and column not in same.values()]
    try:
        return values.typed(table, declared, rest, same)
    except ValueError as error:
        raise UserError(f"sources.{name}: '{group.names[0]}': {error}") from None


def needs_look(source: Source, group: Group, table: ibis.Table) -> bool:
    """Whether a value may not fit."""
    declared = [column for column in (*group.columns, *group.of_path) if column in source.columns]
    return bool(group.doubled) or not all(
        values.is_lossless(table[c].type(), values.declared_type(source.columns[c])) for c in declared
    )


def misfit(name: str, source: Source, file: str, place: int, bad: str) -> UserError:
    """``bad``: what ``values.BAD`` says of the row at ``place`` (from 0)."""
    problem = values.misfit(name, source.columns, bad, text=False)
    return UserError(f"sources.{name}: '{file}', row {place + 1:,}: {problem}")


def united(name: str, source: Source, parts: Sequence[Group], tables: Sequence[ibis.Table]) -> ibis.Table:
    """The tables of the groups, one behind the other, whose columns were made by ``values.typed``. Raises ``UserError`` for
    a column without a declared type whose files differ in more than width."""
    kinds: dict[str, tuple[dt.DataType, str]] = {}
    for group, table in zip(parts, tables):
        for column, kind in table.schema().items():
            known, file = kinds.setdefault(column, (kind, group.names[0]))
            wide = _wider(known.copy(nullable=True), kind.copy(nullable=True))
            if wide is None:
                raise UserError(
                    f"sources.{name}: column '{column}' is {known} in '{file}' and {kind} in '{group.names[0]}': declare what "
                    f"it is to be (sources.{name}.columns)"
                )
            kinds[column] = (wide, file)
    for group in parts:
        for column in group.absent:
            if column in source.columns or column in group.schema.names:
                kinds.setdefault(column, (values.declared_type(source.columns.get(column, "string")), ""))
    if len(tables) == 1 and len(kinds) == len(tables[0].columns):
        return tables[0]
    made = [
        table.select(
            **{
                column: table[column].cast(kind) if column in table.columns else ibis.null(kind)
                for column, (kind, _) in kinds.items()
            }
        )
        for table in tables
    ]
    return ibis.union(*made) if len(made) > 1 else made[0]


def _wider(one: dt.DataType, other: dt.DataType) -> dt.DataType | None:
    if one == other or other.is_null():
        return one
    if one.is_null():
        return other
    alike = (one.is_signed_integer() and other.is_signed_integer()) or (one.is_floating() and other.is_floating())
    return max(one, other, key=lambda kind: kind.nbytes) if alike else None
