"""Ranking qualities of made rows, by the program and by plain loops. Rows are int64 [4, R]: request, item, category, logit."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from trainer.metrics.grouped import Groups
from trainer.metrics.qualities import ItemFacts, Qualities
from trainer.metrics.shuffle_by_key import KeyedRows


@dataclass(frozen=True)
class Facts:
    """Training rows by item, and items' vectors."""

    trained: dict[int, int]
    rows: dict[int, list[float]]

    @classmethod
    def random(cls, items):
        generator = np.random.default_rng(8)
        counts = generator.integers(0, 5, items)
        trained = {spread(item): int(count) for item, count in enumerate(counts) if count}
        vectors = {spread(item): generator.standard_normal(6).tolist() for item in range(items)}
        return cls({**trained, spread(-5): 7}, vectors)

    def of_rank(self, rank, world_size):
        """Each rank has seen a part of an item's rows."""
        dealt = [(count // world_size + (rank < count % world_size), item) for item, count in self.trained.items()]
        trained = np.array([line for line in dealt if line[0]], np.int64).reshape(-1, 2)
        zeros = [0.0] * len(next(iter(self.rows.values())))
        return ItemFacts(
            lambda: trained,
            lambda items: np.array([zeros, *(self.rows.get(item, zeros) for item in items.tolist())])[1:],
        )


def spread(item):
    """An id of all 64 bits."""
    return int(np.array((int(item) * 0x9E3779B97F4A7C15) % 2**64, np.uint64).view(np.int64))


def rows(count, requests, items):
    """Logits are unlike in a request."""
    generator = np.random.default_rng(4)
    item = np.minimum(generator.geometric(0.08, count) - 1, items - 1)
    columns = [generator.integers(0, requests, count), item, item % 4, generator.permutation(count)]
    columns[0], columns[1] = (np.array([spread(each) for each in column]) for column in columns[:2])
    return np.stack(columns)


def computed(columns, top_k, facts=None, weights=None, rank=0, world_size=1, memory_bytes=1 << 20):
    """Of this rank's rows."""
    facts = facts or Facts.random(60)
    kept = KeyedRows(memory_bytes)
    request, item, category, logit = map(torch.from_numpy, np.ascontiguousarray(columns))
    weights = torch.ones(len(logit)) if weights is None else weights
    keys = torch.stack([request, item, category], dim=1)
    for batch in zip(*(each.split(100) for each in (logit.float(), logit % 2, weights, keys)), strict=True):
        kept.update(*batch)
    qualities = Qualities(top_k, facts.of_rank(rank, world_size), category=True)
    for number, part in kept.parts(0, [1, 2]):
        qualities.add(number, Groups.of(part))
    return qualities.values(kept.num_parts)


def loops(columns, top_k):
    facts = Facts.random(60)
    lists = defaultdict(list)
    for request, item, category, logit in columns.T.tolist():
        lists[request].append((-logit, item, category))
    offered = set(columns[1].tolist())
    rows, items = sum(facts.trained.values()), len(offered | set(facts.trained))
    found = {"items_offered": len(offered)}
    for k in top_k:
        first = [[each[1:] for each in sorted(one)[:k]] for one in lists.values()]
        shown = Counter(item for one in first for item, _ in one)
        ascending = sorted(shown[item] for item in offered)
        found[f"coverage@{k}"] = len(shown) / len(offered)
        n = len(ascending)
        weighted = sum((2 * i - n - 1) * x for i, x in enumerate(ascending, 1))
        found[f"gini@{k}"] = weighted / (n * sum(ascending))
        bits = [[-math.log2((facts.trained.get(item, 0) + 1) / (rows + items)) for item, _ in one] for one in first]
        found[f"novelty@{k}"] = np.mean([np.mean(one) for one in bits])
        found[f"unseen@{k}"] = np.mean([np.mean([item not in facts.trained for item, _ in one]) for one in first])
        pairs = [list(combinations(one, 2)) for one in first if len(one) > 1]
        if pairs:
            found[f"diversity@{k}"] = np.mean([np.mean([a[1] != b[1] for a, b in one]) for one in pairs])
            cosines = [[_cosine(facts.rows[a[0]], facts.rows[b[0]]) for a, b in one] for one in pairs]
            found[f"diversity_cosine@{k}"] = np.mean([1 - np.mean(one) for one in cosines])
    return found


def _cosine(a, b):
    return np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b))
