"""A small click log on disk and jobs over it, for the tests that need a whole program."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data_loaders import synthetic
from tests.helpers import warm
from trainer.config.compose import Composed, compose

REPOSITORY = Path(__file__).resolve().parents[2]
CONF = REPOSITORY / "tests" / "conf"
ROWS = {"train": 3000, "valid": 500, "test": 700}
FP32 = ("precision=fp32", "device=cpu", "report=false")  # a report takes two seconds of a run


def write_log(folder: Path) -> Path:
    """Rows of ``ROWS`` in several small files with several row groups each."""
    config = job(folder).config
    synthetic.write(
        config.data.schema,
        folder,
        rows=ROWS,
        seed=3,
        probability="click_probability",
        rows_per_file=1100,
        row_group_size=250,
    )
    return folder


def job(root: Path, *overrides: str) -> Composed:
    return compose(arguments(root, *overrides))


def arguments(root: Path, *overrides: str) -> Sequence[str]:
    return ["--config-dir", str(CONF), "data=tiny", f"data.root={root}", "batch_size=240", *FP32, *overrides]


def torchrun(ranks: int, module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A module as a user starts it. ``warm.run`` costs a third, and is right wherever torchrun is not what is tested."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [sys.executable, *launcher, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=warm.PATIENCE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )


def train(ranks: int, root: Path, run: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A job on the log in ``root`` into the folder ``run``: on one rank without a launcher, on more as torchrun starts
    them."""
    return warm.run(ranks if ranks > 1 else 0, "trainer.train", arguments(root, f"run.dir={run}", *overrides))
