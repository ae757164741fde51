"""Lines of csv files, split as declared: for headers, and to say what is wrong with a row that the engine refused."""

import json
from collections.abc import Callable

from data_loaders.errors import UserError
from data_loaders.prepare import csv_rows, decoding, text_files
from data_loaders.prepare.csv_rows import Row
from data_loaders.prepare.declaration import Source
from data_loaders.prepare.text_files import TextFile
from data_loaders.schema import one_of

_LONGEST = 16 << 20  # bytes of a first line
_SEPARATORS = (",", "\t", ";", "|", "::", "\x01", " ")


def columns(name: str, file: TextFile, source: Source, optional: frozenset[str] = frozenset()) -> list[str]:
    """The names of a file's columns, in its order: from its header, or as declared where it has none. A file without a
    header may lack the ``optional`` columns, all or none. Raises ``UserError`` for a first line that is empty, that has
    another number of columns than declared, or one declared column twice."""
    fields = split(first_line(name, file), source).fields
    if source.header:
        _check_header(name, file, source, fields, optional)
        return fields
    declared = list(source.columns)
    without = [column for column in declared if column not in optional]
    for names in (declared, without):
        if len(fields) == len(names):
            return names
    raise UserError(
        f"sources.{name}: '{file.name}' has {len(fields)} column(s) in its first line, and {len(declared)} are declared: "
        + _other_separator(name, source, fields, lambda others: len(others) in (len(declared), len(without)))
    )


def split(line: str, source: Source) -> Row:
    """One row, or the beginning of one that continues in the next line."""
    return csv_rows.split(line, source.separator, source.quote, source.escape)


def first_line(name: str, file: TextFile) -> str:
    """Raises ``UserError`` for an empty one, and for one without an end."""
    first = b""
    for chunk in text_files.chunks(name, file, line_feeds=True):
        first += chunk
        if b"\n" in chunk or len(first) > _LONGEST:
            break
    line = first.partition(b"\n")[0]
    if len(line) > _LONGEST:
        raise UserError(f"sources.{name}: '{file.name}' has no line end in its first {len(line):,} bytes: is it text?")
    if not line.strip():
        raise UserError(f"sources.{name}: '{file.name}' begins with an empty line: remove it")
    return decoding.utf8_line(f"sources.{name}", file.name, 1, line)


def _check_header(name: str, file: TextFile, source: Source, fields: list[str], optional: frozenset[str]) -> None:
    if not set(fields) & set(source.columns) - optional:
        _check_kind(name, file, source, fields)
    for column in source.columns:
        places = [place for place, field in enumerate(fields, 1) if field == column]
        if len(places) > 1:
            raise UserError(
                f"sources.{name}: '{file.name}': column '{column}' is there twice (places {places[0]} and {places[1]} of its "
                "header): rename one in the file"
            )
        if not places and column not in optional and len(fields) == 1:
            raise UserError(
                f"sources.{name}: '{file.name}' has one column in its header, {fields[0][:80]!r}: "
                + _other_separator(name, source, fields, lambda others: set(source.columns) - optional <= set(others))
            )
        if column not in optional:
            one_of(column, fields, f"sources.{name}.columns: '{file.name}' lacks a column")


def _check_kind(name: str, file: TextFile, source: Source, fields: list[str]) -> None:
    """Of a first line that names none of the declared columns. Raises ``UserError``."""
    if fields[0].startswith("{"):
        raise UserError(f"sources.{name}: '{file.name}' holds JSON, not csv: sources.{name}.format=json")
    if len(fields) == len(source.columns):
        raise UserError(
            f"sources.{name}: '{file.name}' names none of the declared columns in its first line ({', '.join(fields)[:80]}): "
            f"correct sources.{name}.columns, or if that is a row, sources.{name}.header=false"
        )


def _other_separator(name: str, source: Source, fields: list[str], fits: Callable[[list[str]], bool]) -> str:
    line = source.separator.join(fields)
    near = next((other for other in _SEPARATORS if other != source.separator and fits(line.split(other))), None)
    shown = json.dumps(source.separator)
    if near is None:
        return f"check sources.{name}.separator ({shown}), .header ({str(source.header).lower()}) and .columns"
    return f"its separator is {json.dumps(near)}, not {shown}: sources.{name}.separator={json.dumps(near)}"
