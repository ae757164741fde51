"""Tables in a step that is masked (``trainer.runtime.step_mask``): they stay bit by bit what they are.

FBGEMM updates its rows inside backward and takes its learning rate from the host, so an update cannot be called off on the
device. So the gradient is masked: with a gradient of zero sgd, adagrad and row-wise AdaGrad (and FTRL, which works on what sgd
has written) change no bit. Adam decays its moments and moves the rows whatever the gradient: there the rows of the step are kept
before the update and put back after it.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trainer.optim.touched_rows import Lookup, RowUnits, TouchedRows
from trainer.runtime.step_mask import StepMask
from trainer.sharding.kernels import FusedKernel, pointwise_states
from trainer.sharding.table_plan import TablePlan


class MaskedTables:
    """Of a sharded model, whose ``kernels`` these are."""

    def __init__(self, kernels: Iterable[FusedKernel], tables: Sequence[TablePlan], mask: StepMask) -> None:
        optimizers = {table.name: table.optimizer for table in tables}
        self._kept: list[_KeptRows] = []
        for kernel in kernels:
            touched = TouchedRows(kernel)
            if any(optimizers[shard.name].name == "adam" for shard in kernel.shards):
                self._kept.append(_KeptRows(touched, mask))
            else:
                touched.change_gradient(mask.zeroed)

    @torch.no_grad()
    def restore(self) -> None:
        """After backward."""
        for kept in self._kept:
            kept.restore()


class _KeptRows:
    """The rows that a step looks up in one kernel, and Adam's moments of them, from before the update to after it.

    In a step that counts all ids stand for the first unit of memory: it is read often and written as it is."""

    def __init__(self, touched: TouchedRows, mask: StepMask) -> None:
        self._touched, self._mask, self._units = touched, mask, RowUnits(touched)
        self._kept: list[tuple[Tensor, list[Tensor]]] = []  # units [N * U], and what they held
        touched.before_update(self._keep)

    @torch.no_grad()
    def _keep(self, lookup: Lookup) -> None:
        units = self._mask.masked_only(self._units.of_all(lookup))
        self._kept.append((units, [memory.index_select(0, units) for memory in self._memories()]))

    def restore(self) -> None:
        for units, held in self._kept:
            for memory, before in zip(self._memories(), held, strict=True):
                now = memory.index_select(0, units)
                memory.index_copy_(0, units, torch.where(self._mask.counts, now, before))
        self._kept = []

    def _memories(self) -> list[Tensor]:
        """Weights and states, [units, floats] each."""
        found = [self._touched.memory, *pointwise_states(self._touched.kernel)]
        return [memory.view(-1, self._units.floats) for memory in found]
