"""The base class of all that a model computes after its lookups, and its precision."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from data_loaders.schema import Schema
from trainer.modules import execution
from trainer.modules.vectors import DenseVectors


class Head(nn.Module, ABC):
    """All that a model computes after its lookups, as one module: the training pipeline does not look inside.

    Subclasses implement ``logits(dense, *others) -> [B]``. ``autocast_dtype`` (``Execution``) chooses the type of its matrix
    products, which changes no parameter and no name; lookups, logits and loss stay float32. ``dense`` [B, N] are the inputs that
    ``Schema.dense`` names; what a batch has of vectors is made into them here, whatever the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.autocast_dtype = execution.current().autocast_dtype
        self.vectors: DenseVectors | None = None

    def read_vectors(self, schema: Schema) -> None:
        """Of a schema that has some; after all else is built, whose initial values then are as without them."""
        self.vectors = DenseVectors(schema)

    def forward(self, dense: Tensor, *others: object) -> Tensor:
        dense = dense if self.vectors is None else self.vectors(dense)
        dtype = self.autocast_dtype(dense.device)
        with torch.autocast(dense.device.type, dtype=dtype, enabled=dtype is not None):
            return self.logits(dense, *others).float()  # [B]

    @abstractmethod
    def logits(self, dense: Tensor, *others: object) -> Tensor: ...
