"""Slurm in earnest: a job of two nodes is preempted and goes on by itself; who requeues, and when nobody does; trials of a
sweep through srun."""

import json
import subprocess
import sys
from collections import Counter

import pyarrow.parquet as pq
import pytest

from launch.cluster.command import main
from tests.helpers import slurm, tiny, warm
from trainer.runtime.restart_history import read

reason = slurm.missing()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))
STEPS = 13
# A checkpoint is written only where one is asked for: what a new start finds is what the stopped one left.
JOB = ("model=deepfm", "model.hidden_units=[8]", "log_every_steps=1", "data.valid=[]", "data.test=[]")
JOB += ("data.probability=null", "debug.ledger=true", "logging.tensorboard=false")
SLOWLY = "launch.env.TRAINER_FAULTS=phase=step_begin,action=sleep=0.3"
# In place of a training: says what a rank would say of how it ended, in a tenth of a second.
STUB = """#!/bin/bash
for argument; do case $argument in --rdzv-id=*) id=${argument#*=} ;; esac; done
status=$(dirname "$0")/run/status.json
say() { printf '{\\n  "run_id": "%s",\\n  "state": "%s"\\n}\\n' "$1" "$2" > "$status"; }
case $MODE-${SLURM_RESTART_COUNT:-0} in
  saves-0) trap 'say "$id" preempted; exit 1' TERM ;;
  dies-0) trap 'exit 1' TERM ;;
  fails-0) say "$SLURM_JOB_ID-of-old" preempted; exit 1 ;;
  *) exit 0 ;;
esac
touch "$(dirname "$0")/ready"
for _ in {1..600}; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.started(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def submit(cluster, click_log, monkeypatch, capfd):
    """Submits a job and returns its number. None is left to the next test."""
    monkeypatch.chdir(tiny.REPOSITORY)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)

    def submit(run, *own):
        given = ["launch=slurm", "launch.gpus_per_node=0", "launch.nproc_per_node=1", "launch.grace=30", *own]
        assert main([*given, *tiny.arguments(click_log, f"run.dir='{run}'", *JOB)]) == 0
        return capfd.readouterr().out.split()[3]  # Submitted batch job N

    yield submit
    cluster.ask("scancel", "--partition=low")
    cluster.ask("scancel", "--partition=patient")


@pytest.fixture
def stub(submit, tmp_path):
    """Submits a job whose ranks are ``STUB``."""

    def start(mode, partition="low"):
        folder = tmp_path / mode
        (folder / "run").mkdir(parents=True)
        (folder / "python").write_text(STUB)
        (folder / "python").chmod(0o755)
        own = (f"launch.python={folder / 'python'}", f"launch.env.MODE={mode}", f"launch.options.partition={partition}")
        return submit(folder / "run", *own), folder / "ready"

    return start


def preempt(cluster, nodes):
    cluster.ask("sbatch", "--partition=high", f"--nodes={nodes}", "--output=/dev/null", "--wrap=true")


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_a_preempted_job_of_two_nodes_goes_on_by_itself(cluster, submit, tmp_path):
    run = tmp_path / "a run"
    number = submit(run, "launch.nodes=2", "launch.options.partition=low", SLOWLY)

    def output():
        return "\n".join(lines(run / f"slurm-{number}.out"))

    slurm.until(lambda: len(lines(run / "metrics.jsonl")) >= 3, warm.PATIENCE, output)
    preempt(cluster, nodes=1)
    slurm.until(lambda: cluster.job(number)["Restarts"] == "1", warm.PATIENCE, output)
    slurm.until(lambda: cluster.job(number)["JobState"] in ("COMPLETED", "FAILED"), warm.PATIENCE, output)

    starts = read(run / "attempts.txt")
    assert [start.state for start in starts] == ["preempted", "finished"], output()
    assert [start.launch for start in starts] == [f"{number}-0", f"{number}-1"]
    assert 3 <= starts[0].step < starts[1].step == STEPS
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    trained = pq.read_table(run / "ledger")
    rows = Counter(zip(*(trained[name].to_pylist() for name in ("file", "row"))))
    assert len(rows) == tiny.ROWS["train"] and set(rows.values()) == {1}
    assert sorted(set(trained["step"].to_pylist())) == list(range(1, STEPS + 1))


def test_a_job_that_is_only_asked_to_stop_requeues_itself_and_no_other(cluster, stub):
    def requeued(number):
        slurm.until(lambda: int(cluster.job(number)["Restarts"]) > 0, warm.PATIENCE, lambda: cluster.ask("squeue"))
        cluster.ask("scancel", number)

    saves, ready = stub("saves")
    slurm.until(ready.exists, warm.PATIENCE)
    cluster.ask("scancel", "--signal=TERM", saves)  # what --signal does before the time limit
    requeued(saves)
    dies, ready = stub("dies", "patient")
    slurm.until(ready.exists, warm.PATIENCE)
    preempt(cluster, nodes=2)  # with a grace time, and before the ranks can save
    requeued(dies)
    fails, _ = stub("fails")
    slurm.until(lambda: cluster.job(fails)["JobState"] == "FAILED", warm.PATIENCE, lambda: cluster.ask("squeue"))
    assert cluster.job(fails)["Restarts"] == "0"


def test_a_cancelled_job_is_not_requeued(cluster, stub):
    number, ready = stub("saves")
    slurm.until(ready.exists, warm.PATIENCE)
    cluster.ask("scancel", number)
    slurm.until(lambda: cluster.job(number)["JobState"] == "CANCELLED", warm.PATIENCE, lambda: cluster.ask("squeue"))
    assert cluster.job(number)["Restarts"] == "0"
    assert not cluster.ask("squeue", "--noheader", f"--jobs={number}", "--states=all", "--format=%r").startswith(
        "BeginTime"
    )


def test_trials_of_a_sweep_are_started_through_srun(cluster, click_log, tmp_path):
    through = "sweep.through=srun --partition=low --nodes=1 --ntasks=1"
    swept = [
        "model.hidden_units=[8],[4]",
        "data.test=[]",
        "steps=2",
        "sweep.parallel=2",
        f"sweep.dir={tmp_path / 'sweep'}",
    ]
    job = tiny.arguments(click_log, "model=deepfm", "data.probability=null", *swept, through)
    done = subprocess.run(
        [sys.executable, "-m", "launch.run", "--multirun", "--nproc-per-node", "1", *job],
        cwd=tiny.REPOSITORY,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=warm.PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(": complete valid.auc") == 2
    log = (cluster.folder / "slurmctld.log").read_text()
    assert {f"NodeList={node}" for node in (slurm.host(), f"{slurm.host()}-b")} <= set(log.split())
