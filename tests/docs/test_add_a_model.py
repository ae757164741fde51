"""The example of docs/add-a-model.md, as a reader makes it: its files written, its commands run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import warm

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """``(folder with mine/, commands)``."""
    folder, commands = tmp_path_factory.mktemp("example"), []
    for language, text in BLOCK.findall((REPOSITORY / "docs" / "add-a-model.md").read_text()):
        if language == "bash":
            commands.append(text)
            continue
        path = folder / text.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder, commands


def run(example, number):
    """A command of the page, started in the example's folder instead of the repository."""
    folder, commands = example
    path, program, *arguments = shlex.split(commands[number].replace("\\\n", ""))
    assert path == "PYTHONPATH=mine" and program in ("clicktrainer", "python")
    if program == "clicktrainer":
        arguments = ["-m", "trainer", *arguments]
    places = os.pathsep.join([str(folder / "mine"), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=warm.PATIENCE,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(example):
    run(example, 0)
    return example[0] / "runs" / "nfm"


def test_it_trains_on_two_ranks(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["train"]["rows_trained"] == 20_000 and metrics["test"]["rows"] == 2000
    assert metrics["test"]["auc"] > 0.5 and metrics["alerts"] == []


def test_a_warm_start_moves_its_columns_by_feature(example, trained):
    shown = run(example, 1)
    assert "head.deep.layers.0.weight" in shown and "old" in shown, shown


def test_it_keeps_what_every_model_promises(example):
    assert "2 passed" in run(example, 2)
