"""The base class of all that a model computes after its lookups, and its precision."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Head(nn.Module, ABC):
    """All that a model computes after its lookups, as one module: the training pipeline does not look inside.

    Subclasses implement ``logits(dense, *others) -> [B]``. ``set_autocast`` chooses the type of its matrix products,
    which changes no parameter and no name; lookups, logits and loss stay float32.
    """

    autocast_dtype: torch.dtype | None = None

    def forward(self, dense: Tensor, *others: object) -> Tensor:
        enabled = self.autocast_dtype is not None
        with torch.autocast(dense.device.type, dtype=self.autocast_dtype, enabled=enabled):
            return self.logits(dense, *others).float()  # [B]

    def autocast_to(self, dtype: torch.dtype | None) -> None:
        self.autocast_dtype = dtype

    @abstractmethod
    def logits(self, dense: Tensor, *others: object) -> Tensor: ...


def set_autocast(module: nn.Module, dtype: torch.dtype | None) -> None:
    """The type of the matrix products of every ``Head`` in ``module``, e.g. ``torch.bfloat16``; None: float32."""
    for child in module.modules():
        if isinstance(child, Head):
            child.autocast_to(dtype)
