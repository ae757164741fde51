"""Two ranks save to an object store and load from it; and a whole job does, is killed, and goes on bit by bit."""

import json

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.jobs import ranks_of
from tests.helpers.object_store import BUCKET, serve
from tests.helpers.ranks import run_distributed
from tests.helpers.saving import Part, table
from trainer.checkpoint import Reader, committed, newest, parse, place_of, read_best, verify
from trainer.checkpoint import save as save_module
from trainer.checkpoint.__main__ import main
from trainer.checkpoint.loading import load
from trainer.checkpoint.saving import Checkpoints
from trainer.checkpoint.verification import newest_whole
from trainer.config.checkpoint import CheckpointConfig
from trainer.runtime.progress import Progress


@pytest.fixture(scope="module")
def options():
    with serve() as (found, _):
        yield found


def saves_and_loads(rank, world_size, address):
    folder, ranks, part = parse(address), ranks_of(rank, world_size), Part(1.0, ranks_of(rank, world_size))

    def newest():
        return newest_whole(folder, "fallback", ranks)

    config = CheckpointConfig(best="valid.auc")
    checkpoints = Checkpoints(folder, config, part, {"seed": 1}, ranks, texts={"data.json": "{}"})
    for step, auc in enumerate((0.6, 0.9, 0.7, 0.8), 1):
        part.fill(float(step))
        checkpoints.consider(Progress(step=step), "valid", {"auc": auc})
        path = checkpoints.save(Progress(step=step))
        assert path == folder / f"step-{step}"
    torch.distributed.barrier()
    assert [it.name for it in committed(folder)] == ["step-4", "step-3", "step-2"] and read_best(folder)["step"] == 2
    assert verify(path) is None and table(path) == [4.0, 4.0]

    fresh = Part(0.0, ranks)
    facts = load(newest(), fresh, ranks)
    assert newest() == path and facts["world_size"] == 2
    again = Checkpoints(folder, config, fresh, {"seed": 1}, ranks, saved_step=4)
    assert facts["progress"]["step"] == 4 and fresh.row.tolist() == [[4.0] * 4] and fresh.dense.tolist() == [4.0] * 3

    real = save_module.write_pieces
    if rank == 1:

        def failing(*arguments):
            raise OSError("the network is down")

        save_module.write_pieces = failing
    with pytest.raises(OSError, match="step-5 could not be written to s3://.*rank 1: the network is down"):
        again.save(Progress(step=5))
    save_module.write_pieces = real
    torch.distributed.barrier()
    assert not place_of(folder).sizes(folder / "step-5") and newest() == path  # nothing of it stays
    torch.distributed.barrier()

    if ranks.is_first:
        place_of(folder).write(path / "state.json", "{")
    torch.distributed.barrier()
    assert newest() == folder / "step-3"  # a damaged one does not stand in the way of a whole one of its step
    fresh.fill(7.0)
    Checkpoints(folder, config, fresh, {"seed": 1}, ranks).save(Progress(step=4))
    torch.distributed.barrier()
    assert newest() == path and table(path) == [7.0, 7.0]


def test_two_ranks_save_and_load(options):
    run_distributed(saves_and_loads, 2, f"s3://{BUCKET}/two ranks/run?{options}")


JOB = ("model=deepfm", "epochs=1", "checkpoint.every_steps=4", "evaluation.every_steps=6")


def test_a_bucket_that_is_not_there_is_one_line_before_training(click_log, tmp_path, options):
    done = tiny.train(1, click_log, tmp_path / "run", *JOB, f'checkpoint.root="s3://nobody/x?{options}"')
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "checkpoint.root: s3://nobody/x/run cannot be written" in lines[0]


def test_a_job_that_is_killed_goes_on_from_the_store_bit_by_bit(click_log, tmp_path, options, monkeypatch, capsys):
    there = f"s3://{BUCKET}/jobs?{options}"
    here, run = tmp_path / "undisturbed", tmp_path / "run"
    done = tiny.train(1, click_log, here, *JOB)
    assert done.returncode == 0, done.stderr
    stored = (*JOB, f'checkpoint.root="{there}"')
    folder = parse(there) / "run"

    monkeypatch.setenv("TRAINER_FAULTS", "step=8,phase=before_manifest,action=kill9")
    assert tiny.train(1, click_log, run, *stored).returncode == -9
    monkeypatch.delenv("TRAINER_FAULTS")
    assert [path.name for path in committed(folder)] == ["step-4"]
    torn = set(place_of(folder).sizes(folder / "step-8"))
    assert torn  # of the killed one, not committed
    done = tiny.train(1, click_log, run, *stored)
    assert done.returncode == 0, done.stderr
    assert f"Resumed from {folder}/step-4: step 4" in done.stderr
    assert [path.name for path in committed(folder)] == ["step-13", "step-12"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["elsewhere.txt"]
    found, expected = Reader(newest(folder)), Reader(newest(here / "checkpoints"))
    assert found.names == expected.names
    for name in found.names:
        assert torch.equal(found.read(name), expected.read(name)), name

    # The run's folder leads there.
    assert main(["inspect", "--json", str(run)]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["progress"]["step"] == 13
