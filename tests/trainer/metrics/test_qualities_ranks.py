"""Ranking qualities are the same bit for bit on any number of ranks, however rows were dealt out."""

import numpy as np
import pytest

from tests.helpers.qualities import Facts, computed, rows
from tests.helpers.ranks import run_distributed
from trainer.metrics import shuffle_by_key

FACTS = Facts.random(60)


def tied():
    """Seven logits: who of those that share one comes first must not depend on ranks."""
    columns = rows(2_000, requests=150, items=60)
    return np.concatenate([columns[:3], columns[3:] // 300])


def on_ranks(rank, world_size):
    """Every world_size-th row; all rows on the last rank; in many small rounds and files."""
    columns, where = tied(), (rank, world_size)
    found = [
        computed(columns[:, rank::world_size], [1, 4], FACTS, None, *where),
        computed(columns[:, : (2_000 if rank == world_size - 1 else 0)], [1, 4], FACTS, None, *where),
    ]
    shuffle_by_key.EXCHANGED_ROWS, shuffle_by_key.BLOCK_ROWS = 300, 250
    return [*found, computed(columns[:, rank::world_size], [1, 4], FACTS, None, *where, memory_bytes=0)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_qualities_are_the_same_bit_for_bit_on_any_number_of_ranks(world_size):
    expected = computed(tied(), [1, 4], FACTS)
    assert None not in expected.values() and len(expected) == 1 + 2 * 6 - 2
    for found in run_distributed(on_ranks, world_size):
        assert all(values == expected for values in found)
