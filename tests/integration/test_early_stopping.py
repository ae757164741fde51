"""Early stopping and plateaus through the program: on two ranks, interrupted at the step of an evaluation, and scored again."""

import json

import pytest
import torch

from tests.helpers import tiny, warm
from trainer.checkpoint import Reader

# A rate so high that valid gets worse soon; a reduction on the way; FTRL's tables change their rate with it. With state of
# every other kind: averages of the dense parameters, statistics of batch normalisation.
OVERRIDES = (
    "model=wide_deep",
    "model={hidden_units: [16], normalization: batch, dropout: 0.1}",
    "optim.dense.ema_decay=0.8",
    "optim.tables={name: adagrad, lr: 0.5, schedule: {warmup_steps: 6, decay: cosine}}",
    "optim.wide={name: ftrl, lr: 0.5, beta: 1e-3, l1: 1e-4}",
    "epochs=6",
    "evaluation.every_steps=4",
    "early_stopping={patience: 3}",
    "optim.plateau={factor: 0.5, patience: 2}",
    "data.probability=null",
    "log_every_steps=1",
)


def read(path):
    return json.loads(path.read_text())


def lines(run, split):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


@pytest.fixture(scope="module")
def stopped(click_log, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "stopped"
    done = tiny.train(2, click_log, run, *OVERRIDES)
    assert done.returncode == 0, done.stderr
    return run


def test_training_stops_and_the_best_checkpoint_is_what_is_tested(stopped, click_log, tmp_path):
    final, status = read(stopped / "metrics.json"), read(stopped / "status.json")
    evaluations = [(line["step"], line["auc"]) for line in lines(stopped, "valid")]
    best_step, best = max(evaluations, key=lambda pair: pair[1])
    step = final["train"]["step"]
    assert step == best_step + 3 * 4 < 6 * 13
    selected = final["selected"]
    assert (selected["best_step"], selected["value"], selected["metric"]) == (best_step, best, "valid.auc")
    assert "did not improve" in selected["stopped"]
    assert final["valid"]["auc"] == best
    assert lines(stopped, "test")[0]["step"] == best_step
    assert (status["state"], status["step"], status["best_step"]) == ("finished", step, best_step)
    assert status["stopped"] == selected["stopped"]
    # Evaluated by itself, the run is the best checkpoint, too, and the last one where that is asked for.
    for more, same in (((), True), (("--checkpoint", f"step-{step}"), False)):
        output = tmp_path / "evaluated.json"
        done = warm.run(1, "trainer.evaluate", [stopped, *more, "--output", output])
        assert done.returncode == 0, done.stderr
        assert (abs(read(output)["test"]["auc"] - final["test"]["auc"]) < 1e-6) is same


def test_a_run_cut_where_it_evaluates_stops_as_the_whole_one_bit_by_bit(stopped, click_log, tmp_path):
    run, last = tmp_path / "run", read(stopped / "metrics.json")["train"]["step"]
    cut = last - 8  # an evaluation without improvement, and one that reduced the rates
    part = ("debug.ledger=false", "checkpoint.every_steps=4")
    # Ended by its own number of steps, a run would have another schedule: killed instead.
    arguments = tiny.arguments(click_log, f"run.dir={run}", *OVERRIDES, *part, "checkpoint.asynchronous=false")
    done = tiny.torchrun(2, "tests.helpers.killed", cut + 2, *arguments)
    assert done.returncode == -9, done.stderr
    done = tiny.train(2, click_log, run, *OVERRIDES, *part)
    assert done.returncode == 0, done.stderr
    assert f"step {cut}" in done.stderr
    whole, resumed = read(stopped / "metrics.json"), read(run / "metrics.json")
    assert resumed["selected"] == whole["selected"] and resumed["train"]["step"] == last
    for split in ("valid", "test"):
        assert resumed[split]["logloss"] == whole[split]["logloss"]
    mine, theirs = (Reader(folder / "checkpoints" / f"step-{last}") for folder in (run, stopped))
    assert mine.names == theirs.names
    assert {"average", "dense", "tables"} < {name.split("/")[0] for name in theirs.names}
    for name in theirs.names:
        if name.startswith("metrics/"):
            continue  # sums of ranks, which a resumed run adds up in another order
        assert torch.equal(mine.read(name), theirs.read(name)), name
    facts = [read(folder / "checkpoints" / f"step-{last}" / "state.json") for folder in (run, stopped)]
    assert facts[0]["judge"] == facts[1]["judge"] and facts[0]["rate_reduction"] == facts[1]["rate_reduction"] < 1
    again = tiny.train(2, click_log, run, *OVERRIDES)  # stopped already: nothing to train, the same result
    assert again.returncode == 0, again.stderr
    assert read(run / "metrics.json")["selected"] == whole["selected"]
    assert read(run / "metrics.json")["test"]["auc"] == whole["test"]["auc"]
