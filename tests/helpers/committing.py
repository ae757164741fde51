"""``-m tests.helpers.committing FOLDER FIRST LAST``: a job of one rank whose one table holds the number of the step;
goes on from the
newest checkpoint of FOLDER and saves at every step from FIRST to LAST. Dies where TRAINER_FAULTS says."""

import sys
from pathlib import Path

import torch

from trainer.checkpoint import clean
from trainer.checkpoint.loading import load
from trainer.checkpoint.piece import Piece
from trainer.checkpoint.saving import Checkpoints
from trainer.checkpoint.verification import newest_whole
from trainer.config.checkpoint import CheckpointConfig
from trainer.runtime.progress import Progress
from trainer.runtime.rendezvous import process_group


class Steps:
    def __init__(self) -> None:
        self.table = torch.zeros(1000, 4)
        self.pieces = [Piece("tables/t/weight", (1000, 4), (0, 0), self.table)]

    def snapshot(self):
        return []

    def facts(self):
        return {}

    def restore(self, facts, reader):
        assert self.table.unique().tolist() == [facts["progress"]["step"]]


def main(folder: Path, first: int, last: int) -> None:
    with process_group(torch.device("cpu"), 60) as ranks:
        clean(folder)
        state = Steps()
        checkpoints = Checkpoints(folder, CheckpointConfig(every_steps=1), state, {}, ranks)
        newest = newest_whole(folder, "fallback", ranks)
        if newest is not None:
            load(newest, state, ranks)
        for step in range(first, last + 1):
            state.table.fill_(step)
            checkpoints.maybe_save(Progress(step=step))
        checkpoints.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
