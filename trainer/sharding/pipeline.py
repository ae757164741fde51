"""TorchRec's training pipeline with a step's parts as methods of their own, for the loop to call in order.

While a batch is trained, the next one's ids are exchanged between the ranks and the one after that is copied to the device.
Collectives, copies and launches are those of TorchRec's own ``progress`` (1.8), in its order.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.profiler import record_function
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule

from data_loaders.batch import Batch
from data_loaders.errors import UserError


class StepPipeline(TrainPipelineSparseDist):
    """``next_batch``, ``forward``, ``backward``, ``update``: one step. ``progress`` is all four, unguarded."""

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The batch to train, on the device; two more are on their way. Raises ``StopIteration`` after the last one, and
        ``UserError`` at the first one where the pipeline does not overlap a sharded module."""
        if not self._model_attached:
            self.attach(self._model)
        traced = bool(self._pipelined_modules)
        self.fill_pipeline(batches)
        if not self.batches:
            raise StopIteration
        if not traced:
            self.check_pipelined()
        self._set_module_context(self.contexts[0])
        with record_function("## zero_grad ##"):
            self._optimizer.zero_grad()
        self._wait_for_batch()
        if len(self.batches) >= 2:
            self.start_sparse_data_dist(self.batches[1], self.contexts[1])
        self.enqueue_batch(batches)
        return self.batches[0]

    def forward(self) -> tuple[Tensor, Any]:
        """Loss [] and outputs of the batch."""
        with record_function(f"## forward {self.contexts[0].index} ##"):
            return self._model_fwd(self.batches[0])

    def backward(self, loss: Tensor) -> None:
        """Updates the tables, too."""
        if len(self.batches) >= 2:
            self.wait_sparse_data_dist(self.contexts[1])
        self._backward(loss)

    def update(self) -> None:
        """Updates the dense parameters, and is done with the batch."""
        self._optimizer_step()
        self.dequeue_batch()

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
