"""The program as a user runs it: torchrun on two ranks, a run folder, resuming, evaluating, predicting, mistakes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import log_loss, roc_auc_score

from tests.helpers import tiny, warm

REPOSITORY = Path(__file__).resolve().parents[2]


def train(ranks, root, run, *overrides):
    return tiny.torchrun(ranks, "trainer.train", *tiny.arguments(root, f"run.dir={run}", *overrides))


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def trained(click_log, tmp_path_factory):
    """DIN on two ranks for two epochs, checkpoints on the way."""
    run = tmp_path_factory.mktemp("runs") / "din"
    overrides = ("model=din", "epochs=2", "checkpoint.every_steps=8", "log_every_steps=5", "evaluation.every_steps=10")
    done = train(2, click_log, run, *overrides)
    assert done.returncode == 0, done.stderr
    return run, overrides, done


def test_the_run_folder_and_the_final_table(trained):
    run, _, done = trained
    assert {p.name for p in run.iterdir() if p.name[0] != "."} >= {
        "config.yaml",
        "plan.json",
        "metrics.jsonl",
        "metrics.json",
        "status.json",
        "checkpoints",
    }
    final = read(run / "metrics.json")
    for split, rows in tiny.ROWS.items():
        assert final[split]["rows"] == rows
        assert {"auc", "logloss", "ne", "calibration", "rows", "samples_per_second"} <= set(final[split])
    assert 0.5 < final["test"]["auc"] <= 1
    assert final["train"]["rows_trained"] == 2 * tiny.ROWS["train"] and final["train"]["step"] == 26
    assert 0 <= final["train"]["input_wait_fraction"] <= 1
    assert read(run / "status.json")["state"] == "finished"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [5, 10, 15, 20, 25]
    assert [line["step"] for line in lines if line["split"] == "valid"] == [10, 20, 26]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-24", "step-26"]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["name"] == "din"
    tables = {row["table"] for row in read(run / "plan.json")}
    assert tables == {"user", "item", "category", "hour", "tag"}
    for shown in (
        "rows trained",
        "samples/s",
        "test AUC",
        "best possible",
        "clicktrainer evaluate",
        str(run.name),
    ):
        assert shown in done.stdout
    assert "Sharding plan" in done.stderr


def test_a_killed_run_resumes_to_the_same_metrics(trained, click_log, tmp_path):
    run, overrides, _ = trained
    part = tmp_path / "part"
    assert train(2, click_log, part, *overrides, "steps=16").returncode == 0
    shutil.copytree(part / "checkpoints" / "step-16", part / "checkpoints" / ".tmp-step-20-0123abcd")
    torn = part / "checkpoints" / "step-18"
    shutil.copytree(part / "checkpoints" / "step-16", torn)
    tensors = next(torn.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    done = train(2, click_log, part, *overrides)
    assert done.returncode == 0, done.stderr
    assert "step 16" in done.stderr and "passed over" in done.stderr
    assert not (part / "checkpoints" / ".tmp-step-20-0123abcd").exists()
    whole, resumed = read(run / "metrics.json"), read(part / "metrics.json")
    for split in ("valid", "test"):
        for name in ("auc", "logloss", "calibration"):
            assert resumed[split][name] == whole[split][name]
    changed = tiny.train(2, click_log, part, *overrides, "seed=5")
    assert changed.returncode != 0 and "seed: was 1, is 5" in changed.stderr
    assert yaml.safe_load((part / "config.yaml").read_text())["seed"] == 1
    again = tiny.train(2, click_log, part, *overrides)  # finished already: nothing to train, the same result
    assert again.returncode == 0, again.stderr
    assert read(part / "metrics.json")["test"]["auc"] == whole["test"]["auc"]


def test_evaluate_gives_the_same_numbers_on_1_2_and_3_ranks(trained, click_log, tmp_path):
    run, _, _ = trained
    expected = read(run / "metrics.json")["test"]
    for ranks in (1, 2, 3):
        output = tmp_path / f"{ranks}.json"
        done = warm.run(ranks, "trainer.evaluate", [run, "--output", output, "evaluation.batch_size=240"])
        assert done.returncode == 0, done.stderr
        values = read(output)["test"]
        assert values["rows"] == expected["rows"]
        for name in ("auc", "logloss", "ne", "calibration"):
            assert values[name] == pytest.approx(expected[name], abs=1e-6)


def test_predictions_keep_the_order_of_rows(trained, click_log, tmp_path):
    run, _, _ = trained
    outputs = {}
    for ranks in (1, 2):
        path = tmp_path / f"{ranks}" / "predictions.parquet"
        arguments = [run, "--input", click_log / "test", "--output", path, "--keep", "label", "user_id"]
        done = (
            tiny.torchrun(2, "trainer.predict", *arguments) if ranks == 2 else warm.run(0, "trainer.predict", arguments)
        )
        assert done.returncode == 0, done.stderr
        outputs[ranks] = pq.read_table(path)
        assert [p.name for p in path.parent.iterdir()] == ["predictions.parquet"]
    source = pq.read_table(click_log / "test")
    for table in outputs.values():
        assert table["user_id"].to_pylist() == source["user_id"].to_pylist()
        assert table.num_rows == tiny.ROWS["test"]
    one, two = (outputs[n]["prediction"].to_numpy() for n in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-6)
    labels, test = source["label"].to_numpy(), read(run / "metrics.json")["test"]
    assert roc_auc_score(labels, one) == pytest.approx(test["auc"], abs=test["auc_error_bound"] + 1e-4)
    assert log_loss(labels, one.astype(np.float64)) == pytest.approx(test["logloss"], abs=1e-5)


@pytest.mark.parametrize(
    ("start", "overrides", "expected"),
    [
        (train, ["model=depfm"], "did you mean deepfm"),
        (tiny.train, ["data.train=[absent]"], "absent"),
        (tiny.train, ["device=cuda"], "device=cuda"),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback_of_ours(start, overrides, expected, click_log, tmp_path):
    done = start(2, click_log, tmp_path / "run", *overrides)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and expected in lines[0], done.stderr
    own = done.stderr.split("torch/distributed/run.py")[0]
    assert "Traceback" not in own.split("error: ")[0]


def test_two_runs_do_not_share_a_folder(trained, click_log, tmp_path):
    from trainer.runtime.run_folder import lock

    (tmp_path / "run").mkdir()
    held = lock(tmp_path / "run")
    done = tiny.train(1, click_log, tmp_path / "run")
    held.close()
    assert done.returncode != 0 and f"is in use by pid {os.getpid()}" in done.stderr
