"""Jobs on one card: resuming, checkpoints across devices, snapshots taken while training goes on, and where a step waits."""

import pytest
import torch

from tests.gpu.programs import LINEAR, losses, tensors, train, trained
from tests.helpers import tiny

LAST, STOP = 26, 7
ROUNDING = 1e-5  # of float32 sums in another order over 26 steps of SGD
STATEFUL = ("model.hidden_units=[16]", "model.dropout=0.2")
ALLOWED = tiny.REPOSITORY / "tests" / "gpu" / "allowed_syncs.txt"


def same(found, expected):
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


@pytest.mark.parametrize("overrides", [("model=deepfm",), ("model=wide_deep",), ("model=din", "deterministic=true")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(overrides, click_log, tmp_path):
    """DIN adds up the gradients of repeated ids atomically, and so in any order, unless it is asked not to."""
    own = (*overrides, *STATEFUL) if "model=din" not in overrides else overrides
    whole = trained(click_log, tmp_path / "whole", *own)
    halves = trained(click_log, tmp_path / "halves", *own, f"steps={STOP}")
    trained(click_log, halves, *own)
    assert same(tensors(halves), tensors(whole)) == []
    assert losses(halves)[-1] == losses(whole)[-1]


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_of_one_device_goes_on_on_the_other(devices, click_log, tmp_path):
    run = tmp_path / "run"
    trained(click_log, run, *LINEAR, f"steps={STOP}", device=devices[0])
    trained(click_log, run, *LINEAR, device=devices[1])
    expected = tensors(trained(click_log, tmp_path / "cpu", *LINEAR, device="cpu"))
    for name, value in tensors(run).items():
        if not name.startswith("metrics/"):  # a row near the edge of a bin may fall into the next one
            torch.testing.assert_close(value, expected[name], rtol=0, atol=ROUNDING, msg=name)


def test_a_snapshot_taken_while_training_goes_on_is_a_synchronous_one(click_log, tmp_path):
    options = ("model=deepfm", *STATEFUL, "checkpoint.every_steps=4", "checkpoint.keep=9", "optim.tables.name=adagrad")
    during = trained(click_log, tmp_path / "during", *options, "checkpoint.asynchronous=true")
    waiting = trained(click_log, tmp_path / "waiting", *options, "checkpoint.asynchronous=false")
    steps = sorted(int(path.name.removeprefix("step-")) for path in (during / "checkpoints").glob("step-*"))
    assert len(steps) > 1 and steps[-1] == LAST
    for step in steps:
        if (waiting / "checkpoints" / f"step-{step}").exists():
            assert same(tensors(during, step), tensors(waiting, step)) == [], step


@pytest.mark.parametrize("model", ["wide_deep", "deepfm", "din"])
def test_a_step_waits_for_the_card_only_where_it_is_meant(model, click_log, tmp_path):
    done = train(click_log, tmp_path / "run", f"model={model}", f"steps={STOP}", module="tests.gpu.syncing")
    assert done.returncode == 0, done.stderr[-4000:]
    waits = {line.removeprefix("WAITS ") for line in done.stdout.splitlines() if line.startswith("WAITS ")}
    lines = [line.partition("#")[0].strip() for line in ALLOWED.read_text().splitlines()]
    allowed = {line for line in lines if line}
    assert {wait for wait in waits if not {wait, wait.partition(":")[0]} & allowed} == set()
