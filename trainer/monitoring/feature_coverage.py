"""What the batches of a run held, as sums on the training device: which features were ever there, and how full hashed
tables are.

A look at a batch costs a few kernels and never waits for a GPU. Of the first ``OFTEN_BATCHES`` batches of a run every
``LOOK_EVERY``-th is looked at, of all others every ``LATER_EVERY``-th: what is wrong with the data shows early. Counts are
of what was looked at, and so are the rows they are held against; nothing is extrapolated. Like
``trainer.metrics.click_metrics`` these are sums that ranks add up, so that a checkpoint holds them and any number of
ranks can resume.

How many different values a hashed table was asked for follows from how many of its rows were asked for: n values thrown
into m rows leave a share exp(-n / m) of them empty, so n ≈ -m · ln(empty share) (linear counting; Whang et al. 1990, "A
linear-time probabilistic counting algorithm for database applications", eq. 4). Hashes are even, so the first
``ROWS_WATCHED`` rows of a table stand for all of it: the share is then right to 1.6 %.

Letters: B rows of a rank, D dense features, K keys of a KeyedJaggedTensor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_loaders.batch import Batch, Cursor
from data_loaders.schema import Layout, Schema
from trainer.monitoring.magnitudes import filled
from trainer.runtime.read_back import to_host

LOOK_EVERY, LATER_EVERY = 4, 64
OFTEN_BATCHES = 256
ROWS_WATCHED = 1024
NEVER = -1  # an id that no batch holds


@dataclass(frozen=True)
class Hashed:
    """A table, or a cross, that hashed values share. ``rows``: those that values fall into; ``watched`` of them were looked
    at, and ``occupied`` of these were asked for."""

    name: str
    rows: int
    watched: int
    occupied: int

    @property
    def values(self) -> float:
        """Different values seen so far, about; infinite where no watched row is left empty."""
        empty = 1 - self.occupied / self.watched
        return -self.rows * math.log(empty) if empty else math.inf

    @property
    def colliding(self) -> float:
        """The share of values that share a row with another, about: 1 - exp(-n / m)."""
        return self.occupied / self.watched


@dataclass(frozen=True)
class Seen:
    """``present``: by feature, how many values were there, in ``rows`` rows that count."""

    rows: int
    present: dict[str, int]
    hashed: list[Hashed]


class FeatureCoverage:
    """The sums of all looks; none unless ``enabled``. ``layout`` is that of the batches."""

    def __init__(self, schema: Schema, layout: Layout, device: torch.device, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._hashed = _hashed_tables(schema, layout)
        self._dense = [name for name in schema.numbers if schema.features[name].fill is not None]
        self._columns = torch.tensor([schema.numbers.index(name) for name in self._dense], device=device)
        self._fills = torch.tensor([filled(schema.features[name]) for name in self._dense], device=device)
        self._keys = list(layout.keys)
        ids = [_of_key(schema, key, list(self._hashed)) for key in self._keys]  # missing id, hashed table
        self._missing = torch.tensor([missing for missing, _ in ids], dtype=torch.int64, device=device)
        # Rows that count; ids by key; numbers by dense feature; ids by watched row, table by table; the last takes all others.
        self._first = 1 + len(self._keys) + len(self._dense)
        none = self._first + ROWS_WATCHED * len(self._hashed)
        begins = [none if table is None else self._first + ROWS_WATCHED * table for _, table in ids]
        self._begins = torch.tensor(begins, dtype=torch.int64, device=device)
        self._limits = torch.tensor([0 if t is None else ROWS_WATCHED for _, t in ids], device=device)
        self._sums = torch.zeros(none + 1, dtype=torch.float64, device=device)

    @property
    def sums(self) -> Tensor:
        return self._sums

    def reset(self) -> None:
        self._sums.zero_()

    @torch.no_grad()
    def look(self, batch: Batch) -> None:
        """Adds a batch, where its turn is. Never waits for a GPU."""
        if not self._enabled or not is_sampled(batch.cursor):
            return
        counts = batch.weights > 0  # [B]
        self._sums[0] += counts.sum()
        if self._dense:
            numbers = batch.dense.index_select(1, self._columns)  # [B, D with a fill]
            there = ~torch.isclose(numbers, self._fills, rtol=1e-5, atol=1e-7) & counts[:, None]
            self._sums[1 + len(self._keys) : self._first] += there.sum(0)
        begin = 0
        for ids in (batch.sparse, batch.weighted, batch.sequence):
            if ids is not None:
                self._look_at_ids(ids, slice(begin, begin + len(ids.keys())))
                begin += len(ids.keys())

    def _look_at_ids(self, ids: KeyedJaggedTensor, keys: slice) -> None:
        values = ids.values()
        if not values.numel():
            return
        by_key = ids.lengths().view(len(ids.keys()), -1).sum(1)  # [K]
        key = torch.repeat_interleave(by_key, output_size=values.numel())  # of each value
        present = values != self._missing[keys][key]
        self._sums[1 : 1 + len(self._keys)][keys].index_add_(0, key, present.double())
        watched = present & (values >= 1) & (values <= self._limits[keys][key])
        place = torch.where(watched, self._begins[keys][key] + values - 1, len(self._sums) - 1)
        self._sums.index_add_(0, place, torch.ones_like(place, dtype=torch.float64))

    def compute(self, all_reduce: Callable[[Tensor], object]) -> Seen:
        """Of all ranks, where ``all_reduce`` sums a tensor over them in place."""
        sums = self._sums.clone()
        all_reduce(sums)
        sums = to_host(sums)
        rows, *present = (int(value) for value in sums[: self._first].tolist())
        occupied = (sums[self._first : -1].view(-1, ROWS_WATCHED) > 0).sum(1).tolist()
        hashed = [
            Hashed(name, count, min(count, ROWS_WATCHED), found)
            for (name, count), found in zip(self._hashed.items(), occupied)
        ]
        return Seen(rows, dict(zip([*self._keys, *self._dense], present)), hashed)


def is_sampled(cursor: Cursor) -> bool:
    """Whether the batch there is looked at: by its place in the data alone, so that a resumed run looks at the same ones."""
    often = cursor.epoch == 0 and cursor.step <= OFTEN_BATCHES
    return cursor.step % (LOOK_EVERY if often else LATER_EVERY) == 0


def _hashed_tables(schema: Schema, layout: Layout) -> dict[str, int]:
    """Tables that hashed values alone fall into, crosses among them, and how many rows take them (row 0 is for missing)."""
    keys = layout.keys
    mixed = {schema.features[key].table for key in keys if key in schema.features and not _is_hashed(schema, key)}
    names = {key: _table_of(schema, key) for key in keys if _is_hashed(schema, key)}
    return {name: schema.num_embeddings(key) - 1 for key, name in names.items() if name not in mixed}


def _is_hashed(schema: Schema, key: str) -> bool:
    return key in schema.crosses or schema.features[key].ids == "hash"


def _table_of(schema: Schema, key: str) -> str:
    return key if key in schema.crosses else schema.features[key].table


def _of_key(schema: Schema, key: str, tables: list[str]) -> tuple[int, int | None]:
    """A key's missing id, and the place of its table among the hashed ``tables``, where it is one."""
    missing = 0 if key in schema.crosses else schema.missing_id(key)
    table = _table_of(schema, key) if _is_hashed(schema, key) else None
    return NEVER if missing is None else missing, tables.index(table) if table in tables else None
