"""Raw values and the table rows they get: most frequent first, and for ever.

A vocabulary is a table (value, id int32, count int64, unseen int32). Ids begin at ``FIRST_ID``; below are the missing
value and the unknown one. A later day adds its counts and appends what has become frequent; no id ever moves, and
``unseen`` says for how many days in a row a value has not been seen. Only a day with ``evict`` forgets values
unseen for so long: the others then move together, in the order they had, and a model follows them through the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import ibis

from data_loaders.errors import UserError
from data_loaders.prepare import raw_values
from data_loaders.prepare.declaration import FIRST_ID, PreparedSchema, Vocabulary
from data_loaders.prepare.engine import Engine
from data_loaders.prepare.statistics import Statistics

Previous = tuple[ibis.Table, ibis.Table | None]  # an earlier day's vocabulary, and its rare values


@dataclass
class Built:
    """``rare``: (value, count) of the values without an id, None if they are not kept. ``report``: values, added (today),
    kept (of before, seen today), aged (of before, not seen today), rare (values without an id), rows_counted, missing, and
    evicted (of before) where that was asked for."""

    table: ibis.Table
    rare: ibis.Table | None
    report: dict[str, Any]


def build(
    engine: Engine,
    table: str,
    schema: PreparedSchema,
    train: ibis.Table,
    previous: Previous | None = None,
    statistics: Statistics | None = None,
    evict: int | None = None,
) -> Built:
    """The vocabulary of one of the schema's tables, from the rows of ``train``; ``previous`` is extended, without the
    values that have not been seen for ``evict`` days, today included. ``statistics``: what number transforms of its
    features learnt. Raises ``UserError`` for features whose values do not go together, and
    for an earlier vocabulary that is damaged or of another type."""
    spec = schema.tables[table].vocabulary or Vocabulary()
    counts = engine.store(_counts(table, schema, train, statistics or Statistics()), f"counts/{table}")
    today = counts.filter(counts.value.notnull())
    old, rare = _previous(engine, table, today, previous)
    before = old.size
    if evict is not None and old.table is not None:
        old = _surviving(engine, table, today, old.table, evict)
    ranked = engine.store(_ranked(today, old, rare), f"ranked/{table}")
    room = None if spec.max_size is None else max(spec.max_size - old.size, 0)
    wins = ranked["count"] >= spec.min_count
    if room is not None:
        wins &= ranked["rank"] < room
    added = ranked.filter(wins).mutate(id=(ranked["rank"] + old.size + FIRST_ID).cast("int32"))
    whole = engine.store(_extended(added, today, old), f"vocabulary/{table}")
    left = ranked.filter(~wins).select("value", "count")
    report = _report(engine, counts, whole, left, old)
    if evict is not None:
        report["evicted"] = before - old.size
    return Built(whole, left if spec.keep_rare else None, report)


def family(examples: ibis.Table, table: str, schema: PreparedSchema, learnt: raw_values.Learnt) -> Any:
    """int64 or string: the type of a table's raw values. Raises ``UserError`` where its features differ."""
    found: dict[str, Any] = {}
    for name in schema.members(table):
        if schema.features[name].make.history:
            continue  # its values are another table's
        kind = raw_values.identifier(examples, schema, name, learnt).type()
        found[name] = kind.value_type if kind.is_array() else kind
    for name, kind in found.items():
        first = next(iter(found))
        if kind != found[first]:
            raise UserError(
                f"schema.tables.{table}: the values of '{first}' are {found[first]}, those of '{name}' {kind}: a "
                "vocabulary holds one kind; cast one of them with a step (select), or give it a table of its own"
            )
    return next(iter(found.values()), None)


@dataclass
class _Old:
    """An earlier vocabulary; None for the first day."""

    table: ibis.Table | None
    size: int


def _counts(table: str, schema: PreparedSchema, train: ibis.Table, statistics: Statistics) -> ibis.Table:
    """(value, count) of train, the missing value among them."""
    family(train, table, schema, statistics.steps)
    parts = []
    for name in schema.counted(table):
        if schema.features[name].make.history:
            raise UserError(
                f"schema.features.{name}: a history's values are not counted, since its events are not train's alone: let it "
                f"share table '{table}' with a sparse feature, or give the table num_embeddings and the feature ids: hash"
            )
        value = raw_values.identifier(train, schema, name, statistics.steps)
        parts.append(train.select(value=value.unnest() if value.type().is_array() else value))
    if not parts:
        raise UserError(f"schema.tables.{table}: no feature is counted for its vocabulary; let one have counted: true")
    values = parts[0] if len(parts) == 1 else ibis.union(*parts)
    return values.group_by("value").aggregate(count=values.count())


def _previous(
    engine: Engine, table: str, today: ibis.Table, previous: Previous | None
) -> tuple[_Old, ibis.Table | None]:
    if previous is None:
        return _Old(None, 0), None
    old, rare = previous
    if old.value.type().copy(nullable=True) != today.value.type().copy(nullable=True):
        raise UserError(
            f"schema.tables.{table}: raw values are {today.value.type()}, those of the earlier vocabulary "
            f"{old.value.type()}: declare the type of the earlier day, or prepare without extend="
        )
    (found,) = engine.fetch(
        old.aggregate(rows=old.count(), ids=old.id.nunique(), low=old.id.min(), high=old.id.max())
    ).to_pylist()
    rows = found["rows"]
    if rows and (found["ids"], found["low"], found["high"]) != (rows, FIRST_ID, FIRST_ID + rows - 1):
        raise UserError(
            f"the earlier vocabulary of '{table}' is damaged: its {rows:,} ids should be {FIRST_ID} … "
            f"{FIRST_ID + rows - 1}, each once"
        )
    return _Old(old, rows), rare


def _surviving(engine: Engine, table: str, today: ibis.Table, old: ibis.Table, evict: int) -> _Old:
    seen = today.select(value_today="value")
    joined = old.left_join(seen, old.value == seen.value_today)
    found = joined.filter(joined.value_today.notnull() | (joined.unseen + 1 < evict)).select(*old.columns)
    place = ibis.row_number().over(order_by=found.id.asc())
    kept = engine.store(found.mutate(id=(place + FIRST_ID).cast("int32")), f"surviving/{table}")
    (rows,) = engine.fetch(kept.aggregate(rows=kept.count())).to_pylist()
    return _Old(kept, rows["rows"])


def _ranked(today: ibis.Table, old: _Old, rare: ibis.Table | None) -> ibis.Table:
    """(value, count, seen, rank) of the values that have no id yet, the most frequent with rank 0."""
    fresh = today if old.table is None else today.anti_join(old.table, "value")
    fresh = fresh.select("value", "count", seen=ibis.literal(1, "int32"))
    if rare is not None:
        both = ibis.union(
            fresh.select("value", "seen", today="count", before=ibis.literal(0, "int64")),
            rare.select("value", seen=ibis.literal(0, "int32"), today=ibis.literal(0, "int64"), before="count"),
        )
        # Each is there once at most. A sum would be DuckDB's 128-bit integer, which it stores as a float.
        count = both.today.max() + both.before.max()
        fresh = both.group_by("value").aggregate(count=count, seen=both.seen.max())
    order = [fresh["count"].desc(), fresh.value.asc()]
    return fresh.mutate(rank=ibis.row_number().over(order_by=order).cast("int64"))


def _extended(added: ibis.Table, today: ibis.Table, old: _Old) -> ibis.Table:
    fresh = added.select("value", "id", "count", unseen=(1 - added.seen).cast("int32"))
    if old.table is None:
        return fresh
    counted = today.select(value_today="value", count_today="count")
    joined = old.table.left_join(counted, old.table.value == counted.value_today)
    seen = joined.count_today.notnull()
    kept = joined.select(
        "value",
        "id",
        count=joined["count"] + ibis.coalesce(joined.count_today, 0),
        unseen=seen.ifelse(0, joined.unseen + 1).cast("int32"),
    )
    return ibis.union(kept, fresh)


def _report(engine: Engine, counts: ibis.Table, whole: ibis.Table, left: ibis.Table, old: _Old) -> dict[str, Any]:
    missing = counts.value.isnull()
    tallies = counts.aggregate(
        rows_counted=missing.ifelse(0, counts["count"]).sum(), missing=missing.ifelse(counts["count"], 0).sum()
    )
    (rows,) = engine.fetch(tallies).to_pylist()
    of_before = whole.id < FIRST_ID + old.size
    ages = whole.aggregate(
        values=whole.count(),
        kept=(of_before & (whole.unseen == 0)).sum(),
        aged=(of_before & (whole.unseen > 0)).sum(),
    )
    (found,) = engine.fetch(ages).to_pylist()
    (rare,) = engine.fetch(left.aggregate(rare=left.count())).to_pylist()
    found = {key: int(value or 0) for key, value in (found | rare | rows).items()}
    added = found["values"] - old.size
    return {"values": found["values"], "added": added, **{key: found[key] for key in list(found)[1:]}}
