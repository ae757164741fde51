"""Jobs that are killed, stopped, hung or starved on purpose, started as a user starts them.

3000 rows in batches of 240 are 13 steps; checkpoints after steps 4, 8, 12 and 13.
"""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import tiny, warm
from trainer.runtime import restart_history

LAST = 13
OVERRIDES = (
    "model=deepfm",
    "model.hidden_units=[16]",
    "model.dropout=0.2",
    "data.valid=[]",
    "data.test=[]",
    "data.probability=null",
    "log_every_steps=1",
    "checkpoint.every_steps=4",
    "checkpoint.asynchronous=false",
)
SLOWLY = "phase=step_begin,action=sleep=0.4"  # every step
COMMAND = ("-m", "torch.distributed.run", "--standalone")


MODULE = {"torch.distributed.run": ("-m", "trainer.train"), "launch.run": ()}


@dataclass
class Ended:
    """How a launch ended, ``seconds`` after it started; and its run folder, as it was then."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    status: dict
    steps: list[int]  # of its checkpoints

    @property
    def errors(self):
        return re.findall(r"error: .*", self.stderr)  # behind a progress bar, maybe


class Job:
    """A run folder, launched into again and again on two ranks (or ``ranks``), by torchrun (or ``launcher``)."""

    def __init__(self, root: Path, run: Path, ranks: int = 2, launcher: tuple[str, ...] = COMMAND) -> None:
        self.root, self.run, self.ranks, self.launcher = root, run, ranks, launcher

    def start(self, *overrides, faults="", restarts=0):
        launcher = [*self.launcher, f"--nproc-per-node={self.ranks}", f"--max-restarts={restarts}"]
        arguments = tiny.arguments(self.root, f"run.dir={self.run}", *OVERRIDES, *overrides)
        self.began = time.monotonic()
        environment = {
            **os.environ,
            "PYTHONPATH": str(tiny.REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "TRAINER_FAULTS": faults,
        }
        return subprocess.Popen(
            [sys.executable, *launcher, *MODULE[launcher[1]], *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def end(self, process):
        stdout, stderr = process.communicate(timeout=warm.PATIENCE)
        status = json.loads((self.run / "status.json").read_text())
        steps = sorted(int(path.name.removeprefix("step-")) for path in (self.run / "checkpoints").glob("step-*"))
        return Ended(process.returncode, stdout, stderr, time.monotonic() - self.began, status, steps)

    def launch(self, *overrides, **how):
        return self.end(self.start(*overrides, **how))

    def reach(self, step, process, *, already=False):
        """Waits until the start that comes (``already``: that has come) trains ``step``."""
        path = self.run / restart_history.NAME
        before = len(restart_history.read(path)) - already
        while len(found := restart_history.read(path)) == before or found[-1].step < step:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
