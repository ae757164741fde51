"""Histories: for each example the previous events of its user, from an event log.

1. Events and examples are laid in one line per user, by time, an example before the events of its own time. The number of
   events before an example there is where its history ends: events of the same time never count, nor does the row itself.
2. Ids of each user's events are cut into blocks of B ≥ k, and each block is kept with the block before it, so that any k
   successive events lie in one block. Their size is that of the log twice, whoever asks.
3. A history is a slice of one block. It is never stored: the table that ``build`` returns makes it where it is read, so
   that 20 million histories of 50 ids take 160 MB of blocks, and not 4 GB. A block is at most 2·B long, so a user with a
   hundred thousand events costs no more per example than one with a hundred.
"""

import functools
import operator
from collections.abc import Callable

import ibis

from data_loaders.prepare import columns, steps
from data_loaders.prepare.declaration import History
from data_loaders.prepare.engine import KEY, PART, ROW, Engine, file_name

_SMALLEST_BLOCK = 32
_CHUNKS = 4  # ids that one aggregate makes into lists (about 16 bytes each), over the engine's chunk of rows


def build(
    engine: Engine,
    examples: ibis.Table,
    events: ibis.Table,
    history: History,
    features: dict[str, tuple[str, int]],
    encode_value: Callable[[str, ibis.Table, str], ibis.Table],
) -> ibis.Table:
    """A lazy table: ``__row``, ``__part`` and a list<int32> for each feature, oldest first; the lists of a row are aligned.
    Examples without a history (no user, no time, no earlier event) have no row.

    ``features``: name -> (column of the events, longest history). ``encode_value``: (feature, events, column) -> the events
    with the ids of a column as an int32 column of the feature's name. Raises ``UserError`` for columns that are missing or
    of unlike types.
    """
    first = next(iter(features))
    where = f"schema.features.{first}.make.history"
    _check(examples, events, history, features, where)
    if history.where:
        events = steps.filter_rows(engine, events, history.where, f"{where}.where")
    block = max(_SMALLEST_BLOCK, *(length for _, length in features.values()))
    asked = _placeable(examples, history)
    stored = f"histories/{file_name(first)}"
    encoded = _events(events, asked, history, features, encode_value)
    placed = engine.store(_placed(encoded, asked, history), f"{stored}/line")
    ends = engine.store(_ends(placed, history, block), f"{stored}/ends")
    blocks = _stored_blocks(engine, placed, history, list(features), block, f"{stored}/blocks")
    return _slices(ends, blocks, history, {name: length for name, (_, length) in features.items()}, block)


def _check(
    examples: ibis.Table, events: ibis.Table, history: History, features: dict[str, tuple[str, int]], where: str
) -> None:
    keys = [*history.by, history.time]
    columns.check(events, keys, f"{where}, table '{history.events}'")
    columns.check(examples, keys, f"{where}, the examples")
    columns.check_same_types(examples, events, {name: name for name in keys}, history.events, where)
    for name, (column, _) in features.items():
        columns.check(events, [column], f"schema.features.{name}.make.history.value, table '{history.events}'")


def _users(history: History) -> list[str]:
    return [f"__by_{number}" for number in range(len(history.by))]


def _placeable(table: ibis.Table, history: History, **more: ibis.Value) -> ibis.Table:
    """The rows with a user and a time."""
    return columns.placed(table, dict(zip(_users(history), history.by)), history.time, **more)


def _events(
    events: ibis.Table,
    examples: ibis.Table,
    history: History,
    features: dict[str, tuple[str, int]],
    encode_value: Callable[[str, ibis.Table, str], ibis.Table],
) -> ibis.Table:
    """Those of users who have examples, with ids in place of raw values."""
    raw = {f"__value_{number}": column for number, (column, _) in enumerate(features.values())}
    rows = _placeable(events, history, **{key: events[column] for key, column in raw.items()})
    rows = rows.semi_join(examples.select(_users(history)).distinct(), _users(history))
    for feature, key in zip(features, raw):
        rows = encode_value(feature, rows, key)
    return rows.drop(*raw)


def _placed(events: ibis.Table, examples: ibis.Table, history: History) -> ibis.Table:
    """Both, with ``__seen``: how many events of the user come before an example; for an event, itself included."""
    ids = [name for name in events.columns if name not in examples.columns]
    events = events.mutate(__event=ibis.literal(1, "int8"))
    nothing = {name: ibis.null(events[name].type()) for name in ids}
    examples = examples.mutate(**nothing, __event=ibis.null("int8"))
    line = ibis.union(events, examples.select(events.columns))
    before = ibis.cumulative_window(
        group_by=_users(history), order_by=["__time", ibis.asc("__event", nulls_first=True), *KEY]
    )
    seen = line["__event"].count().over(before)
    return line.mutate(__seen=seen).drop("__time")


def _ends(placed: ibis.Table, history: History, block: int) -> ibis.Table:
    """For each example with a history its block and how many of the block's events, and of the one before, come before
    it. In the raw order, so that a range of rows is quickly found."""
    examples = placed.filter(placed["__event"].isnull(), placed["__seen"] > 0)
    number = ((examples["__seen"] - 1) // block).cast("int64")
    base = ibis.greatest((number - 1) * block, 0)
    ends = examples.select(*KEY, *_users(history), __block=number, __end=(examples["__seen"] - base).cast("int32"))
    return ends.order_by(list(KEY))


def _stored_blocks(
    engine: Engine, placed: ibis.Table, history: History, features: list[str], block: int, name: str
) -> ibis.Table:
    """Each user's ids by blocks, in portions of users: DuckDB cannot move the lists of an aggregate to disk."""
    events = placed.filter(placed["__event"].notnull())
    made = []
    for number, portion in enumerate(_portions(engine, events, history, len(features))):
        blocks = _with_previous(_blocks(portion, history, features, block), history, features)
        made.append(engine.store(blocks, f"{name}-{number}"))
    return ibis.union(*made) if len(made) > 1 else made[0]


def _portions(engine: Engine, events: ibis.Table, history: History, ids: int) -> list[ibis.Table]:
    """A power of two of them. Engines hash in ways of their own; nothing but the portion depends on it."""
    if engine.chunk_bytes is None:
        return [events]
    rows = engine.fetch(events.aggregate(rows=events.count())).to_pylist()[0]["rows"]
    count = 1 << (4 * rows * ids // (_CHUNKS * engine.chunk_bytes)).bit_length()
    digest = functools.reduce(operator.xor, (events[user].hash() for user in _users(history)))
    return [events.filter((digest & (count - 1)) == number) for number in range(count)] if count > 1 else [events]


def _blocks(events: ibis.Table, history: History, features: list[str], block: int) -> ibis.Table:
    """Lists of structs in the order of their first field: not every engine collects in an order."""
    place = (events["__seen"] - 1).cast("int64")
    fields = {f"id_{number}": events[name] for number, name in enumerate(features)}
    ids = ibis.struct({"place": (place % block).cast("int32"), **fields})
    events = events.select(*_users(history), __block=(place // block).cast("int64"), __ids=ids)
    lists = events.group_by([*_users(history), "__block"]).aggregate(__ids=events["__ids"].collect())
    in_order = lists.mutate(__ids=lists["__ids"].sort())
    made = {name: _field(in_order["__ids"], f"id_{number}") for number, name in enumerate(features)}
    return in_order.select(*_users(history), "__block", **made)


def _field(structs: ibis.Value, name: str) -> ibis.Value:
    return structs.map(lambda struct: struct[name])


def _with_previous(blocks: ibis.Table, history: History, features: list[str]) -> ibis.Table:
    """Each block behind the user's block before it."""
    before = ibis.window(group_by=_users(history), order_by="__block")
    empty = {name: ibis.literal([], type=blocks[name].type()) for name in features}
    return blocks.mutate(
        **{name: blocks[name].lag().over(before).fill_null(empty[name]).concat(blocks[name]) for name in features}
    )


def _slices(ends: ibis.Table, blocks: ibis.Table, history: History, lengths: dict[str, int], block: int) -> ibis.Table:
    names = {f"__of_{name}": name for name in (*_users(history), "__block")}
    blocks = blocks.rename(**names)
    joined = ends.inner_join(blocks, [ends[mine] == blocks[theirs] for theirs, mine in names.items()])
    end = joined["__end"]
    return joined.select(
        ROW, PART, **{name: joined[name][ibis.greatest(end - length, 0) : end] for name, length in lengths.items()}
    )
