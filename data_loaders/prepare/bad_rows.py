"""What is wrong with a row that an engine could not read, found by reading the file again, line by line.

Engines know that something is wrong, and roughly where; their messages differ from version to version and advise
settings that a recipe does not have.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_loaders.errors import UserError
from data_loaders.prepare import csv_lines, decoding, text_files, values
from data_loaders.prepare.declaration import Source
from data_loaders.prepare.text_files import TextFile

_MOST_LINES = 1000  # of one row, quoted line ends and all: more is a quote that was not closed
LONGEST = {"csv": 2_000_000, "json": 16_000_000}  # characters of a row, as DuckDB has it
_SHOWN = 60
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Hint:
    """What an engine reported: the row is near ``line`` (from 1), and ``value`` is what could not be converted."""

    line: int | None = None
    value: str | None = None


def explain(name: str, source: Source, file: TextFile, names: list[str], hint: Hint) -> UserError | None:
    """What is wrong with the file's first bad row, or with the one that the engine reports; None where nothing is found.
    ``names``: of the columns in the file's order (csv)."""
    check = _csv_check(name, source, names) if source.format == "csv" else _json_check(name, source)
    if hint.line is not None:
        found = _first(name, source, file, check, hint, range(max(1, hint.line - 1), hint.line + 1))
        if found is not None:
            return found
    return _first(name, source, file, check, Hint(None, hint.value), None)


@dataclass
class Skipped:
    """The number of rows left out, and the first of them."""

    rows: int = 0
    first: str | None = None

    def add(self, rows: int, first: str | None) -> None:
        self.rows += rows
        self.first = self.first or first


def good_lines(name: str, source: Source, file: TextFile, skipped: Skipped) -> Iterator[bytes]:
    """The lines of JSON that are as declared; counts the others in ``skipped``."""
    check = _json_check(name, source)
    for number, line in enumerate(text_files.lines(name, file), 1):
        try:
            problem = check(line.decode("utf-8"), None)
        except UnicodeDecodeError:
            problem = "bytes that are not utf-8"
        if problem is None:
            yield line + b"\n"
            continue
        skipped.add(1, f"'{file.name}', line {number:,}: {problem}")


def find(name: str, file: TextFile, line: str) -> int | None:
    """The number of the line with this text."""
    wanted = line.encode("utf-8", "replace")
    return next((number for number, found in enumerate(text_files.lines(name, file), 1) if found == wanted), None)


def check_zeros(name: str, file: TextFile, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks. Raises ``UserError`` where one holds a zero byte, which engines let pass inside of a text."""
    line = 1
    for chunk in chunks:
        place = chunk.find(0)
        if place >= 0:
            raise zeros(name, file.name, line + chunk.count(b"\n", 0, place))
        line += chunk.count(b"\n")
        yield chunk


def zeros(name: str, file: str, line: int | None = None) -> UserError:
    return UserError(
        f"sources.{name}: '{file}'{f', line {line:,}' if line else ''}: holds zero bytes, which text has not: it is damaged, "
        f"or another format; copy it again, or leave it out of sources.{name}.files"
    )


def no_good(name: str, rows: int, first: str | None) -> UserError:
    """Where bad rows are left out, and none remains."""
    return UserError(f"sources.{name}: each of its {rows:,} row(s) is bad, the first: {first}")


def without_remedy(error: UserError | None, name: str) -> str | None:
    return str(error).removesuffix(f"; {remedy(name)}").removeprefix(f"sources.{name}: ") if error else None


def remedy(name: str) -> str:
    return f"mend the row, or leave such rows out and have them counted: sources.{name}.bad_rows=skip"


Check = Callable[[str, str | None], str | None]  # a row, the value that an engine complained of -> what is wrong


def _first(
    name: str, source: Source, file: TextFile, check: Check, hint: Hint, where: range | None
) -> UserError | None:
    rows = _rows(name, source, file, where)
    try:
        for number, row in rows:
            problem = check(row, hint.value)
            if problem:
                return UserError(f"sources.{name}: '{file.name}', line {number:,}: {problem}; {remedy(name)}")
    except UserError as error:  # bytes that are not of the encoding, data that cannot be decompressed
        return error
    return None


def _rows(name: str, source: Source, file: TextFile, where: range | None) -> Iterator[tuple[int, str]]:
    """The rows that begin at the line numbers of ``where`` (all by default), each with its number. A header is none."""
    held, start = [], 0
    has_quotes = source.format == "csv" and source.quote
    for number, line in enumerate(text_files.lines(name, file), 1):
        if where is not None and number > where[-1] and not held:
            return
        if (where is not None and number < where[0]) or (number == 1 and source.format == "csv" and source.header):
            continue
        held.append(decoding.utf8_line(f"sources.{name}", file.name, number, line))
        start = start or number
        row = "\n".join(held)
        may_be_open = has_quotes and len(row) <= LONGEST["csv"] and source.quote in row
        is_open = may_be_open and csv_lines.split(row, source).is_open
        if is_open and len(held) < _MOST_LINES:
            continue
        if row:
            yield start, row
        held, start = [], 0
    if held:
        yield start, "\n".join(held)


def _csv_check(name: str, source: Source, names: list[str]) -> Check:
    declared = [(place, field, source.columns[field]) for place, field in enumerate(names) if field in source.columns]
    missing = {"", *source.null_values}

    def check(text: str, value: str | None) -> str | None:
        if len(text) > LONGEST["csv"]:
            return f"a row of {len(text):,} characters, where {LONGEST['csv']:,} can be read: is a quote not closed?"
        row = csv_lines.split(text, source)
        if "\0" in text:
            return "zero bytes, which text has not"
        if row.is_open:
            problem = f"a quote ({source.quote}) that opens a field is not closed ({_shown(text)})"
            return problem + _quote_advice(name, source, text)
        if row.has_stray_quote:
            return f"characters follow a closing quote ({_shown(text)}){_quote_advice(name, source, text)}"
        fields = row.fields
        if len(fields) == len(names) + 1 and not fields[-1]:
            fields = fields[:-1]  # a separator at the line's end
        if len(fields) != len(names):
            return f"{len(fields)} field(s) where {len(names)} are due ({_shown(text)})"
        if fields == names and any(kind != "string" for _, _, kind in declared):
            return f"the names of the columns: remove that line, or of the first, sources.{name}.header=true"
        for place, column, kind in declared:
            if fields[place] not in missing and _is_misfit(kind, fields[place], value):
                missing_too = (
                    f", or name what stands for a missing value (sources.{name}.null_values=[{fields[place][:_SHOWN]}])"
                )
                shown = repr(fields[place][:_SHOWN])
                return _misfit(name, column, shown, kind, values.better_type(fields[place], kind)) + missing_too
        return None

    return check


def _json_check(name: str, source: Source) -> Check:
    def check(text: str, value: str | None) -> str | None:
        if len(text) > LONGEST["json"]:
            return f"an object of {len(text):,} characters, where {LONGEST['json']:,} can be read"
        if not text.strip():
            return None
        try:
            found = json.loads(
                text.removesuffix("\r"), object_pairs_hook=_without_twins, parse_int=_Number, parse_float=_Number
            )
        except RecursionError:
            return "its values are nested too deeply"
        except json.JSONDecodeError as error:
            return _no_json(text, error)
        except ValueError as error:
            return str(error)
        if _HALF.search(text) and _has_half_letters(found):
            return "half of a surrogate pair (\\ud800 … \\udfff without its other half) in a text"
        if not isinstance(found, dict):
            kind = "an array" if isinstance(found, list) else "a single value"
            return f"{kind} where an object {{…}} is due ({_shown(text)}); {_ONE_A_LINE}"
        for column, kind in source.columns.items():
            if found.get(column) is not None and _is_json_misfit(kind, found[column]):
                text = _json_text(found[column])
                return _misfit(name, column, text[:_SHOWN], kind, values.better_type(text.strip('"'), kind))
        return None

    return check


_ONE_A_LINE = (
    "write one object a line (jq -c '.[]' makes such lines of an array, jq -c . of objects over several lines)"
)


def _has_half_letters(found: object) -> bool:
    try:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _no_json(text: str, error: json.JSONDecodeError) -> str:
    begin = text.strip()
    if error.msg == "Extra data":
        return f"more follows the object ({_shown(text[error.pos :])}); {_ONE_A_LINE}"
    if begin in ("[", "{") or (begin.startswith("[") and not begin.endswith("]")):
        return f"a value that goes over several lines ({_shown(text)}); {_ONE_A_LINE}"
    return f"broken JSON at character {error.pos + 1} ({_shown(text[max(0, error.pos - 20) :])})"


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the key '{twin}' is there twice in an object")
    return found


class _Number(str):
    """A number as it is written: int() refuses thousands of digits, float() rounds."""


def _json_text(value: object) -> str:
    return str(value) if isinstance(value, _Number) else json.dumps(value)


def _quote_advice(name: str, source: Source, row: str) -> str:
    if source.escape:
        return f": check sources.{name}.quote and .escape"
    if f"\\{source.quote}" in row:
        return f": quotes are escaped by a backslash here, as Spark and MySQL write: sources.{name}.escape='\\'"
    return f": a quote inside a field is doubled, or if none is special, take quote: '' in sources.{name}"


def _misfit(name: str, column: str, shown: str, kind: str, other: str) -> str:
    return f"column '{column}' holds {shown}, which is not {kind}: declare another type (sources.{name}.columns.{column}={other})"


def _is_misfit(kind: str, text: str, value: str | None) -> bool:
    if kind == "string":
        return False
    if value is not None and text == value:
        return True
    return not kind.startswith("list<") and not values.holds(text, kind)


def _is_json_misfit(kind: str, value: object) -> bool:
    if kind.startswith("list<"):
        inner = kind.removeprefix("list<").removesuffix(">")
        return not isinstance(value, list) or any(one is not None and _is_json_misfit(inner, one) for one in value)
    if isinstance(value, (list, dict)):
        return kind != "string"
    return not values.holds(value if isinstance(value, str) else json.dumps(value), kind)


def _shown(text: str) -> str:
    return repr(text[:_SHOWN] + ("…" if len(text) > _SHOWN else ""))
