"""Kills a job again and again, by SIGKILL at random times, until it has finished all the same; then compares its last
checkpoint, bit for bit, with that of an undisturbed job.

    python -m bench.soak [--kills 50] [--ranks 2] [--seed 1] [--folder DIR]

Each launch is killed, all its processes at once, between 5 and 17 seconds after its start: while it starts, reads, trains, saves
or prunes. Training waits for nothing: saves are asynchronous, every 5 steps. Once the kills are used up, the last launch
runs to its end. No row may be trained twice or left out either: the ledgers are compared, too.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from bench import harness
from trainer.checkpoint import Reader, clean, committed, newest, verify

SHORTEST, LONGEST = 5.0, 17.0  # seconds of a launch
# Steps slow enough that hundreds of them outlast the kills.
JOB = (
    "model=deepfm",
    "data=synthetic",
    "data.valid=[]",
    "data.test=[]",
    "data.synthetic.train_rows=1_000_000",
    "epochs=4",
    "batch_size=4096",
    "checkpoint.every_steps=5",
    "debug.ledger=true",
    "log_every_steps=20",
    "precision=fp32",
    "device=cpu",
)


def main() -> int:
    parser = harness.parser(__doc__, "soak.json", overrides=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-", dir=options.folder) as folder:
        result = soak(options, Path(folder))
    harness.record(options.output, result)
    print(json.dumps(result, indent=2))
    return 0 if result["equal"] else 1


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    quiet, disturbed = folder / "quiet", folder / "disturbed"
    started = time.monotonic()
    assert launch(options, quiet).wait() == 0, "the undisturbed job fails"
    chance, resumed_at, damaged, ended = random.Random(options.seed), [], 0, 0
    for number in range(options.kills):
        process = launch(options, disturbed)
        if wait(process, chance.uniform(SHORTEST, LONGEST)):
            ended += 1  # it has finished: from now on it finishes again at once
            continue
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.2)  # until the kernel has ended the workers, which are in sessions of their own
        damaged += sum(verify(path) is not None for path in committed(disturbed / "checkpoints"))
        resumed_at.append(step_of(disturbed))
        print(f"kill {number + 1}: newest checkpoint is of step {resumed_at[-1]}", flush=True)
    assert launch(options, disturbed).wait() == 0, "the job did not survive"
    clean(disturbed / "checkpoints")
    return {
        "kills": len(resumed_at),
        "launches_that_finished_before_their_kill": ended,
        "damaged_checkpoints_seen": damaged,
        "steps_of_the_newest_checkpoints": resumed_at,
        "last_step": step_of(disturbed),
        "tensors_equal": tensors_equal(quiet, disturbed),
        "ledgers_equal": ledger(quiet) == ledger(disturbed),
        "equal": tensors_equal(quiet, disturbed) and ledger(quiet) == ledger(disturbed),
        "seconds": round(time.monotonic() - started),
    }


def launch(options: argparse.Namespace, run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.run", "--nproc-per-node", str(options.ranks), f"run.dir={run}"]
    with open(run.with_suffix(".log"), "a") as log:
        return subprocess.Popen([*command, *JOB, *options.overrides], stdout=log, stderr=log, start_new_session=True)


def wait(process: subprocess.Popen, seconds: float) -> bool:
    """Whether it finished within the time."""
    try:
        assert process.wait(seconds) == 0, "a launch failed: see its log"
    except subprocess.TimeoutExpired:
        return False
    return True


def step_of(run: Path) -> int:
    found = newest(run / "checkpoints") if (run / "checkpoints").is_dir() else None
    return int(found.name.removeprefix("step-")) if found else 0


def tensors_equal(one: Path, other: Path) -> bool:
    mine, theirs = (Reader(newest(run / "checkpoints")) for run in (one, other))
    return mine.names == theirs.names and all(torch.equal(mine.read(name), theirs.read(name)) for name in mine.names)


def ledger(run: Path) -> Counter:
    """How often each step trained each row."""
    table = pq.read_table(run / "ledger", columns=["step", "epoch", "row"])
    keys = (table[name].to_numpy() for name in ("step", "epoch", "row"))
    return Counter(zip(*(key.tolist() for key in keys)))


if __name__ == "__main__":
    sys.exit(main())
