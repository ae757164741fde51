"""Metrics by group are the same bit for bit on any number of ranks, however rows were dealt out, in memory or in files."""

import numpy as np
import pytest
import torch

from tests.helpers.ranks import run_distributed
from trainer.config.evaluation import EvaluationConfig
from trainer.metrics import shuffle_by_key
from trainer.metrics.grouped import GroupAUC, Groups, Slices
from trainer.metrics.ranking import Ranking
from trainer.metrics.shuffle_by_key import KeyedRows

ROWS = 4_000


def rows():
    rng = np.random.default_rng(11)
    keys = rng.integers(-(1 << 63), (1 << 63) - 1, 500)
    logits = np.round(rng.standard_normal(ROWS), 1).astype(np.float32)
    labels = (rng.random(ROWS) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    weights = rng.choice([0.0, 0.3, 1.0, 2.5], ROWS).astype(np.float32)
    chosen = np.stack([keys[rng.integers(0, size, ROWS)] for size in (500, 9)], axis=1)
    return tuple(map(torch.from_numpy, (logits, labels, weights, chosen)))


def text(keys):
    return dict(zip(keys, map(str, keys)))


def grouped(part, memory_bytes=1 << 20):
    kept = KeyedRows(memory_bytes)
    for batch in zip(*(column[part].split(100) for column in rows())):
        kept.update(*batch)
    values = []
    for metric, column in ((GroupAUC(), 0), (Ranking([1, 5]), 0), (Slices(text, most=6), 1)):
        for number, found in kept.parts(column):
            metric.add(number, Groups.of(found))
        values.append(metric.values(kept.num_parts))
    return values


def on_ranks(rank, world_size):
    """Every world_size-th row; all rows on the last rank; in many small rounds and files."""
    found = [grouped(slice(rank, None, world_size)), grouped(slice(0, ROWS if rank == world_size - 1 else 0))]
    shuffle_by_key.EXCHANGED_ROWS, shuffle_by_key.BLOCK_ROWS = 300, 250
    return [*found, grouped(slice(rank, None, world_size), memory_bytes=0)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_grouped_metrics_are_the_same_bit_for_bit_on_any_number_of_ranks(world_size):
    expected = grouped(slice(None))
    assert expected[0]["gauc_groups"] > 300 and expected[2]["slices"][-1]["other_values"] == 3
    for found in run_distributed(on_ranks, world_size):
        assert all(values == expected for values in found)


def test_more_ranks_than_parts():
    owned = [shuffle_by_key._owned(16, rank, 40) for rank in range(40)]
    assert sorted(part for own in owned for part in own) == list(range(16))


def test_columns_are_named_once():
    options = EvaluationConfig(group_by="user", request="user", slices=["device", "user"])
    assert options.columns == ("user", "device")
