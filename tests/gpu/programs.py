"""The program on GPUs, as a user starts it, and what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import tiny, warm
from trainer.checkpoint import Reader

# As in tests/integration/test_resume.py, but for dropout: what is drawn differs between devices. SGD does not magnify rounding.
LINEAR = (
    "model=deepfm",
    "model.hidden_units=[16]",
    "optim.wide={name: sgd, lr: 0.5}",
    "optim.tables={name: sgd, lr: 0.5}",
    "optim.dense={name: sgd, lr: 0.05}",
)
COMMON = ("epochs=2", "log_every_steps=1", "data.valid=[]", "data.test=[]", "data.probability=null")


def train(log, run, *overrides, device="cuda", ranks=1, faults="", restarts=0, module="trainer.train"):
    """A job under torchrun."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        f"--max-restarts={restarts}",
    ]
    arguments = tiny.arguments(log, f"run.dir={run}", *COMMON, f"device={device}", *overrides)
    path = os.pathsep.join(filter(None, [str(tiny.REPOSITORY), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *launcher, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=warm.PATIENCE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", "TRAINER_FAULTS": faults},
        stdin=subprocess.DEVNULL,
    )


def trained(log, run, *overrides, **options) -> Path:
    """The run folder of a job that has to end well."""
    done = train(log, run, *overrides, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return run


def tensors(run, step=None):
    """All that a checkpoint holds: of a step, or the last one."""
    folders = sorted((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    path = folders[-1] if step is None else run / "checkpoints" / f"step-{step}"
    reader = Reader(path)
    return {name: reader.read(name) for name in reader.names}


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["logloss"] for line in lines if line["split"] == "train"]
