"""Click logs with a known best AUC, for any schema.

Every row carries the probability p its label was drawn with, so the best possible AUC and log loss of the data are
known (``best_scores``), and a model's distance from them is the model's own. With ranks (0 is the most frequent id) in
place of ids,

    logit p = bias + linear + interaction + match + dense

* linear: an effect of each id, the mean of them for a bag. Rare ids differ less from each other, as no model could
  learn their effects from a handful of rows.
* interaction: inner products of latent vectors [NUM_FACTORS] of two ids, a few pairs of features, those of the schema's
  crosses first. The vectors have mean zero, so a linear model sees nothing of it.
* match: log(1 + number of history events that belong to the target's cluster of ids). Rows have a few tastes
  (clusters); most events, and half of the targets, are drawn from them.
* dense: linear in each feature, and quadratic in the first; linear in the mean of a vector's entries.

Each term is standardised and weighted by ``SHARES`` of the logit's variance, over the terms that the schema has.
Ids are integers (a hashed feature gets 63-bit ones), Zipf-distributed; other attributes of a history's events are
functions of the same item, as an item's category is. Everything hidden is a function of (seed, id space) alone, so
train, valid and test agree.

Letters: B rows, T events or bag members in all.
"""

import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_loaders.errors import UserError
from data_loaders.hashing import finalised
from data_loaders.schema import Feature, Schema
from data_loaders.state_files import sync, sync_below

SHARES = {"linear": 0.25, "interaction": 0.3, "match": 0.3, "dense": 0.15}
LOGIT_STD = 1.5
ZIPF_POWER = 10  # P(rank > k) falls like k ** -(1 / ZIPF_POWER): the Zipf exponent is 1 + 1 / ZIPF_POWER
NUM_CLUSTERS = 64
NUM_TASTES = 2
NUM_FACTORS = 3
MAX_PAIRS = 4
PROFILES = 1 << 14
MAX_IDS = 1 << 30  # ranks are int32
PILOT_ROWS = 1 << 16
EMPTY_SHARE, NULL_SHARE = 0.1, 0.03
SPEC_NAME = "_SUCCESS.json"
SPEC_VERSION = 1


# What to generate, derived from the schema: columns, not features.


@dataclass(frozen=True)
class IdSpace:
    """Ids with one meaning, of ``size`` different values: identity ids leave out the ``reserved`` rows."""

    name: str
    size: int
    hashed: bool
    reserved: tuple[int, ...]

    @property
    def clusters(self) -> int:
        return min(NUM_CLUSTERS, self.size)


@dataclass(frozen=True)
class History:
    """List columns that describe the same events. ``lead`` is drawn, the others follow from it; ``targets`` are the
    columns that ``columns`` are compared with (None: nothing)."""

    lead: int
    columns: tuple[str, ...]
    targets: tuple[str | None, ...]
    max_length: int


@dataclass(frozen=True)
class Plan:
    """Columns of the log by kind, each with what it takes to generate it. ``dense``: (log1p, may be null); ``vectors``: (entries,
    may be null); ``single``
    and ``events`` (list columns of histories): the id space; ``bags``: (id space, maximum length); ``pairs``: columns
    that interact."""

    label: str
    probability: str
    weight: str | None
    dense: dict[str, tuple[bool, bool]]
    single: dict[str, IdSpace]
    bags: dict[str, tuple[IdSpace, int]]
    events: dict[str, IdSpace]
    histories: tuple[History, ...]
    pairs: tuple[tuple[str, str], ...]
    vectors: dict[str, tuple[int, bool]] = field(default_factory=dict)


def plan_of(schema: Schema, probability: str) -> Plan:
    """Raises ``UserError`` without a label or features, where features cannot share a column as they do, and where a
    column's name is taken twice."""
    readers: dict[str, list[str]] = {}
    for name in schema.features:
        readers.setdefault(schema.column(name), []).append(name)
    _check_names(schema, readers, probability)
    spaces = _id_spaces(schema)
    dense, vectors, single, bags, events = {}, {}, {}, {}, {}
    for column, names in readers.items():
        features = [schema.features[n] for n in names if schema.features[n].table]
        if (first := schema.features[names[0]]).kind == "vector":
            vectors[column] = first.dim, first.fill is not None
        elif not features:
            dense[column] = _dense(schema, names)
        elif not any(_is_list(f) for f in features):
            single[column] = spaces[features[0].table]
        elif any(f.kind == "sequence" for f in features):
            events[column] = spaces[features[0].table]
        else:
            bags[column] = (spaces[features[0].table], min(f.max_length for f in features))
    histories = _histories(schema, events, single)
    pairs = _pairs(schema, single, histories)
    return Plan(schema.label, probability, schema.weight, dense, single, bags, events, histories, pairs, vectors)


def _check_names(schema: Schema, readers: dict[str, list[str]], probability: str) -> None:
    if schema.label is None or not readers:
        lacking = "label" if schema.label is None else "features"
        raise UserError(f"schema.{lacking} is empty: a synthetic click log needs a label and at least one feature")
    taken = [schema.label, probability, *([schema.weight] if schema.weight else [])]
    for column in taken:
        if column in readers or taken.count(column) > 1:
            raise UserError(
                f"column '{column}' is the label, weight or click probability and something else as well: give every "
                "one its own name (schema.label, schema.weight, data.probability, schema.features.….column)"
            )
    for column, names in readers.items():
        forms = {_is_list(schema.features[n]) for n in names}
        if len(forms) > 1:
            raise UserError(
                f"column '{column}' is read as a list and as a single value by {', '.join(names)}: give "
                "schema.features.….max_length to all of them or to none, or read different columns"
            )


def _is_list(feature: Feature) -> bool:
    return feature.kind in ("sequence", "vector") or (feature.kind == "sparse" and feature.max_length is not None)


def _dense(schema: Schema, names: list[str]) -> tuple[bool, bool]:
    features = [schema.features[n] for n in names]
    return any(f.log1p for f in features), all(f.fill is not None for f in features)


def _united(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """``{name: representative}`` of (name, value): names that share a value, or do through others, have one."""
    leader: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, value in pairs:
        leader.setdefault(name, name)
        old, new = leader[name], leader[first.setdefault(value, name)]
        leader = {n: new if known == old else known for n, known in leader.items()}
    return leader


def _id_spaces(schema: Schema) -> dict[str, IdSpace]:
    """``{table: IdSpace}``. Features of one table, and tables of one column, hold the same ids."""
    names = [n for n, f in schema.features.items() if f.table]
    leader = _united((schema.features[n].table, schema.column(n)) for n in names)
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(leader[schema.features[name].table], []).append(name)
    spaces = {table: _id_space(schema, table, features) for table, features in members.items()}
    return {table: spaces[representative] for table, representative in leader.items()}


def _id_space(schema: Schema, table: str, names: list[str]) -> IdSpace:
    identity = [n for n in names if schema.features[n].ids == "identity"]
    # A quarter of the rows for hashed ids: with as many ids as rows, two of three would share theirs with another.
    sizes = [max(2, schema.num_embeddings(n) // 4) for n in names if n not in identity]
    reserved: tuple[int, ...] = ()
    if identity:
        rows = min(schema.num_embeddings(n) for n in identity)
        missing = {0} if sizes else set()
        missing |= {schema.missing_id(n) for n in names} - {None}
        reserved = tuple(sorted(m for m in missing if m < rows))
        sizes.append(rows - len(reserved))
    if min(sizes) < 1:
        raise UserError(
            f"schema.tables.{table} has no row left for an id, after the missing ids {reserved} of {', '.join(names)}: "
            "raise num_embeddings, or use the same missing_id"
        )
    return IdSpace(table, min(*sizes, MAX_IDS), not identity, reserved)


def _histories(schema: Schema, events: dict[str, IdSpace], single: dict[str, IdSpace]) -> tuple[History, ...]:
    """One for each group of sequences; the lead is the column with most ids, of those that have a target if any do."""
    leader = _united((schema.features[n].history or n, schema.column(n)) for n in schema.sequences)
    groups: dict[str, dict[str, str | None]] = {}
    longest: dict[str, int] = {}
    for name in schema.sequences:
        feature = schema.features[name]
        group = leader[feature.history or name]
        target = schema.column(feature.target) if feature.target else None
        members = groups.setdefault(group, {})
        column = schema.column(name)
        members[column] = members.get(column) or (target if target in single else None)
        longest[group] = min(longest.get(group, feature.max_length), feature.max_length)
    histories = []
    for group, members in groups.items():
        columns = tuple(members)
        lead = max(range(len(columns)), key=lambda i: (members[columns[i]] is not None, events[columns[i]].size))
        histories.append(History(lead, columns, tuple(members.values()), longest[group]))
    return tuple(histories)


def _pairs(schema: Schema, single: dict[str, IdSpace], histories: tuple[History, ...]) -> tuple[tuple[str, str], ...]:
    """Columns that interact: those of the crosses, then the smallest (their combinations are the best learnable).
    Two targets of histories depend on each other, so that a linear model would see part of their interaction."""
    targets = {t for h in histories for t in h.targets}
    crossed = [
        (schema.column(a), schema.column(b)) for c in schema.crosses.values() for a, b in zip(c.columns, c.columns[1:])
    ]
    others = sorted(combinations(single, 2), key=lambda pair: single[pair[0]].size * single[pair[1]].size)
    chosen: list[tuple[str, str]] = []
    for a, b in [*crossed, *others]:
        if len(chosen) == MAX_PAIRS:
            break
        usable = a in single and b in single and a != b and not (a in targets and b in targets)
        used = [column for pair in chosen for column in pair]
        fresh = (a, b) in crossed or (used.count(a) < 2 and used.count(b) < 2)
        if usable and fresh and (a, b) not in chosen and (b, a) not in chosen:
            chosen.append((a, b))
    return tuple(chosen)


# Rows before they have labels.


@dataclass
class Rows:
    """``dense``: standard normal float32 [B], NaN where the value is missing; ``single``: int32 ranks [B]; ``lists``
    (bags and events): int32 ranks [T] and offsets [B + 1]. A rank is an id's place by frequency in its space."""

    size: int
    dense: dict[str, np.ndarray]
    single: dict[str, np.ndarray]
    lists: dict[str, tuple[np.ndarray, np.ndarray]]
    vectors: dict[str, np.ndarray] = field(default_factory=dict)  # standard normal float32 [B, K], NaN where missing


def draw_rows(plan: Plan, rng: np.random.Generator, size: int) -> Rows:
    rows = Rows(size, {}, {}, {})
    for column, (_, nullable) in plan.dense.items():
        rows.dense[column] = rng.standard_normal(size, dtype=np.float32)
        if nullable:
            rows.dense[column][rng.random(size, dtype=np.float32) < NULL_SHARE] = np.nan
    for column, (width, nullable) in plan.vectors.items():
        rows.vectors[column] = rng.standard_normal((size, width), dtype=np.float32)
        if nullable:
            rows.vectors[column][rng.random(size, dtype=np.float32) < NULL_SHARE] = np.nan
    tastes = rng.integers(NUM_CLUSTERS, size=(NUM_TASTES, size), dtype=np.int32)
    for history in plan.histories:
        _draw_history(plan, history, rng, tastes, rows)
    for column, space in plan.single.items():
        if column not in rows.single:
            rows.single[column] = _zipf(rng, space.size, size)
    for column, (space, max_length) in plan.bags.items():
        offsets = _offsets(rng, size, max_length)
        rows.lists[column] = (_zipf(rng, space.size, int(offsets[-1])), offsets)
    return rows


def _draw_history(plan: Plan, history: History, rng: np.random.Generator, tastes: np.ndarray, rows: Rows) -> None:
    lead = plan.events[history.columns[history.lead]]
    offsets = _offsets(rng, rows.size, history.max_length)
    owner = np.repeat(np.arange(rows.size, dtype=np.int32), np.diff(offsets))  # [T]
    ranks = _tasteful(rng, lead, tastes[:, owner], share=0.8)
    for column in history.columns:
        rows.lists[column] = (_attribute(ranks, lead, plan.events[column]), offsets)
    if history.targets[history.lead] is not None:
        target = rows.single.get(history.targets[history.lead])
        if target is None:  # it may be the target of an earlier history as well
            target = _tasteful(rng, lead, tastes, share=0.5)
        for column in history.targets:
            if column is not None and column not in rows.single:
                rows.single[column] = _attribute(target, lead, plan.single[column])


def _zipf(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Ranks int32 [count] in 0 … size - 1 with a Pareto law cut off at ``size``, exponent 1 + 1 / ZIPF_POWER; its
    inverse is an integer power, hence far cheaper than a table of the exact Zipf masses."""
    cut = 1 - (size + 1) ** (-1 / ZIPF_POWER)
    ranks = (1 - cut * rng.random(count)) ** 2
    ranks = 1 / (ranks * np.square(np.square(ranks)))  # ** (-ZIPF_POWER), in two squarings
    return np.minimum(ranks.astype(np.int32) - 1, size - 1)


def _offsets(rng: np.random.Generator, size: int, max_length: int) -> np.ndarray:
    """int32 [size + 1]: uniform lengths of 1 … max_length, and EMPTY_SHARE of them 0."""
    lengths = rng.integers(1, max_length + 1, size=size, dtype=np.int32)
    lengths[rng.random(size, dtype=np.float32) < EMPTY_SHARE] = 0
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def _tasteful(rng: np.random.Generator, space: IdSpace, tastes: np.ndarray, share: float) -> np.ndarray:
    """Ranks [T], ``share`` of which are moved into one of the clusters ``tastes`` [NUM_TASTES, T]; a rank's cluster is
    its remainder by ``space.clusters``."""
    ranks = _zipf(rng, space.size, tastes.shape[1])
    luck = rng.random(len(ranks), dtype=np.float32)
    wanted = np.where(luck < share / 2, tastes[0], tastes[1]) % np.int32(space.clusters)
    moved = ranks // np.int32(space.clusters) * np.int32(space.clusters) + wanted
    moved -= np.where(moved >= space.size, np.int32(space.clusters), np.int32(0))
    return np.where(luck < share, moved, ranks)


def _attribute(ranks: np.ndarray, lead: IdSpace, space: IdSpace) -> np.ndarray:
    """Ranks in ``space`` as a function of ranks in ``lead``, of the same cluster: the category of an item."""
    if space == lead:
        return ranks
    clusters, blocks = np.int32(space.clusters), np.int32(space.size // space.clusters)
    block, cluster = ranks // np.int32(lead.clusters), ranks % np.int32(lead.clusters)
    return block % blocks * clusters + cluster % clusters


# The law of the labels.


class Law:
    """logit p of rows, and their columns. ``click_rate`` is the mean of p. Memory does not grow with the tables."""

    def __init__(self, plan: Plan, seed: int, click_rate: float) -> None:
        self.plan, self.seed = plan, seed
        bags = (space for space, _ in plan.bags.values())
        spaces = {space.name: space for space in (*plan.single.values(), *plan.events.values(), *bags)}
        self.raw_ids = {name: RawIds(space, self._rng("ids", name)) for name, space in spaces.items()}
        self.effects = {name: _normal(self._rng("effects", name), space) for name, space in spaces.items()}
        self.slopes = self._rng("dense").choice([-1.0, 1.0], size=len(plan.dense))
        pilot = draw_rows(plan, self._rng("pilot"), PILOT_ROWS)
        self.factors = [self._pair_factors(pair, pilot) for pair in plan.pairs]
        self.weights = self._weigh(pilot)
        self.bias = 0.0
        self.bias = _bias(self.logits(pilot), click_rate)

    def _rng(self, *names: str) -> np.random.Generator:
        return generator(self.seed, "law", *names)

    def _pair_factors(self, pair: tuple[str, str], pilot: Rows) -> tuple[np.ndarray, ...]:
        """Latent vectors of both columns, float32 [profiles, NUM_FACTORS], of mean zero over the rows."""
        factors = []
        for side, column in enumerate(pair):
            vectors = _normal(self._rng("factors", *pair, str(side)), self.plan.single[column], NUM_FACTORS)
            factors.append(vectors - vectors[_profile(pilot.single[column])].mean(axis=0))
        return tuple(factors)

    def _weigh(self, pilot: Rows) -> dict[str, tuple[float, float]]:
        """``{term: (mean, weight)}`` that make SHARES and LOGIT_STD true of the pilot; constant terms are left out."""
        moments = {name: (float(values.mean()), float(values.std())) for name, values in self.terms(pilot).items()}
        moments = {name: (mean, std) for name, (mean, std) in moments.items() if std > 1e-6}
        total = sum(SHARES[name] for name in moments)
        return {n: (mean, LOGIT_STD * math.sqrt(SHARES[n] / total) / std) for n, (mean, std) in moments.items()}

    def logits(self, rows: Rows) -> np.ndarray:
        """float64 [B]."""
        logits = np.full(rows.size, self.bias)
        for name, values in self.terms(rows).items():
            if name in self.weights:
                mean, weight = self.weights[name]
                logits += weight * (values - mean)
        return logits

    def terms(self, rows: Rows) -> dict[str, np.ndarray]:
        """Each float64 [B], before it is standardised."""
        return {
            "linear": self._linear(rows),
            "interaction": self._interaction(rows),
            "match": self._match(rows),
            "dense": self._dense(rows),
        }

    def _linear(self, rows: Rows) -> np.ndarray:
        total = np.zeros(rows.size)
        for column, space in self.plan.single.items():
            total += self.effects[space.name][_profile(rows.single[column])]
        aimless = {c: self.plan.events[c] for h in self.plan.histories if h.targets[h.lead] is None for c in h.columns}
        for column, space in {**{c: s for c, (s, _) in self.plan.bags.items()}, **aimless}.items():
            ranks, offsets = rows.lists[column]
            sums = _sums(self.effects[space.name][_profile(ranks)], offsets)
            total += sums / np.maximum(np.diff(offsets), 1)
        return total

    def _interaction(self, rows: Rows) -> np.ndarray:
        total = np.zeros(rows.size)
        for (a, b), (left, right) in zip(self.plan.pairs, self.factors, strict=True):
            total += (left[_profile(rows.single[a])] * right[_profile(rows.single[b])]).sum(axis=1)
        return total

    def _match(self, rows: Rows) -> np.ndarray:
        total = np.zeros(rows.size)
        for history in self.plan.histories:
            if history.targets[history.lead] is not None:
                total += np.log1p(match_counts(self.plan, history, rows))
        return total

    def _dense(self, rows: Rows) -> np.ndarray:
        """A missing value has no effect. In the first feature, mean-zero 0.6 x + 0.57 (x² - 1) of unit variance."""
        total = np.zeros(rows.size)
        for i, (slope, values) in enumerate(zip(self.slopes, rows.dense.values(), strict=True)):
            effect = 0.6 * values + 0.57 * (np.square(values) - 1) if i == 0 else values
            total += slope * np.nan_to_num(effect)
        for vectors in rows.vectors.values():
            total += np.nan_to_num(vectors.sum(axis=1) / math.sqrt(vectors.shape[1]))
        return total

    # Columns.

    def record_batch(self, rows: Rows, rng: np.random.Generator) -> pa.RecordBatch:
        probability = _sigmoid(self.logits(rows)).astype(np.float32)
        columns = {self.plan.label: pa.array((rng.random(rows.size) < probability).view(np.int8))}
        if self.plan.weight:
            columns[self.plan.weight] = pa.array(rng.uniform(0.5, 1.5, rows.size).astype(np.float32))
        columns |= {name: self._dense_array(name, values) for name, values in rows.dense.items()}
        columns |= {name: _vector_array(values) for name, values in rows.vectors.items()}
        columns |= {n: pa.array(self.raw_ids[s.name](rows.single[n])) for n, s in self.plan.single.items()}
        bags = {name: space for name, (space, _) in self.plan.bags.items()}
        columns |= {n: self._list_array(rows.lists[n], s) for n, s in {**bags, **self.plan.events}.items()}
        columns[self.plan.probability] = pa.array(probability)
        nullable = self.plan.dense | self.plan.vectors
        fields = [pa.field(n, a.type, nullable=nullable.get(n, (False, False))[1]) for n, a in columns.items()]
        return pa.RecordBatch.from_arrays(list(columns.values()), schema=pa.schema(fields))

    def _dense_array(self, name: str, values: np.ndarray) -> pa.Array:
        log1p, nullable = self.plan.dense[name]
        values = np.exp(2 + values) if log1p else values
        return pa.array(values, mask=np.isnan(values) if nullable else None)

    def _list_array(self, lists: tuple[np.ndarray, np.ndarray], space: IdSpace) -> pa.Array:
        ranks, offsets = lists
        values = pa.array(self.raw_ids[space.name](ranks))
        kind = pa.list_(pa.field("element", values.type, nullable=False))
        return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)


def _vector_array(values: np.ndarray) -> pa.Array:
    missing = np.isnan(values[:, 0])
    entries = pa.array(np.nan_to_num(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(
        entries, values.shape[1], mask=pa.array(missing) if missing.any() else None
    )


class RawIds:
    """Ranks -> ids as a log has them: a bijection onto the rows of a table, or 63-bit numbers for hashed ids."""

    def __init__(self, space: IdSpace, rng: np.random.Generator) -> None:
        self.space = space
        self.salt = int(rng.integers(1 << 62))
        self.factor = int(space.size * rng.uniform(0.4, 0.6)) | 1
        while math.gcd(self.factor, space.size) > 1:
            self.factor += 2
        self.known = self._ids(np.arange(space.size)) if space.size <= 1 << 20 else None

    def __call__(self, ranks: np.ndarray) -> np.ndarray:
        """int32 where every id fits, else int64."""
        return self._ids(ranks) if self.known is None else self.known[ranks]

    def _ids(self, ranks: np.ndarray) -> np.ndarray:
        if self.space.hashed:
            return (finalised(ranks.astype(np.uint64) + np.uint64(self.salt)) >> np.uint64(1)).astype(np.int64)
        size = self.space.size
        ids = (ranks.astype(np.uint64) * np.uint64(self.factor) + np.uint64(self.salt % size)) % np.uint64(size)
        ids = ids.astype(np.int64)
        for row in self.space.reserved:
            ids += ids >= row
        return ids.astype(np.int32) if size + len(self.space.reserved) < 1 << 31 else ids


def match_counts(plan: Plan, history: History, rows: Rows) -> np.ndarray:
    """Events of each row that belong to the target's cluster, int64 [B]."""
    column, target = history.columns[history.lead], history.targets[history.lead]
    ranks, offsets = rows.lists[column]
    clusters = np.int32(plan.events[column].clusters)
    wanted = np.repeat(rows.single[target] % clusters, np.diff(offsets))  # [T]
    return _sums(ranks % clusters == wanted, offsets).astype(np.int64)


def _profile(ranks: np.ndarray) -> np.ndarray:
    """Ranks -> rows of the effect arrays: frequent ids have their own, rare ones share the second half."""
    return np.where(ranks < PROFILES, ranks, PROFILES // 2 + (ranks & (PROFILES // 2 - 1)))


def _normal(rng: np.random.Generator, space: IdSpace, *shape: int) -> np.ndarray:
    """float32 [profiles, *shape], the standard deviation falling with the rank."""
    size = min(space.size, PROFILES)
    spread = (1 + np.arange(size) / 256) ** -0.5
    return (rng.standard_normal((size, *shape)) * spread.reshape(-1, *[1] * len(shape))).astype(np.float32)


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of values [T] over each row, float64 [B]; empty rows are 0 (np.add.reduceat would not make them so)."""
    running = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    return running[offsets[1:]] - running[offsets[:-1]]


def _bias(logits: np.ndarray, click_rate: float) -> float:
    """What to add to the logits for a mean probability of ``click_rate``, by bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(logits + middle).mean() < click_rate else (low, middle)
    return (low + high) / 2


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """An own stream for every (seed, names), the same in every process."""
    words = [n if isinstance(n, int) else zlib.crc32(n.encode()) for n in names]
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, *words])))


# Files.


def write(
    schema: Schema,
    folder: str | Path,
    *,
    rows: dict[str, int],
    seed: int,
    probability: str = "click_probability",
    click_rate: float = 0.2,
    rows_per_file: int = 1 << 18,
    row_group_size: int = 1 << 14,
    workers: int | None = None,
) -> None:
    """Writes ``folder/<split>/part-00000.parquet`` … for every split of ``rows`` ({"train": 1_000_000, …}).

    The folder appears whole or not at all, and replaces an older one of this function. Its bytes depend on the
    arguments, not on ``workers`` (threads; by default one a core), each of which holds one row group at a time.
    Raises ``UserError`` for arguments it cannot serve, and where ``folder`` holds anything that this function did not
    write.
    """
    folder = Path(folder)
    _check_arguments(rows, seed, click_rate, rows_per_file=rows_per_file, row_group_size=row_group_size)
    _check_folder(folder)
    plan = plan_of(schema, probability)
    law = Law(plan, seed, click_rate)
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
    try:
        for split in rows:
            (partial / split).mkdir(parents=True)
        _write_files(law, partial, rows, rows_per_file, row_group_size, workers)
        files = {split: -(-size // rows_per_file) for split, size in rows.items()}
        spec = _spec(plan, rows, seed, click_rate) | {"files": files}
        (partial / SPEC_NAME).write_text(json.dumps(spec, indent=1))
        sync_below(partial)
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def matches(
    schema: Schema,
    folder: str | Path,
    *,
    rows: dict[str, int],
    seed: int,
    probability: str = "click_probability",
    click_rate: float = 0.2,
) -> bool:
    """Whether ``folder`` holds all that ``write`` with these arguments writes. What a schema says of models only, such
    as an embedding dimension, makes no difference."""
    stored = _stored_spec(Path(folder))
    if stored is None:
        return False
    files = stored.pop("files")
    wanted = json.loads(json.dumps(_spec(plan_of(schema, probability), rows, seed, click_rate)))
    paths = (Path(folder) / split / _file_name(i) for split, count in files.items() for i in range(count))
    return stored == wanted and all(path.is_file() for path in paths)


def _check_arguments(rows: dict[str, int], seed: int, click_rate: float, **sizes: int) -> None:
    if not rows:
        raise UserError("rows is empty: name at least one split, such as {'train': 1_000_000}")
    for split, size in rows.items():
        if not split or "/" in split or split.startswith((".", "_")):
            raise UserError(f"rows: {split!r} is no folder name for a split; use names like 'train'")
        if size < 1:
            raise UserError(f"rows: {split} has {size} rows: give at least 1, or leave the split out")
    if seed < 0:
        raise UserError(f"seed is {seed}: it must not be negative")
    if not 0 < click_rate < 1:
        raise UserError(f"click_rate is {click_rate}: it must lie between 0 and 1")
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and _stored_spec(folder) is None:
        raise UserError(
            f"{folder} holds files that are not synthetic data: choose another folder (data.root), or empty it first"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another folder (data.root)")


def _spec(plan: Plan, rows: dict[str, int], seed: int, click_rate: float) -> dict:
    said = asdict(plan)
    if not plan.vectors:  # as in logs that were written before there were any
        del said["vectors"]
    return {"version": SPEC_VERSION, "rows": rows, "seed": seed, "click_rate": click_rate, "plan": said}


def _stored_spec(folder: Path) -> dict | None:
    """None unless ``write`` finished there."""
    try:
        stored = json.loads((folder / SPEC_NAME).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return stored if isinstance(stored, dict) and {"version", "plan", "files"} <= stored.keys() else None


def _file_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def _write_files(
    law: Law,
    folder: Path,
    rows: dict[str, int],
    rows_per_file: int,
    row_group_size: int,
    workers: int | None,
) -> None:
    jobs = [
        (split, index, min(rows_per_file, size - index * rows_per_file))
        for split, size in rows.items()
        for index in range(-(-size // rows_per_file))
    ]
    # Threads: numpy and Arrow release the GIL in all that takes time here.
    executor = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        futures = [executor.submit(_write_file, law, folder, *job, row_group_size) for job in jobs]
        for future in as_completed(futures):
            future.result()
    finally:
        executor.shutdown(cancel_futures=True)


def _write_file(law: Law, folder: Path, split: str, index: int, size: int, row_group_size: int) -> None:
    writer = None
    try:
        for group, start in enumerate(range(0, size, row_group_size)):
            rng = generator(law.seed, "rows", split, index, group)
            rows = draw_rows(law.plan, rng, min(row_group_size, size - start))
            batch = law.record_batch(rows, rng)
            if writer is None:
                writer = _parquet_writer(folder / split / _file_name(index), batch.schema)
            writer.write_batch(batch, row_group_size=row_group_size)
    finally:
        if writer is not None:
            writer.close()


def _parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # Plain int32 is what a reader decodes fastest; dictionaries would help neither it nor zstd.
    return pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=1, use_dictionary=False, write_page_checksum=True
    )


def _publish(partial: Path, folder: Path) -> None:
    """A folder cannot replace a full one in one step: the old one is out of the way for an instant."""
    old = partial.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
