"""The seed of what a step draws: dropout, the rounding of fp16 tables."""

import numpy as np
import torch

from trainer.runtime.distributed import Ranks

WATCHED = 16  # steps


class StepSeeds:
    """Makes what a step draws a function of (seed, rank, step) alone, so that a resumed run draws the same.

    To seed takes 0.1 ms of a step. It ends where ``WATCHED`` steps in a row have drawn nothing."""

    def __init__(self, seed: int, ranks: Ranks) -> None:
        self._seed, self._rank = seed, ranks.rank
        on_gpu = ranks.device.type == "cuda"
        self._generator = torch.cuda.default_generators[ranks.device.index] if on_gpu else torch.default_generator
        self._state: torch.Tensor | None = None  # after the last seeding
        self._steps_without = 0

    def begin(self, step: int) -> None:
        """Before the step that ``step`` steps precede."""
        if self._steps_without == WATCHED:
            return
        unused = self._state is not None and torch.equal(self._state, self._generator.get_state())
        self._steps_without = self._steps_without + 1 if unused else 0
        drawn = np.random.SeedSequence((self._seed, self._rank, step)).generate_state(1, np.uint64)
        # Not torch.manual_seed, which is slow: it asks every kind of device.
        self._generator.manual_seed(int(drawn[0]))
        self._state = self._generator.get_state()
