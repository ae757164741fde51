"""``python -m trainer.serve.loader VERSION``: reads a version whole, at low priority: its digests are then known to be right,
and its tables in memory, before a worker looks at it. Exit code 2 and one line where it is not to be served."""

import os
import sys
from pathlib import Path

import torch

from trainer.runtime.process import guarded
from trainer.serve.opened import open_checked

NICE = 10


def main() -> None:
    os.nice(NICE)
    torch.set_num_threads(1)
    guarded(lambda: open_checked(Path(sys.argv[1]), hashes=True))


if __name__ == "__main__":
    main()
