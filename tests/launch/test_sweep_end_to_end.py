"""A search of two trials through the trainer, side by side, as a user starts it; the best one runs again; both compared."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import tiny, warm
from trainer.config.compose import compose

REPOSITORY = Path(__file__).resolve().parents[2]


def call(module, *arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=warm.PATIENCE,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )


def test_two_trials_of_a_search(click_log, tmp_path):
    pytest.importorskip("optuna")
    root, parallel = tmp_path / "sweep", min(2, len(os.sched_getaffinity(0)))
    own = ["sweep=optuna", "sweep.trials=2", f"sweep.parallel={parallel}", f"sweep.dir={root}"]
    swept = ["model=deepfm,din", "optim.dense.lr=tag(log,interval(1e-3,1e-1))"]
    overrides = ["data.test=[]", "checkpoint.every_minutes=null", *swept, *own]
    arguments = ["--multirun", "--nproc-per-node", "1", *tiny.arguments(click_log, *overrides)]
    done = call("launch.run", *arguments)
    assert done.returncode == 0, done.stderr
    results = json.loads((root / "results.json").read_text())
    assert [trial["state"] for trial in results] == ["complete"] * 2
    for trial in results:
        folder = Path(trial["folder"])
        assert json.loads((folder / "metrics.json").read_text())["valid"]["auc"] == trial["value"]
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["model"]["name"] == trial["values"]["model"]
        assert config["optim"]["dense"]["lr"] == float(trial["values"]["optim.dense.lr"])
    assert results[0]["value"] >= results[1]["value"]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Run it: ")]
    ran = shlex.split(line.partition(" train ")[2])
    best = yaml.safe_load((Path(results[0]["folder"]) / "config.yaml").read_text())
    again = compose(ran).tree
    assert {**again, "run": None} == {**best, "run": None}
    before = {path: path.stat().st_mtime_ns for path in root.glob("*/metrics.json")}
    assert call("launch.run", *arguments).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in root.glob("*/metrics.json")} == before, "nothing runs twice"
    compared = call("trainer.report.compare", *(trial["folder"] for trial in results))
    assert compared.returncode == 0, compared.stderr
    assert "optim.dense.lr" in compared.stdout and f"{results[0]['value']:.5f}" in compared.stdout
