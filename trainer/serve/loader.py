"""``python -m trainer.serve.loader VERSION MEMORY [SERVED]``: reads a version whole, at low priority: its digests are then known
to be right, and its tables in memory, before a worker looks at it. Exit code 2 and one line where it is not to be served.

MEMORY: ``serve.memory``; SERVED: the version that is served meanwhile."""

import os
import sys
from pathlib import Path

import psutil
import torch

from trainer.runtime.process import guarded
from trainer.serve.artifact import Artifact
from trainer.serve.memory import check_memory
from trainer.serve.opened import open_checked

NICE = 10


def main() -> None:
    os.nice(NICE)
    torch.set_num_threads(1)
    guarded(lambda: load(*sys.argv[1:]))


def load(version: str, memory: str, served: str = "") -> None:
    """Raises ``UserError`` where it is not to be served."""
    before = Artifact(Path(served), hashes=False) if served else None
    check_memory(Artifact(Path(version), hashes=False), before, memory, psutil.virtual_memory().available)
    open_checked(Path(version), hashes=True)


if __name__ == "__main__":
    main()
