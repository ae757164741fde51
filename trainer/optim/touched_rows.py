"""The rows of tables that a training step looks up, for those who update them beside FBGEMM: weight decay and mini-batch aware
regularisation before the kernels do, FTRL after backward; and for those who have them left as they are
(``trainer.optim.masked_tables``).

TorchRec brings every id to the rank that holds its row, so a kernel is called with the ids that the whole global batch has for
its shards. Which rows a step touches is known there without communication; the parts of a row that is cut by columns all see
the same ids.

Ids are repeated as in the batch. Who updates rows reads all of them before it writes any, and equal ids write equal values, so
nothing needs to be made unique (on one core, 160,000 ids: 5 ms to update them all, 5 ms for ``unique`` alone). What depends on
an id's table is spread over the ids: to split them by table would stop a GPU.

Shapes: N ids of a kernel's call, F features of the kernel, M floats in its memory, U the most units a row has (``RowUnits``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from trainer.sharding.kernels import FusedKernel


@dataclass(frozen=True)
class Lookup:
    """The ids of one training call of a kernel: ``rows`` [N] of their tables' shards, feature by feature, and how many each
    feature has, ``counts`` [F]."""

    rows: Tensor
    counts: Tensor

    def spread(self, of_feature: Tensor) -> Tensor:
        """A number of each feature [F] -> of each id [N]."""
        return of_feature.repeat_interleave(self.counts, output_size=self.rows.numel())


class TouchedRows:
    """Of one kernel. ``begins`` [F]: where the shard of a feature's table begins, in floats."""

    def __init__(self, kernel: FusedKernel) -> None:
        self.kernel, self.shards = kernel
        self.begins: list[int] = self.kernel.weights_offsets.tolist()

    @property
    def memory(self) -> Tensor:
        """The kernel's weights, live: [M]."""
        weights = self.kernel.weights_dev if self.kernel.weights_dev.numel() else self.kernel.weights_host
        # Not detach(): the kernel's backward, about to write there itself, would complain of the change.
        return weights.data

    def of_feature(self, of_shard: Sequence[float]) -> Tensor:
        """A number of each shard -> of each feature [F]."""
        numbers = [of_shard[shard] for shard in self.kernel.feature_table_map]
        return torch.tensor(numbers, device=self.kernel.weights_offsets.device)

    def before_update(self, act: Callable[[Lookup], None]) -> None:
        """Has ``act`` called in backward, once the gradient of the kernel's output is complete and before the kernel updates
        its rows."""
        self._watch(lambda lookup, output: output.register_hook(lambda _: act(lookup)))

    def change_gradient(self, changed: Callable[[Tensor], Tensor]) -> None:
        """Has the kernel update its rows with ``changed(gradient)`` of its output."""
        self._hook(lambda indices, offsets, output: output.register_hook(changed))

    def after_backward(self) -> list[Lookup]:
        """The lookups since it was emptied last, which is up to the caller."""
        found: list[Lookup] = []
        self._watch(lambda lookup, _: found.append(lookup))
        return found

    def _watch(self, see: Callable[[Lookup, Tensor], object]) -> None:
        def of_ids(indices: Tensor, offsets: Tensor, output: Tensor) -> None:
            if indices.numel():
                bags = (offsets.numel() - 1) // len(self.begins)
                see(Lookup(indices.long(), offsets.long()[::bags].diff()), output)

        self._hook(of_ids)

    def _hook(self, see: Callable[[Tensor, Tensor, Tensor], object]) -> None:
        """``see`` gets ids [N], offsets [F * bags + 1] and output of each training call."""

        def hook(kernel: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            if not (kernel.training and output.requires_grad):
                return
            indices = named["indices"] if "indices" in named else inputs[0]
            offsets = named["offsets"] if "offsets" in named else inputs[1]
            see(indices, offsets, output)

        self.kernel.register_forward_hook(hook, with_kwargs=True)


class RowUnits:
    """Where rows lie in a kernel's memory, in units of as many floats as divide all its rows and all places where a table
    begins: where tables are equally wide, a row is one unit."""

    def __init__(self, touched: TouchedRows) -> None:
        device, widths = touched.memory.device, [shard.local_cols for shard in touched.shards]
        self.floats = gcd(*widths, *touched.begins, touched.memory.numel())
        self._begins = torch.tensor(touched.begins, device=device) // self.floats
        self._units = touched.of_feature(widths) // self.floats
        self._features = torch.arange(len(touched.begins), device=device)
        self._each = torch.arange(max(widths) // self.floats, device=device)

    def of_all(self, lookup: Lookup) -> Tensor:
        """The units of all rows of a lookup -> [N * U]."""
        if len(self._each) == 1:  # a row is a unit
            return lookup.rows + lookup.spread(self._begins)
        return self.of(lookup.rows, lookup.spread(self._features)).view(-1)

    def of(self, ids: Tensor, feature: Tensor) -> Tensor:
        """The units of the rows of ``ids`` [N], whose features are ``feature`` [N] -> [N, U]; a narrower row's last unit stands
        for those it has not."""
        units = torch.minimum(self._each, self._units[feature].unsqueeze(1) - 1)  # [N, U]
        return (self._begins[feature] + ids * self._units[feature]).unsqueeze(1) + units
