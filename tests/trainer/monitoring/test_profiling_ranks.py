"""Profiled jobs on two ranks: the parts sum to the step, a slow reader shows as input wait, nothing else changes."""

import gzip
import json

import pytest

from tests.helpers import tiny
from trainer.checkpoint import Reader
from trainer.monitoring.profiling.parts import PARTS, analyse

SLEEP = 0.05  # seconds that the reader takes over each batch
# DIN with Dice and dropped rows: lookups of both kinds, and collectives in forward, backward and loss.
JOB = (
    "model=din",
    "data.valid=[]",
    "data.test=[]",
    "data.probability=null",
    "data.schema.features.item_id.on_out_of_range=drop",
    "checkpoint.asynchronous=false",
)


def trained(run, log, *overrides):
    done = tiny.train(2, log, run, *JOB, *overrides)
    assert done.returncode == 0, done.stderr
    return done.stderr


def summary_of(run):
    return json.loads((run / "profile" / "summary.json").read_text())


@pytest.fixture(scope="module")
def runs(click_log, tmp_path_factory):
    """A run, the same profiled, with a slow reader, and the latter going on for a second epoch on another rank's terms."""
    folder, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    trained(folder / "plain", click_log)
    with patch.context() as slow:
        slow.setenv("TRAINER_FAULTS", f"phase=reader,action=sleep={SLEEP}")
        told = trained(
            folder / "slow", click_log, "profile=true", "profiling.after_steps=5", "profiling.steps=4",
            "profiling.ranks=[0,1]",
        )  # fmt: skip
        first = summary_of(folder / "slow")
        text = (folder / "slow" / "profile" / "summary.txt").read_text()
    more = ("epochs=2", "profile=true", "profiling.after_steps=2", "profiling.steps=1", "profiling.ranks=[1]")
    trained(folder / "slow", click_log, *more)
    return folder, told, text, first, summary_of(folder / "slow")


def test_a_profiled_run_is_bit_for_bit_the_same(runs):
    plain, profiled = (Reader(runs[0] / name / "checkpoints" / "step-13") for name in ("plain", "slow"))
    assert set(profiled.names) == set(plain.names)
    for name in plain.names:
        assert profiled.read(name).equal(plain.read(name)), name


def test_parts_of_a_real_step_sum_to_what_the_clock_says(runs):
    _, _, _, first, resumed = runs
    for rank in (*first["ranks"].values(), *resumed["ranks"].values()):
        assert tuple(rank["parts_ms"]) == PARTS and min(rank["parts_ms"].values()) >= 0
        assert sum(rank["parts_ms"].values()) == pytest.approx(rank["wall_ms"], rel=0.1)
        assert rank["parts_ms"]["other"] < 0.5 * rank["step_ms"]
        for part in ("input_dist", "lookup", "dense_forward", "backward", "table_update", "optimizer", "comms"):
            assert rank["parts_ms"][part] > 0, part


def test_a_slow_reader_shows_as_input_wait_and_only_there(runs):
    _, _, _, first, resumed = runs
    for rank in first["ranks"].values():
        assert rank["steps"] == 4
        assert 1e3 * SLEEP <= rank["parts_ms"]["input_wait"] < 2e3 * SLEEP
    assert resumed["ranks"]["1"]["parts_ms"]["input_wait"] < 1e3 * SLEEP / 2


def test_a_window_counts_from_the_first_step_of_its_process(runs):
    _, _, _, first, resumed = runs
    assert (first["first_step"], first["last_step"], list(first["ranks"])) == (6, 9, ["0", "1"])
    assert (resumed["first_step"], resumed["last_step"], list(resumed["ranks"])) == (16, 16, ["1"])
    assert first["unprofiled_step_ms"] > 1e3 * SLEEP and resumed["unprofiled_step_ms"] is None


def test_each_rank_leaves_a_trace_and_the_first_one_the_answer(runs):
    folder, told, text, first, _ = runs
    assert text in told and "Where a step goes, of steps 6 to 9" in text
    names = {path.name for path in (folder / "slow" / "profile").iterdir()}
    assert names == {"rank-0.json.gz", "rank-1.json.gz", "summary.json", "summary.txt"}
    with gzip.open(folder / "slow" / "profile" / "rank-0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert analyse(events).parts_ms == pytest.approx(first["ranks"]["0"]["parts_ms"])
    assert not (folder / "plain" / "profile").exists()
