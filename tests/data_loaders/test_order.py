"""The order of rows is a permutation, the same for every number of ranks, and shuffled."""

import numpy as np
import pytest

from data_loaders.order import Order


def order(row_groups, **changes):
    given = {"shards": 4, "batch_size": 8, "shuffle": True, "shuffle_rows": 16, "seed": 3, **changes}
    return Order(row_groups, **given)


def rows_by_step(order, epoch, shards):
    """For each step the global row numbers that these shards serve, in order."""
    starts = np.cumsum(order.row_groups) - order.row_groups
    ordered, steps = order.epoch(epoch), []
    for block in range(-(-order.steps_per_epoch // order.steps_per_block)):
        segments = [s for shard in shards for s in ordered.segments(shard, block)]
        parts = [starts[s.row_group] + np.arange(s.start, s.stop) for s in segments]
        rows = np.concatenate([np.zeros(0, np.int64), *parts])
        taken, ends = ordered.rows(shards, block)
        assert np.array_equal(np.sort(taken), np.arange(len(rows)))
        steps += [part.tolist() for part in np.split(rows[taken], ends[:-1])]
    assert not any(steps[order.steps_per_epoch :])
    return steps[: order.steps_per_epoch]


SHAPES = [[1], [3], [4], [5, 0, 7], [100], [1] * 37, [10, 1, 0, 0, 23, 5], [64, 64], [0, 9, 0]]


@pytest.mark.parametrize("row_groups", SHAPES)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("shards", "batch_size", "shuffle_rows"), [(1, 1, 1), (4, 8, 16), (4, 4, 1000), (8, 32, 8), (3, 9, 20)]
)
def test_every_row_once_and_the_same_in_every_partition(row_groups, shuffle, shards, batch_size, shuffle_rows):
    o = order(row_groups, shards=shards, batch_size=batch_size, shuffle=shuffle, shuffle_rows=shuffle_rows)
    alone = rows_by_step(o, 0, list(range(shards)))
    assert sorted(sum(alone, [])) == list(range(sum(row_groups)))
    assert [len(step) for step in alone] == [o.step_rows(k) for k in range(o.steps_per_epoch)]
    assert o.steps_per_epoch == max(-(-len(range(*o.shard_range(c))) // o.rows_per_step) for c in range(shards))
    for world_size in range(2, shards + 1):
        ranks = [rows_by_step(o, 0, list(range(rank, shards, world_size))) for rank in range(world_size)]
        assert [sorted(sum(parts, [])) for parts in zip(*ranks)] == [sorted(step) for step in alone]


def test_one_shard_a_rank_without_shuffling_reads_in_order():
    o = order([10, 0, 7, 6], shards=3, batch_size=6, shuffle=False, shuffle_rows=4)
    parts = [sum(rows_by_step(o, 0, [rank]), []) for rank in range(3)]
    assert sum(parts, []) == list(range(23))


def test_epochs_and_seeds_differ_and_repeat():
    def flat(epoch, seed):
        return sum(rows_by_step(order([20] * 10, seed=seed), epoch, [0, 1, 2, 3]), [])

    assert flat(0, 3) == flat(0, 3)
    assert len({tuple(flat(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9


def test_frozen_order():
    found = rows_by_step(order([3, 4, 5], shards=2, batch_size=4), 0, [0, 1])
    assert found == [[0, 4, 9, 11], [1, 5, 7, 8], [3, 2, 10, 6]]


@pytest.mark.parametrize(("row_groups", "shuffle_rows"), [([5] * 400, 400), ([2000], 2000)])
def test_shuffling_mixes(row_groups, shuffle_rows):
    rows = sum(rows_by_step(order(row_groups, shards=4, batch_size=8, shuffle_rows=shuffle_rows), 1, [0]), [])
    neighbours = np.abs(np.diff(rows))
    assert np.mean(neighbours == 1) < 0.05
    if len(row_groups) > 1:  # row groups come from everywhere
        assert abs(np.corrcoef(np.arange(len(rows)), rows)[0, 1]) < 0.3
        assert np.ptp(rows) > 1500
    else:  # a block is as large as the shard
        assert abs(np.corrcoef(np.arange(len(rows)), rows)[0, 1]) < 0.15


def test_blocks_are_whole_steps_within_the_buffer():
    o = order([1000] * 9, shards=4, batch_size=40, shuffle_rows=100)
    assert (o.rows_per_step, o.steps_per_block, o.block_rows) == (10, 3, 30)
    assert o.steps_per_epoch == 225
    sizes = [o.block_range(0, block) for block in range(75)]
    assert sizes[0] == (0, 30) and sizes[-1] == (2220, 2250) and o.block_range(0, 90) == (2250, 2250)


def test_rows_left_counts_later_blocks():
    o = order([30, 50, 20], shards=2, batch_size=4, shuffle_rows=12)
    ordered = o.epoch(0)
    for block in (0, 3):
        for shards in ([0], [0, 1]):
            expected = np.zeros(3, int)
            for later in range(block, 20):
                for segment in (s for c in shards for s in ordered.segments(c, later)):
                    expected[segment.row_group] += segment.stop - segment.start
            assert [ordered.rows_left(g, shards, block) for g in range(3)] == expected.tolist()


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="10 rows cannot be shared by 4 logical shards"):
        order([5], batch_size=10)
    with pytest.raises(ValueError, match="seed is -1"):
        order([5], seed=-1)
