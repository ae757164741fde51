"""Every model of conf/model as a whole job: trained, evaluated, and its figures written; all in one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import conf
from tests.helpers import tiny, warm

MODELS = sorted(path.stem for path in (Path(conf.__file__).parent / "model").glob("*.yaml"))
PROGRAM = "import json, sys; from trainer.training import start; [start(job) for job in json.load(sys.stdin)]"
VARIANTS = {"pnn": {"opnn": ["model.product=outer"]}, "dcn_v2": {"mixture": ["model.rank=4", "model.experts=2"]}}


@pytest.fixture(scope="module")
def runs(click_log, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    jobs = {model: [f"model={model}"] for model in MODELS}
    jobs |= {name: [f"model={model}", *more] for model, found in VARIANTS.items() for name, more in found.items()}
    options = ["epochs=1", "checkpoint.every_steps=8", "sharding.types=[table_wise]"]
    listed = [[*tiny.arguments(click_log, f"run.dir={folder / name}", *job, *options)] for name, job in jobs.items()]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(listed),
        text=True,
        capture_output=True,
        cwd=tiny.REPOSITORY,
        timeout=warm.PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", [*MODELS, *(name for found in VARIANTS.values() for name in found)])
def test_a_job_trains_evaluates_and_leaves_a_checkpoint(name, runs):
    metrics = json.loads((runs / name / "metrics.json").read_text())
    assert metrics["train"]["step"] == 13  # 3000 rows by 240
    for split in ("valid", "test"):
        assert 0 < metrics[split]["logloss"] < 1 and metrics[split]["rows"] == tiny.ROWS[split]
    assert {path.name for path in (runs / name / "checkpoints").glob("step-*")} == {"step-8", "step-13"}
    assert ("wide" in metrics) == (name in ("deepfm", "fibinet", "fm", "fnn", "lr", "wide_deep", "xdeepfm"))
