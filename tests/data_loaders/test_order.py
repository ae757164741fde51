"""The order of rows is a permutation, the same for every number of ranks, and shuffled."""

import numpy as np
import pytest

from data_loaders.order import Order


def order(row_groups, **changes):
    given = {"kind": "shuffled", "shards": 4, "batch_size": 8, "shuffle_rows": 16, "seed": 3, **changes}
    return Order(row_groups, **given)


def rows_by_step(order, epoch, shards, threads=1, min_rows=1):
    """For each step the global row numbers that these shards serve, in order."""
    starts = np.cumsum(order.row_groups) - order.row_groups
    ordered, steps = order.epoch(epoch), [[] for _ in range(order.steps_per_epoch)]
    for block in range(order.num_blocks):
        for unit in ordered.units(shards, block, threads, min_rows):
            segments = [s for stream in ordered.segments(unit) for s in stream]
            parts = [starts[s.row_group] + np.arange(s.start, s.stop) for s in segments]
            rows = np.concatenate([np.zeros(0, np.int64), *parts])
            taken, ends = ordered.rows(unit), ordered.ends(unit)
            if taken is not None:
                assert np.array_equal(np.sort(taken), np.arange(len(rows)))
                rows = rows[taken]
            assert len(rows) == ends[-1]
            for step, part in zip(range(unit.first, unit.stop), np.split(rows, ends[:-1])):
                steps[step] += part.tolist()
    return steps


def of_rank(rank, world_size, shards):
    return range(rank * shards // world_size, (rank + 1) * shards // world_size)


SHAPES = [[1], [3], [4], [5, 0, 7], [100], [1] * 37, [10, 1, 0, 0, 23, 5], [64, 64], [0, 9, 0]]


@pytest.mark.parametrize("row_groups", SHAPES)
@pytest.mark.parametrize("kind", ["shuffled", "preshuffled", "time"])
@pytest.mark.parametrize(
    ("shards", "batch_size", "shuffle_rows"), [(1, 1, 1), (4, 8, 16), (4, 4, 1000), (8, 32, 8), (3, 9, 20)]
)
def test_every_row_once_and_the_same_in_every_partition(row_groups, kind, shards, batch_size, shuffle_rows):
    o = order(row_groups, shards=shards, batch_size=batch_size, kind=kind, shuffle_rows=shuffle_rows)
    alone = rows_by_step(o, 0, range(shards))
    assert sorted(sum(alone, [])) == list(range(sum(row_groups)))
    assert [len(step) for step in alone] == [o.step_rows(k) for k in range(o.steps_per_epoch)]
    assert o.shard_rows(range(shards), 0, o.steps_per_epoch).sum() == o.num_rows
    for world_size in range(2, shards + 1):
        ranks = [rows_by_step(o, 0, of_rank(rank, world_size, shards), threads=2) for rank in range(world_size)]
        assert [sorted(sum(parts, [])) for parts in zip(*ranks)] == [sorted(step) for step in alone]


def test_time_order_is_the_order_of_the_files():
    o = order([10, 0, 7, 6], kind="time", shards=4, batch_size=8, shuffle_rows=16)
    assert rows_by_step(o, 0, range(4)) == [list(range(8)), list(range(8, 16)), list(range(16, 23))]
    # Rank 1 of 3 has the second shard's 2 rows of each step.
    assert rows_by_step(o, 5, range(1, 2)) == [[2, 3], [10, 11], [18, 19]]
    assert rows_by_step(o, 5, range(3, 4), threads=3) == [[6, 7], [14, 15], [22]]


def test_contiguous_shards_are_parts_of_the_files():
    o = order([10, 0, 7, 6], kind="contiguous", shards=3, batch_size=6, shuffle_rows=4)
    parts = [rows_by_step(o, 0, range(rank, rank + 1), threads=2) for rank in range(3)]
    assert sum((sum(part, []) for part in parts), []) == list(range(23))
    assert [len(step) for step in parts[0]] == [2, 2, 2, 1]


@pytest.mark.parametrize("kind", ["shuffled", "preshuffled", "time", "contiguous"])
def test_units_cover_a_block_and_keep_to_their_readers(kind):
    o = order([100, 60, 300], kind=kind, shards=1 if kind == "contiguous" else 4, batch_size=8, shuffle_rows=80)
    ordered, shards = o.epoch(0), range(1) if kind == "contiguous" else range(0, 3)
    units = [ordered.units(shards, block, 2, 10) for block in range(o.num_blocks)]
    assert len({len(found) for found in units[:-1]}) == 1 and len(units[-1]) <= len(units[0])
    for block, found in enumerate(units):
        covered = [(c, step) for unit in found for c in unit.shards for step in range(unit.first, unit.stop)]
        assert sorted(covered) == [(c, step) for c in shards for step in o.block_steps(block)]
    for index in range(len(units[0])):  # what a reader goes through never comes back to an earlier row
        for stream in range(len(ordered.segments(units[0][index]))):
            passed = [s for found in units if index < len(found) for s in ordered.segments(found[index])[stream]]
            last = {}
            for position, segment in enumerate(passed):
                before = last.get(segment.row_group)
                assert before is None or (before[0] == position - 1 and before[1] <= segment.start)
                last[segment.row_group] = (position, segment.stop)


def test_epochs_and_seeds_differ_and_repeat():
    def flat(epoch, seed):
        return sum(rows_by_step(order([20] * 10, seed=seed), epoch, range(4)), [])

    assert flat(0, 3) == flat(0, 3)
    assert len({tuple(flat(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9


def test_frozen_order():
    found = rows_by_step(order([3, 4, 5], shards=2, batch_size=4), 0, range(2))
    assert found == [[0, 4, 9, 11], [1, 5, 7, 8], [3, 2, 10, 6]]


def test_rows_shuffled_already_keep_their_order_in_row_groups_of_a_random_order():
    rows = [rows_by_step(order([6] * 40, kind="preshuffled", shuffle_rows=24), epoch, range(4)) for epoch in range(3)]
    assert rows == [
        rows_by_step(order([6] * 40, kind="preshuffled", shuffle_rows=100), epoch, range(4)) for epoch in range(3)
    ]
    for steps in rows:
        shards = [[row for step in steps for row in step[2 * shard : 2 * shard + 2]] for shard in range(4)]
        assert sorted(sum(shards, [])) == list(range(240))
        assert all(row % 6 == index % 6 for shard in shards for index, row in enumerate(shard))
        firsts = [row // 6 for shard in shards for row in shard[::6]]
        assert sorted(firsts) == list(range(40)) != firsts
    assert rows[0] != rows[1] != rows[2]


def test_turns_are_the_same_rows():
    o = order([50, 37], kind="preshuffled", shards=4, batch_size=8, shuffle_rows=16)
    ordered, seen = o.epoch(1), set()
    for block in range(o.num_blocks):
        for unit in ordered.units(range(4), block, 1, 1 << 16):
            turns = ordered.turns(unit)
            seen.add(turns is None)
            if turns is not None:
                by_shard = np.arange(ordered.ends(unit)[-1]).reshape(turns)
                assert np.array_equal(by_shard.swapaxes(0, 1).ravel(), ordered.rows(unit))
    assert seen == {True, False}
    assert order([50]).epoch(0).turns(order([50]).epoch(0).units(range(4), 0, 1, 99)[0]) is None


@pytest.mark.parametrize(("row_groups", "shuffle_rows"), [([5] * 400, 400), ([2000], 2000)])
def test_shuffling_mixes(row_groups, shuffle_rows):
    rows = sum(rows_by_step(order(row_groups, shards=4, batch_size=8, shuffle_rows=shuffle_rows), 1, range(1)), [])
    neighbours = np.abs(np.diff(rows))
    assert np.mean(neighbours == 1) < 0.05
    if len(row_groups) > 1:  # row groups come from everywhere
        assert abs(np.corrcoef(np.arange(len(rows)), rows)[0, 1]) < 0.3
        assert np.ptp(rows) > 1500
    else:  # a block is as large as the shard
        assert abs(np.corrcoef(np.arange(len(rows)), rows)[0, 1]) < 0.15


def test_blocks_are_whole_steps_within_the_buffer():
    o = order([1000] * 9, shards=4, batch_size=40, shuffle_rows=100)
    assert (o.rows_per_step, o.steps_per_block, o.steps_per_epoch, o.num_blocks) == (10, 3, 225, 75)
    assert o.block_steps(0) == range(3) and o.block_steps(74) == range(222, 225)
    assert o.shard_range(0, 0, 3) == (0, 30) and o.shard_range(1, 222, 225) == (2250 + 2220, 4500)
    rows = rows_by_step(o, 0, range(1))
    ordered = o.epoch(0)
    for block in (0, 40):  # a block's rows stay in it
        unit = ordered.units(range(1), block, 1, 1)[0]
        starts = np.cumsum(o.row_groups) - o.row_groups
        there = [starts[s.row_group] + i for s in ordered.segments(unit)[0] for i in range(s.start, s.stop)]
        assert sorted(sum((rows[step] for step in o.block_steps(block)), [])) == sorted(there)


@pytest.mark.parametrize("kind", ["shuffled", "preshuffled", "contiguous"])
def test_rest_is_what_later_blocks_take(kind):
    o = order([30, 50, 20], kind=kind, shards=2, batch_size=4, shuffle_rows=12)
    ordered = o.epoch(0)
    for block in (0, 3):
        for shards in [range(0, 1), range(1, 2), *([] if kind == "contiguous" else [range(2)])]:
            expected = [set() for _ in range(3)]
            for later in range(block, o.num_blocks):
                for unit in ordered.units(shards, later, 1, 1):
                    for segment in (s for stream in ordered.segments(unit) for s in stream):
                        expected[segment.row_group] |= set(range(segment.start, segment.stop))
            for row_group in range(3):
                rest = ordered.rest(row_group, shards, block)
                assert [i for s in rest for i in range(s.start, s.stop)] == sorted(expected[row_group])


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="10 rows cannot be shared by 4 logical shards"):
        order([5], batch_size=10)
    with pytest.raises(ValueError, match="seed is -1"):
        order([5], seed=-1)
