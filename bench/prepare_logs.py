"""Raw logs of any size for ``bench.prepare``, written by DuckDB: a row is a function of its place alone.

Both are text as users download it: Criteo's tab-separated file without a header, and a log of events as CSV.
"""

import math
from pathlib import Path

import duckdb

LABEL = "label"
NUMBERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
# What a reader needs to know of each column, in DuckDB's types.
CRITEO_COLUMNS = {LABEL: "TINYINT", **dict.fromkeys(NUMBERS, "INTEGER"), **dict.fromkeys(CATEGORIES, "VARCHAR")}
EVENT_COLUMNS = {"user": "BIGINT", "item": "BIGINT", "category": "INTEGER", "time": "BIGINT", "clicked": "TINYINT"}

# The Criteo display advertising log of Kaggle: distinct values, shares of missing values, clicks, about the medians.
CARDINALITIES = (
    *(1460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5683, 8_351_593, 3194),
    *(27, 14_992, 5_461_306, 10, 5652, 2173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
MEDIANS = (2, 4, 8, 5, 1500, 30, 8, 9, 50, 1, 2, 1, 6)
MISSING_NUMBERS = (0.45, 0, 0.21, 0.22, 0.026, 0.22, 0.04, 0.0005, 0.04, 0.45, 0.04, 0.77, 0.22)
MISSING_CATEGORIES = {
    **{"C3": 0.034, "C4": 0.034, "C6": 0.12, "C12": 0.034, "C16": 0.034, "C19": 0.44, "C20": 0.44, "C21": 0.034},
    **{"C22": 0.76, "C24": 0.034, "C25": 0.44, "C26": 0.44},
}
CLICK_SHARE = 0.256
STREAMS = 64  # independent random numbers of a row

# The log of events.
USERS, ITEMS, ITEM_CATEGORIES = 1_000_000, 500_000, 1000
USER_POWER = 3  # the k-th most active user has a share like k^-(1 - 1/3): the first one 1 % of all events
START, MINUTES = 1_700_000_000, 30 * 24 * 60


def write_criteo(path: Path, rows: int) -> None:
    """Label, 13 numbers with a long tail, 26 hexadecimal strings (one fewer than the log
    of Kaggle has) of which the k-th most frequent has a share of about 1/k."""
    columns = [f"({_uniform(0)} < {CLICK_SHARE})::INT::VARCHAR"]
    columns += [_number(index) for index in range(len(NUMBERS))]
    columns += [_category(index) for index in range(len(CATEGORIES))]
    _write(columns, tuple(CRITEO_COLUMNS), rows, path, "DELIMITER '\t', HEADER false")


def write_events(path: Path, rows: int, users: int = USERS, items: int = ITEMS) -> None:
    """User, item, its category, time and whether the item was clicked, in no order. Times are whole minutes of 30 days, in
    seconds, so that events of a user often have the same."""
    user = f"floor({users} * pow({_uniform(0)}, {USER_POWER}))::BIGINT * 2654435761 % {users}"
    item = f"(floor(exp({_uniform(1)} * {math.log(items)!r}))::BIGINT - 1) * 2654435761 % {items}"
    time = f"{START} + 60 * floor({MINUTES} * {_uniform(2)})::BIGINT"
    columns = [user, item, f"({item}) % {ITEM_CATEGORIES}", time, f"({_uniform(3)} < 0.1)::INT"]
    _write(columns, tuple(EVENT_COLUMNS), rows, path, "HEADER true")


def _uniform(stream: int) -> str:
    """A number in [0, 1), of the row's place ``i`` and the stream."""
    return f"((hash(i * {STREAMS} + {stream}) >> 11)::DOUBLE * {2.0**-53!r})"


def _number(index: int) -> str:
    uniform = _uniform(index + 1)
    if NUMBERS[index] == "I2":  # the only one with negative values
        value = f"(floor(exp(5.5 * {uniform})) - 2)::BIGINT"
    else:
        tail = f"1.6 * (2.0 * {uniform} + {uniform} * {uniform} - 1.3)"
        value = f"floor(exp(ln({MEDIANS[index]}.0) + {tail}))::BIGINT"
    return _with_nulls(value, f"i * {STREAMS} + {index + 40}", MISSING_NUMBERS[index])


def _category(index: int) -> str:
    number = index + 1
    rank = f"floor(exp({_uniform(number + 13)} * {math.log(CARDINALITIES[index])}))::BIGINT"
    value = f"lower(printf('%08x', (hash({rank} * 32 + {number}) >> 32)::BIGINT))"
    place = f"i * {STREAMS} + {number + 13 + 3_000_000_000_000}"
    return _with_nulls(value, place, MISSING_CATEGORIES.get(CATEGORIES[index], 0))


def _with_nulls(value: str, place: str, share: float) -> str:
    return f"CASE WHEN hash({place}) % 10000 < {int(share * 1e4)} THEN NULL ELSE {value} END"


def _write(columns: list[str], names: tuple[str, ...], rows: int, path: Path, options: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = ", ".join(f'{column} AS "{name}"' for name, column in zip(names, columns))
    with duckdb.connect(config={"memory_limit": "4GB", "threads": 2}) as connection:
        connection.execute(f"COPY (SELECT {chosen} FROM range({rows}) t(i)) TO '{path}' (FORMAT csv, {options})")
