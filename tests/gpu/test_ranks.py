"""Two cards and more: sharding types, and ranks that die, hang or compute no number."""

import json

import pytest
import torch

from tests.gpu.programs import LINEAR, losses, tensors, train, trained

pytestmark = pytest.mark.two_cards
ROUNDING = 1e-5  # as on one card: sums in another order


@pytest.fixture(scope="module")
def one_card(click_log, tmp_path_factory):
    run = trained(click_log, tmp_path_factory.mktemp("one") / "run", *LINEAR)
    return losses(run), tensors(run)


@pytest.mark.parametrize(
    "sharding",
    [
        ("sharding.types=[table_wise]",),
        ("sharding.types=[row_wise]",),
        ("sharding.types=[data_parallel]",),
        ("sharding.types=[table_wise,row_wise]",),
    ],
    ids=lambda sharding: sharding[0].partition("[")[2].rstrip("]"),
)
def test_two_cards_learn_what_one_does_however_tables_are_sharded(sharding, one_card, click_log, tmp_path):
    run = trained(click_log, tmp_path / "run", *LINEAR, *sharding, ranks=2)
    expected_losses, expected = one_card
    assert losses(run) == pytest.approx(expected_losses, abs=ROUNDING)
    for name, value in tensors(run).items():
        if name.startswith(("tables/", "dense/")):
            torch.testing.assert_close(value, expected[name], rtol=0, atol=ROUNDING, msg=name)


def test_a_killed_rank_is_made_up_for_by_a_restart(click_log, tmp_path):
    options = ("model=deepfm", "model.hidden_units=[16]", "checkpoint.every_steps=4", "checkpoint.asynchronous=false")
    kill = "rank=1,step=6,attempt=0,phase=forward,action=kill9"
    killed = trained(click_log, tmp_path / "killed", *options, ranks=2, faults=kill, restarts=1)
    whole = trained(click_log, tmp_path / "whole", *options, ranks=2)
    found, expected = tensors(killed), tensors(whole)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_a_rank_that_hangs_is_named_and_the_job_ends(click_log, tmp_path):
    hang = "rank=1,step=6,phase=reader,action=sleep=99999"
    done = train(click_log, tmp_path / "run", "model=deepfm", "hang_timeout_seconds=5", ranks=2, faults=hang)
    assert done.returncode != 0 and "rank 1" in done.stderr and "hangs" in done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_a_loss_that_is_no_number_on_one_rank_ends_all_before_a_table_is_touched(click_log, tmp_path):
    nan = "rank=1,step=6,phase=forward,action=nan"
    done = train(click_log, tmp_path / "run", "model=deepfm", ranks=2, faults=nan)
    assert done.returncode != 0 and "the loss of step 6 is nan" in done.stderr
