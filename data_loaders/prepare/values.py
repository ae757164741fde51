"""Raw values as the declared type holds them, exactly, or not at all: one policy for CSV, JSON and Parquet, on every engine.

What each type takes is in docs/prepare.md ("Values"). In short: a whole number may be written ``7``, ``+7``, ``7.0`` or
``7e2``; what has a fraction, lies outside the type's range, or is rounded already (a float beyond 2^53) is no whole number. A
number is no boolean and no time, and the other way round. Times are UTC: an offset is applied. Nothing is rounded, cut off or
made null silently; only floats are what they are, the nearest number.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime

import ibis
import ibis.expr.datatypes as dt

from data_loaders.errors import UserError
from data_loaders.prepare.numbers import LARGEST, LARGEST_FLOAT32, exact

BAD = "__bad"  # a column: the first value of the row that its type does not hold, for ``misfit`` to read; else null
_EXACT = 2.0**53
_DIGITS, _WHOLE = r"^[+-]?[0-9]+$", r"^[+-]?[0-9]+\.0*$"
_SCALED = r"^[+-]?[0-9]+(\.[0-9]*)?[eE][+]?[0-9]+$"
_NUMBER = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_DATE = r"^[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}$"
_MOMENT = (
    r"^[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}"
    r"([ T][0-9]{1,2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,9})?)?( ?(Z|UTC|[+-][0-9]{2}(:?[0-9]{2})?))?)?$"
)
_SPECIAL = re.compile(r"[+-]?(nan|inf|infinity)")
_OFFSET = r"([+-])([0-9]{2}):?([0-9]{2})?$"
_TRUE, _FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
_SHOWN = 80
_MARK = "\x1f"  # in ``BAD``: between the column, the text and, where they differ, what the folder's name says


def declared_type(kind: str) -> dt.DataType:
    """Of a source's ``columns``."""
    return dt.dtype(kind.replace("list<", "array<"))


def nulls(columns: Mapping[str, str], present: Collection[str]) -> dict[str, ibis.Value]:
    """Of the ``columns`` (name -> declared type) that are not ``present``."""
    return {name: ibis.null(declared_type(kind)) for name, kind in columns.items() if name not in present}


def as_declared(value: ibis.Value, kind: dt.DataType) -> ibis.Value | None:
    """``value`` as ``kind``, null where it does not hold it; None where nothing of the value's type ever fits."""
    found = value.type()
    if kind.is_array():
        return _list(value, kind) if found.is_array() else None
    if found.copy(nullable=True) == kind:
        return value
    for matches, convert in _FROM:
        if matches(found):
            return convert(value, kind)
    return None


def plain(value: ibis.Value) -> ibis.Value:
    """As it is, but for times: without a zone, in UTC, to the microsecond."""
    kind = value.type()
    return value.cast("timestamp(6)") if kind.is_timestamp() and kind != dt.Timestamp(scale=6) else value


def is_lossless(found: dt.DataType, kind: dt.DataType) -> bool:
    """Whether every value of one type is one of the other, so that no check is needed."""
    found = found.copy(nullable=True)
    if found == kind or found.is_null():
        return True
    if found.is_array() and kind.is_array():
        return is_lossless(found.value_type, kind.value_type)
    if (found.is_timestamp() or found.is_date()) and kind.is_timestamp():
        return True  # what is finer than a microsecond is left out, as documented
    if found.is_integer() and kind.is_integer():
        return found.bounds.lower >= kind.bounds.lower and found.bounds.upper <= kind.bounds.upper
    return (kind.is_string() and not found.is_floating()) or (kind == dt.float64 and found.is_numeric())


def raw_type(kind: str) -> dt.DataType:
    """Of a column of a text file before it is ``typed``."""
    return dt.Array(dt.string) if kind.startswith("list<") else dt.string


def holds(text: str, kind: str) -> bool:
    """Whether ``kind``, of a single value, takes a text: what ``as_declared`` does, for one value in Python."""
    bare = text.strip(" \t\n\r\v\f")
    if kind.startswith("int"):
        return _holds_whole(bare, dt.dtype(kind))
    if kind.startswith("float"):
        largest = LARGEST if kind == "float64" else LARGEST_FLOAT32
        return _SPECIAL.fullmatch(bare.lower()) is not None or (
            re.match(_NUMBER, bare) is not None and abs(float(bare)) <= largest
        )
    if kind == "boolean":
        return bare.lower() in (*_TRUE, *_FALSE)
    return kind == "string" or _holds_time(bare, _DATE if kind == "date" else _MOMENT)


def _holds_whole(text: str, kind: dt.DataType) -> bool:
    low, high = kind.bounds.lower, kind.bounds.upper
    if re.match(_DIGITS, text) or re.match(_WHOLE, text):
        digits = text.partition(".")[0]
        return len(digits.lstrip("+-0")) <= 20 and low <= int(digits) <= high
    if not re.match(_SCALED, text):
        return False
    number = float(text)
    return abs(number) <= _EXACT and number == int(number) and low <= number <= high


def _holds_time(text: str, pattern: str) -> bool:
    if not re.match(pattern, text):
        return False
    year, month, day, *time = [int(part) for part in re.findall(r"[0-9]+", text)]
    try:
        datetime(year, month, day, *(time[:3] if ":" in text else []))  # type: ignore[arg-type] # no tzinfo among three
    except ValueError:
        return False
    return True


def typed(
    table: ibis.Table, columns: Mapping[str, str], rest: Iterable[str] = (), same: Mapping[str, str] | None = None
) -> ibis.Table:
    """The ``columns`` (name -> declared type) as their types, the columns ``rest`` as they are, and ``BAD``. ``same``: pairs
    of columns, the second of text, that must have the same value. Raises ``UserError`` (without a place) for a column of
    a type that never fits."""
    made, cases = {}, []
    for name, text in columns.items():
        kind = declared_type(text)
        made[name] = as_declared(table[name], kind)
        if made[name] is None:
            raise UserError(f"column '{name}' {_advice(name, table[name].type(), kind)}")
        if not is_lossless(table[name].type(), kind):
            misfit, shown = _misfit(table[name], made[name], kind)
            cases.append((misfit, _shown(name, shown.cast("string").substr(0, _SHOWN))))
    for name, other in (same or {}).items():
        value = made.get(name, plain(table[name]))
        wanted = as_declared(table[other], value.type().copy(nullable=True))
        shown = _shown(name, table[name].cast("string").fill_null("null")) + _MARK + table[other].fill_null("null")
        cases.append((value.identical_to(wanted).negate(), shown))
    bad = ibis.cases(*cases, else_=ibis.null("string")) if cases else ibis.null("string")
    return table.select(**made, **{name: plain(table[name]) for name in rest}, **{BAD: bad})


def misfit(source: str, columns: Mapping[str, str], bad: str, *, text: bool = True) -> str:
    """What ``BAD`` says, as a sentence. ``text``: of a text file, where marks of missing values help."""
    name, shown, *path = bad.split(_MARK, 2)
    name = json.loads(f'"{name}"')
    if path:
        return f"column '{name}' holds {shown!r}, and the folder's name says {name}={path[0]}: rename one of them"
    kind = columns[name]
    missing = f", or name what stands for a missing value (sources.{source}.null_values=[{shown}])" if text else ""
    inner = kind.removeprefix("list<").removesuffix(">")
    return (
        f"column '{name}' holds {shown!r}, which is not {inner}: declare another type "
        f"(sources.{source}.columns.{name}={better_type(shown, kind)}){missing}"
    )


def better_type(text: str, kind: str) -> str:
    """A declared type that holds a text which ``kind`` does not, and says most of it."""
    inner = kind.removeprefix("list<").removesuffix(">")
    if inner != kind:
        other = better_type(text, inner)
        return f"list<{other if other in ('int64', 'float64') else 'string'}>"
    if holds(text, "int64"):
        return "int64"
    if re.match(_NUMBER, text):
        return "string" if re.match(_DIGITS, text) else "float64"
    return next((other for other in ("boolean", "date", "timestamp") if other != kind and holds(text, other)), "string")


def _shown(name: str, shown: ibis.Value) -> ibis.Value:
    """The beginning of ``BAD``."""
    return ibis.literal(json.dumps(name)[1:-1] + _MARK) + shown.replace(_MARK, " ")


def _misfit(value: ibis.Value, made: ibis.Value, kind: dt.DataType) -> tuple[ibis.Value, ibis.Value]:
    """Whether a value was not taken, and the text to show."""
    if not kind.is_array():
        return value.notnull() & _is_null(made), value
    bad = value.filter(lambda element: element.notnull() & _is_null(as_declared(element, kind.value_type)))
    return value.notnull() & (bad.length() > 0), bad[0]


def _is_null(value: ibis.Value) -> ibis.Value:
    """Null and not NaN, which Ibis takes for null too on Spark. (A comparison with NULL in its place loses what TRY_CAST did:
    DuckDB's optimizer takes the cast away.)"""
    null = value.isnull()
    return null & ~value.isnan().fill_null(False) if value.type().is_floating() else null


def _list(value: ibis.Value, kind: dt.DataType) -> ibis.Value | None:
    inner = value.type().value_type
    if inner.copy(nullable=True) == kind.value_type:
        return value
    if inner.is_array() or as_declared(ibis.null(inner), kind.value_type) is None:
        return None
    return value.map(lambda element: as_declared(element, kind.value_type))


def _from_text(value: ibis.Value, kind: dt.DataType) -> ibis.Value | None:
    if kind.is_string():
        return value
    text = value.strip()
    if kind.is_integer():
        return _whole_text(value, text, kind)
    if kind.is_floating():
        return _number_text(text, kind)
    if kind.is_boolean():
        low = text.lower()
        return ibis.cases((low.isin(_TRUE), True), (low.isin(_FALSE), False), else_=ibis.null("boolean"))
    if kind.is_date():
        return text.re_search(_DATE).ifelse(text.try_cast("date"), ibis.null("date"))
    return _moment_text(text)


def _whole_text(value: ibis.Value, text: ibis.Value, kind: dt.DataType) -> ibis.Value:
    # Most are written as they would be printed, and to see that is quicker than a pattern.
    known = value.try_cast(kind)
    digits = text.re_replace(r"\.0*$", "").try_cast(kind)
    scaled = text.re_search(_SCALED).ifelse(text, ibis.literal("0.5")).try_cast("float64")
    return ibis.cases(
        (known.cast("string") == value, known),
        (text.re_search(_DIGITS) | text.re_search(_WHOLE), digits),
        else_=_whole_number(scaled, kind),
    )


def _whole_number(value: ibis.Value, kind: dt.DataType) -> ibis.Value:
    """Of float64. Beyond 2^53 a float has lost the last digits of a whole number."""
    low, high = max(-_EXACT, float(kind.bounds.lower)), min(_EXACT, float(kind.bounds.upper))
    fits = (value >= exact(low)) & (value <= exact(high))
    safe = fits.ifelse(value, exact(0.5))
    whole = safe.floor().cast("int64")
    return (whole.cast("float64") == safe).ifelse(whole, ibis.null("int64")).cast(kind)


def _number_text(text: ibis.Value, kind: dt.DataType) -> ibis.Value:
    low = text.lower()
    number = text.re_search(_NUMBER).ifelse(text, ibis.null("string")).try_cast(kind)
    largest = exact(LARGEST if kind == dt.float64 else LARGEST_FLOAT32)
    return ibis.cases(
        (number.cast("float64").abs() <= largest, number),
        (low.isin(("nan", "+nan", "-nan")), ibis.literal("NaN").cast(kind)),
        (low.isin(("inf", "+inf", "infinity", "+infinity")), ibis.literal("Infinity").cast(kind)),
        (low.isin(("-inf", "-infinity")), ibis.literal("-Infinity").cast(kind)),
        else_=ibis.null(kind),
    )


def _moment_text(text: ibis.Value) -> ibis.Value:
    """Without its offset, which is then taken off: the engines read offsets each in a way of its own, or not at all."""
    moment = text.re_search(_MOMENT).ifelse(text, ibis.null("string"))
    has_offset = moment.re_search(r":[0-9]{2}(\.[0-9]+)? ?[+-][0-9]{2}(:?[0-9]{2})?$")
    bare = has_offset.ifelse(
        moment.re_replace(r" ?[+-][0-9]{2}(:?[0-9]{2})?$", ""), moment.re_replace(" ?(Z|UTC)$", "")
    )
    sign, hours, minutes = (moment.re_extract(_OFFSET, place) for place in (1, 2, 3))
    ahead = (sign == "-").ifelse(-1, 1) * (
        hours.try_cast("int64").fill_null(0) * 60 + minutes.try_cast("int64").fill_null(0)
    )
    local = bare.try_cast("timestamp(6)")
    return has_offset.ifelse(local - ahead.as_interval("m"), local)


def _from_integer(value: ibis.Value, kind: dt.DataType) -> ibis.Value | None:
    if kind.is_integer():
        return value.try_cast(kind)
    if kind.is_boolean():
        return value.isin((0, 1)).ifelse(value == 1, ibis.null("boolean"))
    return value.cast(kind) if kind.is_floating() or kind.is_string() else None


def _from_float(value: ibis.Value, kind: dt.DataType) -> ibis.Value | None:
    value = value.cast("float64")
    if kind.is_integer():
        return _whole_number(value, kind)
    if kind == dt.float32:
        finite = (value.abs() <= exact(LARGEST_FLOAT32)) | value.isnan() | value.isinf()
        return finite.ifelse(value, ibis.null("float64")).cast("float32")
    return value if kind.is_floating() else None


def _from_decimal(value: ibis.Value, kind: dt.DataType) -> ibis.Value | None:
    if kind.is_floating():
        return value.cast(kind)
    if kind.is_integer() or (kind.is_string() and value.type().scale == 0):
        return _from_text(value.cast("string"), kind)
    return None


def _from_boolean(value: ibis.Value, kind: dt.DataType) -> ibis.Value | None:
    return value.cast("string") if kind.is_string() else None


def _from_date(value: ibis.Value, kind: dt.DataType) -> ibis.Value | None:
    return value.cast(kind) if kind.is_string() or kind.is_timestamp() else None


def _from_timestamp(value: ibis.Value, kind: dt.DataType) -> ibis.Value | None:
    value = plain(value)
    if kind.is_date():
        day = value.cast("date")
        return (day.cast("timestamp(6)") == value).ifelse(day, ibis.null("date"))
    return value.cast(kind) if kind.is_string() or kind.is_timestamp() else None


_FROM = (
    (lambda kind: kind.is_null(), lambda value, kind: ibis.null(kind)),
    (lambda kind: kind.is_string(), _from_text),
    (lambda kind: kind.is_integer(), _from_integer),
    (lambda kind: kind.is_floating(), _from_float),
    (lambda kind: kind.is_decimal(), _from_decimal),
    (lambda kind: kind.is_boolean(), _from_boolean),
    (lambda kind: kind.is_date(), _from_date),
    (lambda kind: kind.is_timestamp(), _from_timestamp),
)


def _advice(name: str, found: dt.DataType, kind: dt.DataType) -> str:
    """For a column of a type that never fits; what it advises works on every engine."""
    if found.is_timestamp() and kind.is_numeric():
        return (
            f"is {found}, not {kind}: declare timestamp, and make seconds of it with a step "
            f"({{select: {{{name}: 'epoch({name})'}}}})"
        )
    if found.is_numeric() and (kind.is_timestamp() or kind.is_date()):
        return f"is {found}, not {kind}: declare int64; splits, clicks and histories take numbers as times"
    if found.is_boolean():
        return f"is {found}, not {kind}: declare boolean, which is 0 and 1 as a label or a number"
    if found.is_floating() and kind.is_string():
        return f"is {found}, which engines write differently as text: declare float64, or int64 for whole numbers"
    return f"is {found}, which cannot be read as {kind}: declare the type that it has"
