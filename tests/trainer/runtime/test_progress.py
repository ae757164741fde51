"""How many steps a run has, wherever it stands, also where epochs differ in length; and who can share its shards."""

import pytest

from data_loaders.batch import Cursor
from tests.helpers import tiny
from trainer.runtime.progress import Progress


@pytest.mark.parametrize("steps", [None, 4, 9, 1000])
def test_a_run_has_the_same_number_of_steps_wherever_it_stands(steps):
    progress = Progress()
    for epoch in range(3):
        for step in range(5):
            assert progress.total_steps(3, 5, steps) == min(steps or 15, 15)
            progress.advance(Cursor(epoch, step + 1, 10, 10))
    assert progress == Progress(15, 150, 2, 5)


def test_an_epoch_may_be_longer_than_the_last_one():
    progress = Progress(step=5, rows=50, epoch=0, epoch_step=5)
    progress.begin_epoch()
    assert progress == Progress(5, 50, 1, 0)
    assert progress.total_steps(3, 8, None) == 5 + 2 * 8
    progress.advance(Cursor(1, 1, 10, 10))
    assert progress.total_steps(3, 8, None) == 5 + 2 * 8
    assert progress.total_steps(1, 8, None) <= progress.step  # fewer epochs than it has begun: nothing left


def test_the_state_is_read_back_whole_or_not_at_all():
    progress = Progress(3, 30, 1, 2)
    again = Progress()
    again.load_state_dict(progress.state_dict())
    assert again == progress
    with pytest.raises(ValueError, match="progress has keys"):
        again.load_state_dict({"step": 1})


@pytest.mark.parametrize(("shards", "batch_size", "world_size"), [(64, 256, 3), (12, 240, 12), (1, 240, 1)])
def test_every_rank_has_a_shard(tmp_path, shards, batch_size, world_size):
    sharded(tmp_path, shards, batch_size).check_world_size(world_size)


@pytest.mark.parametrize(
    ("shards", "batch_size", "world_size", "works"),
    [(2, 240, 7, (8, 240)), (2, 240, 200, (240, 240)), (4, 8, 9, (9, 9))],
)
def test_more_ranks_than_shards_hear_what_works(tmp_path, shards, batch_size, world_size, works):
    with pytest.raises(ValueError) as error:
        sharded(tmp_path, shards, batch_size).check_world_size(world_size)
    assert f"at most {shards} ranks" in str(error.value)
    assert f"data.stream.shards={works[0]}" in str(error.value) and f"batch_size={works[1]}" in str(error.value)
    sharded(tmp_path, *works).check_world_size(world_size)


def sharded(root, shards, batch_size):
    return tiny.job(root, f"data.stream.shards={shards}", f"batch_size={batch_size}").config
