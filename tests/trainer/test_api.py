"""The library as a notebook uses it: the same numbers as the command line, and a process that is found again as it was."""

import _thread
import json
import os
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

import trainer
from data_loaders.errors import UserError
from tests.helpers import tiny, warm
from trainer import Run, Scorer, compose, train
from trainer.monitoring.metrics_logger import MetricsLogger

OPTIONS = ["data=tiny", "model=deepfm", "batch_size=240", *tiny.FP32, "epochs=1"]


def job(root, run, *more):
    return compose([*OPTIONS, f"data.root={root}", f"run.dir={run}", *more], config_dir=[tiny.CONF])


@pytest.fixture(scope="module")
def run(click_log, tmp_path_factory):
    return train(job(click_log, tmp_path_factory.mktemp("run") / "a"))


@pytest.fixture(scope="module")
def test_rows(click_log):
    return pq.read_table(click_log / "test")


def state():
    """Of this process, what a call could leave behind."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    torch_state = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state().tolist()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    threads = {thread.name for thread in threading.enumerate()}
    return (
        handlers,
        torch_state,
        deterministic,
        dict(os.environ),
        threads,
        list(warnings.filters),
        dist.is_initialized(),
    )


def test_nothing_else_is_public_and_nothing_heavy_is_loaded_before_it_is_asked_for():
    assert trainer.__all__ == ["Run", "Scorer", "compose", "train"]
    with pytest.raises(AttributeError, match="no attribute 'Sorer'"):
        _ = trainer.Sorer
    code = "import trainer, sys; assert 'torch' not in sys.modules; from trainer import Scorer, train; train([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tiny.REPOSITORY)
    assert "UserError: config is a list: give what compose([…]) returns" in done.stderr
    assert Scorer.__module__ == "trainer.serve.scorer"


@pytest.mark.slow
def test_it_trains_and_predicts_what_the_command_line_does(click_log, run, tmp_path):
    output = tmp_path / "predictions.parquet"
    overrides = ["--config-dir", tiny.CONF, *OPTIONS, f"data.root={click_log}", f"run.dir={tmp_path / 'b'}"]
    assert warm.run(0, "trainer.train", overrides).returncode == 0
    words = [tmp_path / "b", "--input", click_log / "test", "--output", output]
    assert warm.run(0, "trainer.predict", words).returncode == 0
    assert np.array_equal(pq.read_table(output)["prediction"].to_numpy(), run.predict(click_log / "test"))
    other = json.loads((tmp_path / "b" / "metrics.json").read_text())
    for split in ("train", "valid", "test"):
        assert {name: run.metrics[split][name] for name in ("auc", "logloss")} == {
            name: other[split][name] for name in ("auc", "logloss")
        }


def test_the_process_is_as_before_also_after_a_second_training_and_after_an_error(click_log, run, tmp_path):
    before = state()
    second = train(job(click_log, tmp_path / "b", "deterministic=true"))
    assert state() == before
    assert second.metrics["test"]["logloss"] == pytest.approx(run.metrics["test"]["logloss"], rel=1e-5)
    with pytest.raises(UserError, match="data.valid|nothing.parquet"):
        train(job(click_log, tmp_path / "c", "data.valid=[nothing.parquet]"))
    assert state() == before
    assert json.loads((tmp_path / "c" / "status.json").read_text())["state"] == "failed"
    train(job(click_log, tmp_path / "c", "steps=2"))  # its folder is not in use


def test_mistakes_are_exceptions_with_the_line_of_the_command(tmp_path, click_log):
    with pytest.raises(UserError, match="optim.dense.rl is not a known key"):
        job(click_log, tmp_path, "optim.dense.rl=1")
    with pytest.raises(UserError, match="'--help' is not an override"):
        compose(["--help"])
    with pytest.raises(UserError, match="give a list of texts"):
        compose("model=din")
    with pytest.raises(UserError, match="give the folder of a run"):
        Run.load(tmp_path / "nothing")


def test_an_interrupt_saves_and_the_same_job_resumes(click_log, run, tmp_path, monkeypatch):
    report = MetricsLogger.maybe_report

    def interrupted(self, progress):
        report(self, progress)
        if progress.step == 5:
            _thread.interrupt_main(signal.SIGINT)

    before = state()
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "maybe_report", interrupted)
        with pytest.raises(KeyboardInterrupt, match="resumes"):
            train(job(click_log, tmp_path / "b"))
    assert state() == before
    assert json.loads((tmp_path / "b" / "status.json").read_text())["state"] == "preempted"
    again = train(job(click_log, tmp_path / "b"))
    assert again.metrics["test"]["logloss"] == run.metrics["test"]["logloss"]


def test_it_trains_in_another_thread(click_log, tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(job(click_log, tmp_path / "b", "steps=2"))))
    thread.start()
    thread.join()
    assert found[0].metrics["train"]["step"] == 2


def test_history(run):
    history = run.history
    assert list(history.columns[:4]) == ["split", "step", "rows_trained", "epoch"]
    valid = history[history.split == "valid"]
    assert valid.auc.iloc[-1] == run.metrics["valid"]["auc"] and valid.step.iloc[-1] == 13
    assert repr(run).endswith("deepfm on tiny, finished")


def test_predictions_of_a_frame_a_table_and_files(click_log, run, test_rows):
    before = state()
    own = run.predict(click_log / "test")
    assert own.dtype == np.float32 and own.shape == (tiny.ROWS["test"],)
    assert np.array_equal(run.predict(test_rows), own)
    frame = test_rows.to_pandas().drop(columns=["label"]).assign(extra=[{1}, "a"] * (len(own) // 2))
    assert np.array_equal(run.predict(frame), own)
    assert state() == before


def test_rows_that_are_no_rows(run, test_rows):
    with pytest.raises(UserError, match="rows is a list"):
        run.predict([1, 2])
    with pytest.raises(UserError, match="price"):
        run.predict(test_rows.drop_columns(["price"]))
    frame = test_rows.slice(0, 2).to_pandas().assign(price=["a", 1.0])
    with pytest.raises(UserError, match="several types"):
        run.predict(frame)


def test_a_row_that_a_policy_leaves_out_has_no_probability(run, test_rows):
    found = run.predict(test_rows, overrides=["data.schema.features.price.on_null=drop"])
    missing = np.array([price is None for price in test_rows["price"].to_pylist()])
    assert 0 < missing.sum() < len(missing) and np.array_equal(np.isnan(found), missing)


def test_evaluation(run, test_rows):
    metrics = run.evaluate()
    assert metrics["auc"] == run.metrics["test"]["auc"]
    assert run.evaluate(test_rows)["logloss"] == metrics["logloss"]
    assert run.evaluate(test_rows.slice(0, 300))["rows"] == 300
    assert run.evaluate(split="valid")["auc"] == run.metrics["valid"]["auc"]
    with pytest.raises(UserError, match="split: 'tset' is not known; did you mean 'test'"):
        run.evaluate(split="tset")


def test_embeddings(run):
    found = run.embeddings("item")
    assert found.shape == (200, 8) and found.dtype == np.float32 and found.std() > 0
    with pytest.raises(UserError, match="table: 'itme' is not known; did you mean 'item'"):
        run.embeddings("itme")


def test_report(run, tmp_path):
    assert run.report(tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_several_ranks_are_started_and_their_mistakes_are_exceptions(click_log, tmp_path, capfd):
    run = train(job(click_log, tmp_path / "b"), nproc_per_node=2)
    assert run.metrics["train"]["step"] == 13 and "test" in run.metrics
    assert "test" in capfd.readouterr().out
    with pytest.raises(UserError, match="--nproc-per-node is '0': give a number of ranks"):
        train(job(click_log, tmp_path / "c"), nproc_per_node=0)
