"""Negative rows for positive ones: other items, drawn by a seed, that the user never touched.

A row draws a sequence of items that depends on the seed, its place and the number of the draw alone. Its negatives are the
first distinct ones of that sequence that its user did not touch. So a draw is never repeated for chance's sake: rounds with
longer and longer sequences only serve rows whose first draws were refused too often.
"""

import ibis

from data_loaders.errors import UserError
from data_loaders.prepare import columns, number_hash
from data_loaders.prepare.declaration import Negatives
from data_loaders.prepare.engine import KEY, PART, ROW, Engine, file_name
from data_loaders.schema import one_of

STRATEGIES = ("uniform", "popularity")
_ROUNDS = 7
_GROWTH = 4  # draws of a round, over those of the round before
_MULTIPLIERS = (65_537, 1_000_003)  # two sums of row and part: only the same place has both alike
_HALF = 2**31  # two hashes of 31 bits make one draw: a log may have more rows than 2^31


def add(engine: Engine, table: ibis.Table, touched: ibis.Table, spec: Negatives, where: str) -> ibis.Table:
    """The rows with label 1, each before its negatives with label 0 (int8). Raises ``UserError`` for columns that are
    missing or unlike, and for a user who touched so many items that ``count`` others are not to be found."""
    _check(table, touched, spec, where)
    name = "steps/" + file_name(where)
    pairs = engine.store(_pairs(touched, spec), f"{name}/touched")
    items = engine.store(_items(touched, spec), f"{name}/items")
    positives = engine.store(_positives(table, spec), f"{name}/positives")
    _check_enough(engine, items, pairs, positives, spec, where)
    chosen = _choose(engine, items, pairs, positives, spec, where, name)
    return _rows(table, chosen, touched, spec)


def _check(table: ibis.Table, touched: ibis.Table, spec: Negatives, where: str) -> None:
    one_of(spec.strategy, STRATEGIES, f"{where}.strategy")
    if not 1 <= spec.count < columns.MAX_CHILDREN:
        raise UserError(
            f"{where}.count is {spec.count}: give a number of negatives between 1 and {columns.MAX_CHILDREN - 1:,}"
        )
    used = [spec.user, spec.item, *spec.attributes]
    columns.check(table, used, where)
    columns.check(touched, used, f"{where}, table '{spec.touched}'")
    columns.check_same_types(table, touched, {name: name for name in used}, str(spec.touched), where)


def _pairs(touched: ibis.Table, spec: Negatives) -> ibis.Table:
    """Which user touched which item, once."""
    pairs = touched.select(__user=columns.comparable(touched[spec.user]), __item=columns.comparable(touched[spec.item]))
    return pairs.filter(pairs["__user"].notnull(), pairs["__item"].notnull()).distinct()


def _items(touched: ibis.Table, spec: Negatives) -> ibis.Table:
    """The places of a lottery, from 0, and their items. By popularity each touched row is a place, in the order of items:
    the order within an item does not matter. Uniformly each item is one."""
    rows = touched.select(__item=columns.comparable(touched[spec.item]), **columns.key(touched))
    rows = rows.filter(rows["__item"].notnull())
    counts = rows.group_by("__item").aggregate(__rows=rows.count())
    if spec.strategy == "uniform":
        return counts.select("__item", __place=ibis.row_number().over(order_by="__item").cast("int64"))
    in_order = ibis.cumulative_window(order_by="__item")
    ends = counts.select(__of="__item", __start=counts["__rows"].sum().over(in_order).cast("int64") - counts["__rows"])
    rows = rows.mutate(__place=ibis.row_number().over(group_by="__item", order_by=list(KEY)).cast("int64"))
    placed = rows.inner_join(ends, rows["__item"] == ends["__of"])
    return placed.select("__item", __place=placed["__start"] + placed["__place"])


def _positives(table: ibis.Table, spec: Negatives) -> ibis.Table:
    """Hashes of a row's place are stored with it: a hash of a hash in one expression is hundreds of terms long."""
    return table.select(
        **columns.key(table),
        __user=columns.comparable(table[spec.user]),
        __own=columns.comparable(table[spec.item]),
        __high=_hash(table, 2 * spec.seed, _MULTIPLIERS[0]),
        __low=_hash(table, 2 * spec.seed + 1, _MULTIPLIERS[1]),
    )


def _hash(table: ibis.Table, seed: int, multiplier: int) -> ibis.Value:
    return number_hash.of_number(table[ROW] + table[PART] % _HALF * multiplier, seed)


def _rows_of(engine: Engine, table: ibis.Table) -> int:
    return engine.fetch(table.aggregate(rows=table.count())).to_pylist()[0]["rows"]


def _distinct(engine: Engine, items: ibis.Table) -> int:
    return engine.fetch(items.aggregate(items=items["__item"].nunique())).to_pylist()[0]["items"]


def _check_enough(
    engine: Engine, items: ibis.Table, pairs: ibis.Table, positives: ibis.Table, spec: Negatives, where: str
) -> None:
    total = _distinct(engine, items)
    if total <= spec.count:
        raise UserError(f"{where}: {spec.count} negatives from {total} item(s) are not possible: lower count")
    counts = pairs.group_by("__user").aggregate(__touched=pairs.count())
    greedy = counts.filter(counts["__touched"] > total - spec.count)
    greedy = greedy.semi_join(positives, "__user").order_by(ibis.desc("__touched"), "__user").limit(1)
    for row in engine.fetch(greedy).to_pylist():
        raise _too_few(spec, where, row["__user"], row["__touched"], total)


def _too_few(spec: Negatives, where: str, user: object, touched: int, total: int) -> UserError:
    return UserError(
        f"{where}: {spec.user}={user!r} touched {touched:,} of {total:,} items, which leaves too few to draw {spec.count} "
        "negatives from: lower count, or leave such users out with a where step before"
    )


def _choose(
    engine: Engine,
    items: ibis.Table,
    pairs: ibis.Table,
    positives: ibis.Table,
    spec: Negatives,
    where: str,
    name: str,
) -> ibis.Table:
    """``count`` items for each positive, ``__number`` 1 … count. Stored round by round."""
    places, short = _rows_of(engine, items), _rows_of(engine, positives)
    left, draws, done = positives, spec.count + max(2, spec.count // 2), []
    for number in range(_ROUNDS):
        made = engine.store(_round(left, items, pairs, spec, draws, places), f"{name}/round-{number}")
        done.append(made)
        short -= _rows_of(engine, made) // spec.count
        if not short:
            return ibis.union(*done) if len(done) > 1 else made
        left = engine.store(left.anti_join(made, list(KEY)), f"{name}/left-{number}")
        draws *= _GROWTH
    counts = pairs.group_by("__user").aggregate(__touched=pairs.count())
    worst = left.left_join(counts, "__user").order_by(ibis.desc("__touched", nulls_first=False), "__user").limit(1)
    row = engine.fetch(worst.select("__user", "__touched")).to_pylist()[0]
    raise _too_few(spec, where, row["__user"], row["__touched"] or 0, _distinct(engine, items))


def _round(
    positives: ibis.Table, items: ibis.Table, pairs: ibis.Table, spec: Negatives, draws: int, places: int
) -> ibis.Table:
    """The negatives of the rows for which ``draws`` draws give enough of them."""
    drawn = positives.mutate(__draw=ibis.range(ibis.literal(0, "int64"), ibis.literal(draws, "int64")).unnest())
    drawn = drawn.mutate(__place=_place(drawn, spec.seed, places))
    found = drawn.inner_join(items, "__place")
    found = found.filter(found["__own"].isnull() | (found["__item"] != found["__own"]))
    found = found.anti_join(pairs, ["__user", "__item"])
    distinct = found.group_by([*KEY, "__item"]).aggregate(__draw=found["__draw"].min())
    ranked = distinct.mutate(
        __number=ibis.row_number().over(group_by=list(KEY), order_by="__draw").cast("int64") + 1,
        __found=ibis._.count().over(group_by=list(KEY)),
    )
    enough = ranked.filter(ranked["__found"] >= spec.count, ranked["__number"] <= spec.count)
    return enough.select(*KEY, "__number", "__item")


def _place(drawn: ibis.Table, seed: int, places: int) -> ibis.Value:
    high = number_hash.of_number(drawn["__high"] + drawn["__draw"], 2 * seed)
    low = number_hash.of_number(drawn["__low"] + drawn["__draw"], 2 * seed + 1)
    return (high * _HALF + low) % places


def _rows(table: ibis.Table, chosen: ibis.Table, touched: ibis.Table, spec: Negatives) -> ibis.Table:
    """Positives and negatives in one table."""
    order = list(dict.fromkeys((*table.columns, spec.label)))
    positives = table.mutate(**{spec.label: ibis.literal(1, "int8"), PART: table[PART] * columns.MAX_CHILDREN})
    chosen = chosen.select(__of_row=chosen[ROW], __of_part=chosen[PART], __number="__number", __item="__item")
    same = [table[ROW] == chosen["__of_row"], table[PART] == chosen["__of_part"]]
    rows = table.inner_join(chosen, same)
    values = {spec.item: rows["__item"].cast(table[spec.item].type())}
    if spec.attributes:
        first = _first_rows(touched, spec)
        rows = rows.left_join(first, rows["__item"] == first["__first_item"])
        values |= {name: rows[f"__of_{name}"].cast(table[name].type()) for name in spec.attributes}
    values |= {
        spec.item: rows["__item"].cast(table[spec.item].type()),
        spec.label: ibis.literal(0, "int8"),
        PART: rows[PART] * columns.MAX_CHILDREN + rows["__number"],
    }
    return ibis.union(positives.select(order), rows.mutate(**values).select(order))


def _first_rows(touched: ibis.Table, spec: Negatives) -> ibis.Table:
    """Each item's attributes, those of its first row."""
    attributes = {f"__of_{name}": touched[name] for name in spec.attributes}
    rows = touched.select(__first_item=columns.comparable(touched[spec.item]), **attributes, **columns.key(touched))
    rows = rows.mutate(__first=ibis.row_number().over(group_by="__first_item", order_by=list(KEY)))
    return rows.filter(rows["__first"] == 0).drop("__first", *KEY)
