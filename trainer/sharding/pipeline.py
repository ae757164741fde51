"""TorchRec's training pipeline, with a place for us between forward and backward.

While a batch is trained, the next one's ids are exchanged between the ranks and the one after that is copied to the device.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule

from data_loaders.batch import Batch
from data_loaders.errors import UserError


def nothing(batch: Batch, outputs: Any) -> None:
    """Between forward and backward."""


class StepPipeline(TrainPipelineSparseDist):
    """``step`` is one step; ``progress``, TorchRec's own name for it, is one that nobody looks at in between."""

    def __init__(self, model: DistributedModelParallel, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        super().__init__(model, optimizer, device, execute_all_batches=True, custom_model_fwd=self._forward)
        self._between: Callable[[Batch, Any], None] = nothing
        self._checked = False

    def step(self, batches: Iterator[Batch], between: Callable[[Batch, Any], None]) -> Any:
        """Next batch, forward, ``between(batch, outputs)``, backward with the optimizers of the tables, dense optimizer.
        Returns the outputs. Raises ``StopIteration`` after the last batch, and ``UserError`` at the first one where the
        pipeline does not overlap a sharded module."""
        self._between = between
        return self.progress(batches)

    def _forward(self, batch: Batch) -> tuple[Tensor, Any]:
        if not self._checked:
            self.check_pipelined()
        loss, outputs = self._model(batch)
        self._between(batch, outputs)
        return loss, outputs

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[TrainPipelineSparseDist]:
        """A pipeline over the same model in evaluation mode, with averaged weights where there are any; this one keeps its
        batches in flight."""
        model = self._model
        training = model.training
        model.eval()
        pipeline = TrainPipelineSparseDist(model, self._optimizer, self._device, execute_all_batches=True)
        try:
            with self._optimizer.averaged():
                yield pipeline
        finally:
            pipeline.detach()
            model.train(training)

    def check_pipelined(self) -> None:
        """Raises ``UserError`` naming the sharded modules that the pipeline does not overlap with communication. TorchRec
        only logs it, and is slow from there on."""
        self._checked = True
        pipelined = {id(module) for module in self._pipelined_modules}
        left = [
            name
            for name, module in get_unwrapped_module(self._model).named_modules()
            if isinstance(module, ShardedModule) and id(module) not in pipelined
        ]
        if left:
            raise UserError(
                f"the training pipeline does not reach {', '.join(left)}: the model's forward must get to its embedding "
                "modules by attribute access from the batch, in a straight line (branches belong into a sub-module)"
            )
