"""What a checkpoint says of itself, and when a run may go on from it. (Tensors: tests/trainer/checkpoint.)"""

import dataclasses

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.training_files import commit, scan
from trainer.checkpoint import check_identity, clean, committed, read_facts, read_text, write_commit_files
from trainer.run.resume import job_identity, resumable, starting_point
from trainer.run.training_files import TrainingFiles
from trainer.runtime.rendezvous import process_group


@pytest.fixture
def saved(tmp_path, log):
    return commit(tmp_path / "run", TrainingFiles(scan(log), 0, {}), step=5, epoch_step=5)


@pytest.fixture
def alone():
    with process_group(torch.device("cpu"), 60) as ranks:
        yield ranks


def test_texts_are_held_against_the_manifest(saved):
    assert read_facts(saved)["progress"] == {"step": 5, "rows": 0, "epoch": 0, "epoch_step": 5}
    (saved / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step-5: state.json differs from MANIFEST.json"):
        read_facts(saved)
    (saved / "data.json").unlink()
    with pytest.raises(ValueError, match=r"step-5 cannot be read.*data.json"):
        read_text(saved, "data.json")
    with pytest.raises(ValueError, match=r"step-5 has no other.txt"):
        read_text(saved, "other.txt")
    (saved / "MANIFEST.json").write_text("{")
    with pytest.raises(ValueError, match=r"step-5 cannot be read"):
        read_facts(saved)


def test_every_setting_that_differs_is_named(saved):
    before = {"seed": 1, "stream": {"shards": 12, "shuffle": True}, "order": 2}
    check_identity(saved, before, {"seed": 1, "stream": {"shards": 12, "shuffle": True}, "order": 2})
    with pytest.raises(ValueError) as error:
        check_identity(saved, before, {"seed": 2, "stream": {"shards": 24, "shuffle": True}, "order": 2})
    assert "seed: was 1, is 2" in str(error.value) and "shards was 12, is 24" in str(error.value)
    assert "shuffle" not in str(error.value) and "another run.dir" in str(error.value)


def test_cleaning_takes_away_only_what_saves_left_behind(saved):
    folder = saved.parent
    for name in (".tmp-step-6-0123abcd", ".trash-step-3-0123abcd", ".tmp-mine", "step-x"):
        (folder / name).mkdir()
    (folder / ".trash-step-9-0123abcd").symlink_to(saved)
    clean(folder)
    left = {path.name for path in folder.iterdir()}
    assert left == {"step-5", ".tmp-mine", "step-x", ".trash-step-9-0123abcd"}
    assert committed(folder) == [saved] and (saved / "data.json").exists()


def identity_of(saved, **changes):
    """Writes the identity of a tiny job into a checkpoint; returns the job's configuration."""
    composed = tiny.job(saved.parents[2] / "log")
    job = job_identity(composed.config, composed.tree)
    facts, data = {**read_facts(saved), "identity": job}, read_text(saved, "data.json")
    write_commit_files(saved, [], facts, {"data.json": data})
    return dataclasses.replace(composed.config, **changes), job


def test_a_run_goes_on_from_the_newest_whole_checkpoint_of_its_own_job(saved, log, alone):
    config, job = identity_of(saved)
    found = resumable(config, saved.parent, job, alone)
    assert found.path == saved and found.progress.step == 5 and found.rows_left == 0
    assert starting_point(found, found.inputs) == found.progress
    later = starting_point(found, dataclasses.replace(found.inputs, first_epoch=1))
    assert (later.step, later.epoch, later.epoch_step) == (5, 1, 0)
    with pytest.raises(ValueError, match="seed: was 1, is 3"):
        resumable(config, saved.parent, {**job, "seed": 3}, alone)
    (saved / "data.json").write_text("{}")
    assert resumable(config, saved.parent, job, alone) is None


def test_a_run_from_scratch_does_not_mix_with_checkpoints(saved, alone):
    config, job = identity_of(saved, resume="never")
    with pytest.raises(ValueError, match=r"resume=never, but .* holds step-5.*another run.dir"):
        resumable(config, saved.parent, job, alone)
    saved.rename(saved.parents[2] / "elsewhere")
    assert resumable(config, saved.parent, job, alone) is None
