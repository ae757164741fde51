"""The base class of all that a model computes after its lookups, and its precision."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from trainer.modules import execution


class Head(nn.Module, ABC):
    """All that a model computes after its lookups, as one module: the training pipeline does not look inside.

    Subclasses implement ``logits(dense, *others) -> [B]``. ``autocast_dtype`` (``Execution``) chooses the type of its matrix
    products, which changes no parameter and no name; lookups, logits and loss stay float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.autocast_dtype = execution.current().autocast_dtype

    def forward(self, dense: Tensor, *others: object) -> Tensor:
        dtype = self.autocast_dtype(dense.device)
        with torch.autocast(dense.device.type, dtype=dtype, enabled=dtype is not None):
            return self.logits(dense, *others).float()  # [B]

    @abstractmethod
    def logits(self, dense: Tensor, *others: object) -> Tensor: ...
