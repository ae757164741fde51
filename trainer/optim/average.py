"""An exponential moving average of the dense parameters, with which a model is evaluated and predicts (Polyak and Juditsky,
1992; the exponential form as in Kingma and Ba, 2015, section 7.2).

``average += (1 - d) (parameter - average)`` after each step, d = min(decay, (1 + t) / (10 + t)) in step t = 0, 1, …, so that
the initial values are forgotten before the average grows long. Tables and the statistics of normalisation are not averaged.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.checkpoint.piece import Piece, whole_piece


class DenseAverage:
    """The averages of named parameters; those of a new run are its initial values."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay, self.parameters = decay, parameters
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the parameters' step number ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), list(self.parameters.values()), 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """From the parameters as they are."""
        for name, value in self.values.items():
            value.copy_(self.parameters[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the parameters have the averages' values, and the averages theirs."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def pieces(self) -> list[Piece]:
        """``average/<parameter>``, the same on all ranks."""
        return [whole_piece(f"average/{name}", value) for name, value in self.values.items()]

    @torch.no_grad()
    def _exchange(self) -> None:
        values: list[Tensor] = list(self.values.values())
        kept = [value.clone() for value in values]
        torch._foreach_copy_(values, list(self.parameters.values()))
        torch._foreach_copy_(list(self.parameters.values()), kept)
