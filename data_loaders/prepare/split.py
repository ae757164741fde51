"""Which example is train, valid or test.

Every rule depends on the row's own columns (and, for the last rows of a user, on the user's other rows) alone, never on
chance or on the engine.
"""

from datetime import date, datetime, timezone
from fractions import Fraction
from typing import Any

import ibis

from data_loaders.errors import UserError
from data_loaders.prepare import columns, number_hash
from data_loaders.prepare.declaration import SPLITS, HashSplit, LastSplit, Split, TimeSplit
from data_loaders.prepare.engine import KEY, SPLIT

_DIGITS = 13  # hexadecimal digits of a hash that are compared with a share: 52 bits, as many as the share has
_SAMPLING_SEED = 8191
_UNIT, _NOTHING = "\x1f", "\x1e"  # between the values that are hashed together; for a null


def assign(table: ibis.Table, split: Split) -> ibis.Table:
    """Adds ``__split``: train, valid or test; what belongs to none of them is left out. Raises ``UserError`` for a column
    that is missing, or of a type that the rule cannot work with."""
    if split.time:
        return _known(table.mutate(**{SPLIT: _by_time(table, split.time)}))
    if split.hash:
        return table.mutate(**{SPLIT: _by_hash(table, split.hash)})
    if split.last:
        return _by_last(table, split.last)
    if split.column:
        return _known(table.mutate(**{SPLIT: _by_column(table, split.column)}))
    return table.mutate(**{SPLIT: ibis.literal("train")})


def sample_negatives(table: ibis.Table, label: str, rate: float) -> ibis.Table:
    """Of train, the rows whose ``label`` is 0 with probability ``rate``, all others always; of valid and test all."""
    negative = (table[SPLIT] == "train") & (table[label].cast("float64") == 0).fill_null(False)
    # One round of arithmetic: more of it is an expression that Spark takes minutes to plan.
    drawn = number_hash.share(table[KEY[0]] + table[KEY[1]], _SAMPLING_SEED) < number_hash.bound(rate)
    return table.filter(~negative | drawn)


def _known(table: ibis.Table) -> ibis.Table:
    return table.filter(table[SPLIT].notnull())


def _by_time(table: ibis.Table, split: TimeSplit) -> ibis.Value:
    """A row without a time is left out: it may come from after the test rows."""
    time = _column(table, split.column, "split.time.column")
    found = ibis.literal("train")
    bounds = {name: _bound(time, getattr(split, name), f"split.time.{name}") for name in ("valid", "test")}
    if None not in bounds.values() and bounds["valid"] > bounds["test"]:
        raise UserError(f"split.time: valid ({split.valid}) begins after test ({split.test}): exchange them")
    for name, bound in bounds.items():
        if bound is not None:
            found = ibis.ifelse(time >= bound, ibis.literal(name), found)
    return ibis.ifelse(columns.known(time), found, ibis.null("string"))


def _bound(time: ibis.Value, value: Any, where: str) -> Any:
    """The declared bound as the column's type has it. A timestamp without a zone is UTC."""
    if value is None:
        return None
    kind = time.type()
    if kind.is_numeric():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{where} is {value!r}: the column holds numbers ({kind}), so give a number")
        return value
    if not (kind.is_date() or kind.is_timestamp()):
        raise UserError(
            f"{where}: the column is {kind}: a bound needs numbers, a date or a timestamp; make one with a select step"
        )
    try:
        text = value.isoformat() if isinstance(value, date) else str(value)
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise UserError(f"{where} is {value!r}: give an ISO date, such as 2014-10-28 or 2014-10-28T12:00:00") from None
    if kind.is_date():
        return moment.date()
    zone = moment.tzinfo or timezone.utc
    moment = moment.replace(tzinfo=zone).astimezone(timezone.utc)
    return moment if kind.timezone else moment.replace(tzinfo=None)


def _by_hash(table: ibis.Table, split: HashSplit) -> ibis.Value:
    values = [_column(table, name, "split.hash.by") for name in split.by]
    if len(values) == 1 and values[0].type().is_signed_integer():
        number = number_hash.share(values[0].cast("int64").fill_null(-1), split.seed)
        # The second question is put to the few held-out rows only: engines hash anew for each.
        held_out = ibis.ifelse(number < number_hash.bound(split.test), "test", "valid")
        return ibis.ifelse(number >= number_hash.bound(split.test + split.valid), "train", held_out)
    parts = [_text(value, name) for value, name in zip(values, split.by)]
    text = ibis.literal(f"{split.seed}{_UNIT}") + ibis.literal(_UNIT).join(parts)
    digits = text.hexdigest("md5")[:_DIGITS]
    held_out = ibis.ifelse(digits < _threshold(split.test), "test", "valid")
    return ibis.ifelse(digits >= _threshold(split.test + split.valid), "train", held_out)


def _text(value: ibis.Value, name: str) -> ibis.Value:
    """The same text on every engine. Raises ``UserError`` for types that engines write differently."""
    kind = value.type()
    if not (kind.is_integer() or kind.is_string() or kind.is_boolean() or kind.is_date()):
        raise UserError(
            f"split.hash.by: column '{name}' is {kind}: hash integers, strings, booleans or dates; make one with a select step"
        )
    return value.cast("string").fill_null(_NOTHING)


def _threshold(share: float) -> str:
    return f"{min(int(share * 16**_DIGITS), 16**_DIGITS):0{_DIGITS}x}"


def _by_last(table: ibis.Table, split: LastSplit) -> ibis.Table:
    """Positions from the end of each user's rows, 0 the last. Rows without a user are train."""
    by = [_column(table, name, "split.last.by") for name in split.by]
    order = [_column(table, name, "split.last.order") for name in split.order]
    backwards = [ibis.desc(value, nulls_first=False) for value in (*order, *(table[name] for name in KEY))]
    positioned = table.mutate(
        __place=ibis.row_number().over(group_by=by, order_by=backwards),
        __rows=ibis._.count().over(group_by=by),
    )
    test = _count(positioned["__rows"], split.test, "split.last.test")
    valid = _count(positioned["__rows"], split.valid, "split.last.valid")
    place = positioned["__place"]
    found = ibis.cases((place < test, "test"), (place < test + valid, "valid"), else_="train")
    nobody = ibis.or_(*(positioned[name].isnull() for name in split.by))
    return positioned.mutate(**{SPLIT: ibis.ifelse(nobody, ibis.literal("train"), found)}).drop("__place", "__rows")


def _count(rows: ibis.Value, wanted: float, where: str) -> ibis.Value:
    """A number of rows: ``wanted`` itself, or that share of ``rows``, rounded down in whole numbers (0.29 · 100 is 29)."""
    if wanted == int(wanted):
        return ibis.literal(int(wanted), "int64")
    if not 0 < wanted < 1:
        raise UserError(f"{where} is {wanted}: give a whole number of rows, or a share below 1")
    share = Fraction(str(wanted)).limit_denominator(1_000_000)
    return (rows * share.numerator // share.denominator).cast("int64")


def _by_column(table: ibis.Table, name: str) -> ibis.Value:
    value = _column(table, name, "split.column")
    if not value.type().is_string():
        raise UserError(f"split.column: column '{name}' is {value.type()}: it must hold train, valid or test")
    return ibis.ifelse(value.isin(SPLITS), value, ibis.null("string"))


def _column(table: ibis.Table, name: str, where: str) -> ibis.Value:
    columns.check(table, [name], where)
    return table[name]
