"""An example to start from: the raw log of a hotel search, a folder a day, with text, histories and drift.

``clicktrainer prepare example=DIR`` writes it. In a session a user searches for a city, looks at some of the hotels that are
listed, and clicks on one. What a user likes in a hotel stays; hotels change from day to day, and some are replaced by new ones.

Letters: S sessions of a day, H hotels of a city, L places of a list, D dimensions of taste.
"""

from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_loaders.errors import UserError

FIRST_DAY, DAYS, SESSIONS = date(2026, 11, 1), 4, 3000
USERS, HOTELS_PER_CITY, LIST, TASTES, MOST_LOOKS = 4000, 150, 25, 4, 4
KEPT, RENEWED = 0.95, 0.03  # of a hotel's properties overnight; share of the hotels that are replaced
# What a place further down, the log of the price, and having been looked at change in the logit of a click.
PLACE, PRICE, LOOKED = 0.05, 0.8, 1.5
CITIES = np.array(["Paris", "Lyon", "Berlin", "Dortmund", "Rome", "Milan", "Madrid", "Lisbon", "Vienna", "Athens"])
PLATFORMS = np.array(["FR", "DE", "IT", "ES", "PT", "UK", "PL", "BR", "US", "JP"])
DEVICES = np.array(["mobile", "desktop", "tablet"])


@dataclass
class Hotels:
    """Of each city: ids, properties, appeal and log price, [cities, H] and [cities, H, D]."""

    ids: np.ndarray
    properties: np.ndarray
    appeal: np.ndarray
    price: np.ndarray

    @staticmethod
    def draw(generator: np.random.Generator) -> "Hotels":
        shape = (len(CITIES), HOTELS_PER_CITY)
        ids = generator.permutation(np.arange(100_000, 100_000 + len(CITIES) * HOTELS_PER_CITY)).reshape(shape)
        properties = generator.standard_normal((*shape, TASTES))
        return Hotels(ids, properties, generator.standard_normal(shape), generator.normal(4.5, 0.5, shape))

    def overnight(self, generator: np.random.Generator) -> None:
        noise = generator.standard_normal(self.properties.shape)
        self.properties = KEPT * self.properties + np.sqrt(1 - KEPT**2) * noise
        gone = generator.random(self.ids.shape) < RENEWED
        self.ids[gone] = self.ids.max() + 1 + np.arange(gone.sum())
        self.properties[gone] = generator.standard_normal((gone.sum(), TASTES))


def write(folder: Path, sessions: int = SESSIONS, days: int = DAYS, seed: int = 1) -> list[Path]:
    """``days`` folders of ``sessions`` sessions each, in ``folder``, which must be new or empty."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"example={folder}: the folder exists and is not empty: name another one")
    generator = np.random.default_rng(seed)
    hotels = Hotels.draw(generator)
    tastes = generator.standard_normal((USERS, TASTES))  # [users, D]
    paths = []
    for number in range(days):
        day = FIRST_DAY + timedelta(days=number)
        paths.append(folder / day.isoformat())
        paths[-1].mkdir(parents=True)
        pq.write_table(
            _day(generator, day, hotels, tastes, sessions), paths[-1] / "events.parquet", write_page_checksum=True
        )
        hotels.overnight(generator)
    return paths


def _day(generator: np.random.Generator, day: date, hotels: Hotels, tastes: np.ndarray, sessions: int) -> pa.Table:
    users = generator.integers(USERS, size=sessions)
    cities = generator.integers(len(CITIES), size=sessions) * generator.integers(
        2, size=sessions
    )  # half of them: Paris
    shown = _top(generator, hotels.appeal[cities], LIST)  # [S, L]
    rows = (cities[:, None], shown)
    liking = np.einsum("sd,sld->sl", tastes[users], hotels.properties[rows]) + hotels.appeal[rows] / 2
    liking -= PRICE * (hotels.price[rows] - hotels.price.mean()) + PLACE * np.arange(LIST)  # [S, L]
    looked = _top(generator, liking, MOST_LOOKS)  # [S, MOST_LOOKS]
    looks = generator.integers(MOST_LOOKS + 1, size=sessions)
    for place in range(MOST_LOOKS):
        liking[np.arange(sessions), looked[:, place]] += LOOKED * (place < looks)
    clicked = _top(generator, liking, 1)[:, 0]
    prices = np.exp(hotels.price[rows]).round().astype(np.int64)
    return _events(generator, day, users, cities, hotels.ids[rows], prices, looked, looks, clicked)


def _top(generator: np.random.Generator, logits: np.ndarray, count: int) -> np.ndarray:
    """``count`` different places of each row, drawn one after the other by softmax (Gumbel's trick), [S, count]."""
    return np.argsort(-(logits + generator.gumbel(size=logits.shape)), axis=1)[:, :count]


def _events(
    generator: np.random.Generator,
    day: date,
    users: np.ndarray,
    cities: np.ndarray,
    ids: np.ndarray,
    prices: np.ndarray,
    looked: np.ndarray,
    looks: np.ndarray,
    clicked: np.ndarray,
) -> pa.Table:
    """A session's rows: the search, ``looks`` looks, the click with the list that was shown."""
    counts = looks + 2
    session = np.repeat(np.arange(len(users)), counts)
    step = np.arange(len(session)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_click = step == np.repeat(looks + 1, counts)
    place = np.where(is_click, clicked[session], looked[session, np.clip(step - 1, 0, MOST_LOOKS - 1)])
    reference = np.where(step == 0, CITIES[cities][session], ids[session, place].astype(str))
    action = np.where(
        step == 0, "search for destination", np.where(is_click, "clickout item", "interaction item image")
    )
    start = (day - date(1970, 1, 1)).days * 86_400 + np.sort(generator.integers(86_000, size=len(users)))
    users_of_rows = users[session]
    table = {
        "user_id": np.char.add("u", users_of_rows.astype(str)),
        "session_id": np.char.add(f"{day:%m%d}-", session.astype(str)),
        "timestamp": start[session] + 20 * step,
        "step": step + 1,
        "action_type": action,
        "reference": reference,
        "platform": PLATFORMS[users_of_rows % len(PLATFORMS)],
        "city": CITIES[cities][session],
        "device": DEVICES[users_of_rows % 7 % len(DEVICES)],
        "impressions": _lists(ids[session], is_click),
        "prices": _lists(prices[session], is_click),
    }
    return pa.table(table).sort_by([("timestamp", "ascending"), ("session_id", "ascending")])


def _lists(values: np.ndarray, present: np.ndarray) -> pa.Array:
    """Rows of ``values`` [rows, L] as lists, null where not ``present``."""
    return pa.array([list(row) if there else None for row, there in zip(values, present)], pa.list_(pa.int64()))
