"""Labels for impressions from a separate log of clicks.

In the order of time, impressions before clicks at equal times, a click counts for the impression before it. So an
impression has a click exactly if the next row of its keys is a click (the earliest that can count for it) and comes within
the window: one window function over both logs, and no join by ranges.
"""

import ibis

from data_loaders.errors import UserError
from data_loaders.prepare import columns
from data_loaders.prepare.declaration import Clicks
from data_loaders.prepare.engine import KEY, PART, ROW

_DAY = 86_400_000_000  # microseconds


def label(table: ibis.Table, clicks: ibis.Table, spec: Clicks, where: str) -> ibis.Table:
    """Adds the label: int8 1 where a click of ``clicks`` counts for the row, else 0. Rows and clicks without a key or a time
    never meet. Raises ``UserError`` for columns that are missing or do not fit each other."""
    time = spec.click_time or spec.time
    columns.check(table, [*spec.on, spec.time], where)
    columns.check(clicks, [*spec.on, time], f"{where}, table '{spec.table}'")
    pairs = {**{name: name for name in spec.on}, spec.time: time}
    columns.check_same_types(table, clicks, pairs, spec.table, where)
    if spec.within < 0:
        raise UserError(f"{where}.within is {spec.within}: it must not be negative")
    events = ibis.union(_events(table, spec.on, spec.time, 0), _events(clicks, spec.on, time, 1))
    following = ibis.window(group_by=list(_keys(spec.on)), order_by=["__time", "__kind", *KEY])
    events = events.mutate(
        __next_kind=events["__kind"].lead().over(following), __next_time=events["__time"].lead().over(following)
    )
    near = _within(events["__time"], events["__next_time"], spec.within, where)
    clicked = events.filter(events["__kind"] == 0, events["__next_kind"] == 1, near)
    clicked = clicked.select(__clicked_row=clicked[ROW], __clicked_part=clicked[PART])
    same = [table[ROW] == clicked["__clicked_row"], table[PART] == clicked["__clicked_part"]]
    joined = table.left_join(clicked, same)
    joined = joined.mutate(**{spec.label: joined["__clicked_row"].notnull().cast("int8")})
    return joined.select(*dict.fromkeys((*table.columns, spec.label)))


def _keys(on: list[str]) -> dict[str, str]:
    return {f"__on_{number}": name for number, name in enumerate(on)}


def _events(table: ibis.Table, on: list[str], time: str, kind: int) -> ibis.Table:
    events = columns.placed(table, _keys(on), time, __kind=ibis.literal(kind, "int8"))
    return events.select(*_keys(on), "__time", "__kind", *KEY)


def _within(time: ibis.Value, later: ibis.Value, limit: float, where: str) -> ibis.Value:
    kind = time.type()
    if kind.is_numeric():
        return later - time <= limit
    if kind.is_timestamp():
        return later <= time + ibis.interval(microseconds=round(limit * 1_000_000))
    if kind.is_date():
        return later.cast("timestamp") <= time.cast("timestamp") + ibis.interval(microseconds=round(limit * _DAY))
    raise UserError(f"{where}.time: the column is {kind}: give numbers, a date or a timestamp")
