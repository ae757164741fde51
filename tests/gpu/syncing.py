"""`python -m tests.gpu.syncing …` is `trainer.train …`, and prints where its own code has the host wait for the card in a
step: `WAITS trainer/runtime/step_guard.py:check`, a line each. What TorchRec waits for is its own affair."""

import os
import sys
import warnings
from pathlib import Path
from types import FrameType

import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.helpers.tiny import REPOSITORY
from trainer.training import main

FIRST = 3  # the steps before fill the pipeline and settle what is done once
SIGN = "synchronizing CUDA operation"
TORCH = str(Path(torch.__file__).parent) + os.sep  # not torchrec


class Watch:
    """Around ``progress`` of the pipeline."""

    def __init__(self) -> None:
        self.steps, self.seen, self.act = 0, set(), TrainPipelineSparseDist.progress

    def __call__(self, pipeline, batches):
        self.steps += 1
        if self.steps < FIRST:
            return self.act(pipeline, batches)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._show
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return self.act(pipeline, batches)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def _show(self, message, *_):
        place = _place(sys._getframe(1)) if SIGN in str(message) else None
        if place is not None and place not in self.seen:
            self.seen.add(place)
            print(f"WAITS {place}", flush=True)


def _place(frame: FrameType | None) -> str | None:
    """file:function of the innermost frame that is not PyTorch's; None where it is not ours either."""
    while frame is not None and frame.f_code.co_filename.startswith((TORCH, "<", warnings.__file__)):
        frame = frame.f_back
    if frame is None or not Path(frame.f_code.co_filename).is_relative_to(REPOSITORY):
        return None
    return f"{Path(frame.f_code.co_filename).relative_to(REPOSITORY).as_posix()}:{frame.f_code.co_name}"


if __name__ == "__main__":
    watch = Watch()
    TrainPipelineSparseDist.progress = lambda pipeline, batches: watch(pipeline, batches)
    main()
