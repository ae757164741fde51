"""The rows of tables that a training step looks up, for those who update them beside FBGEMM: weight decay and mini-batch aware
regularisation before the kernels do, FTRL after backward; for those who have them left as they are
(``trainer.optim.masked_tables``); and for the row clock.

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
        self.shard_of_feature = [number for number, shard in enumerate(self.shards) for _ in shard.feature_names]

    @property
    def memory(self) -> Tensor:
        """The kernel's weights, live: [M]."""
        weights = self.kernel.weights_dev if self.kernel.weights_dev.numel() else self.kernel.weights_host
        # Not detach(): the kernel's backward, about to write there itself, would complain of the change.
        return weights.data

    def of_feature(self, of_shard: Sequence[float]) -> Tensor:
        """A number of each shard -> of each feature [F]."""
        numbers = [of_shard[shard] for shard in self.shard_of_feature]
        return torch.tensor(numbers, device=self.kernel.weights_offsets.device)

    def lookup(self, indices: Tensor, offsets: Tensor) -> Lookup:
        """Ids [N] and offsets [F * bags + 1] of a call -> which rows of which features they are."""
        bags = (offsets.numel() - 1) // len(self.begins)
        return Lookup(indices.long(), offsets.long()[::bags].diff())

    def before_update(self, act: Callable[[Lookup], None]) -> None:
        """Has ``act`` called in backward, once the gradient of the kernel's output is complete and before the kernel updates
        its rows."""
        self._watch(lambda lookup, output: output.register_hook(lambda _: act(lookup)))

    def change_gradient(self, changed: Callable[[Tensor], Tensor]) -> None:
        """Has the kernel update its rows with ``changed(gradient)`` of its output."""
        self._hook(lambda indices, offsets, output: output.register_hook(changed))

    def numbers_before_update(self, numbers: "RowNumbers", act: Callable[[Tensor], None]) -> None:
        """Has ``act`` called with the ``numbers`` [N] of the rows when ``before_update`` would be."""
        self._hook(lambda ids, offsets, output: output.register_hook(lambda _: act(numbers.of(ids, offsets))))

    def numbers_after_backward(self, numbers: "RowNumbers") -> list[Tensor]:
        """The ``numbers`` [N] of each lookup since it was emptied last, which is up to the caller."""
        found: list[Tensor] = []
        self._hook(lambda ids, offsets, output: found.append(numbers.of(ids, offsets)))
        return found

    def _watch(self, see: Callable[[Lookup, Tensor], object]) -> None:
        def of_ids(indices: Tensor, offsets: Tensor, output: Tensor) -> None:
            see(self.lookup(indices, offsets), output)

        self._hook(of_ids)

    def _hook(self, see: Callable[[Tensor, Tensor, Tensor], object]) -> None:
        """``see`` gets ids [N], offsets [F * bags + 1] and output of each training call."""

        def hook(kernel: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            if not (kernel.training and output.requires_grad):
                return
            indices = named["indices"] if "indices" in named else inputs[0]
            offsets = named["offsets"] if "offsets" in named else inputs[1]
            if indices.numel():
                see(indices, offsets, output)

        self.kernel.register_forward_hook(hook, with_kwargs=True)


class RowNumbers:
    """Rows of all of a kernel's shards in one count: row r of shard s is ``begins[s] + r``, every row of a shard without a
    begin ``other``. On a GPU one launch of FBGEMM's, whose twin for CPUs (1.6 and 1.8) returns memory as it was."""

    def __init__(self, touched: TouchedRows, begins: Sequence[int | None], other: int) -> None:
        self._touched = touched
        kept = [begin is not None for begin in begins]
        numbers = [other if begin is None else begin for begin in begins]
        self._begins = touched.of_feature(numbers)
        self._keeps = None if all(kept) else touched.of_feature([int(each) for each in kept])
        signed = touched.of_feature([-1 if begin is None else begin for begin in begins])
        self._begins_and_other = torch.cat((signed, signed.new_tensor([other])))  # as FBGEMM wants them: [F + 1]

    def of(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """[N], [F * bags + 1] -> int64 [N]."""
        if ids.is_cuda:
            return torch.ops.fbgemm.linearize_cache_indices(self._begins_and_other, ids, offsets).long()
        return self.of_lookup(self._touched.lookup(ids, offsets))

    def of_lookup(self, lookup: Lookup) -> Tensor:
        """-> int64 [N]."""
        rows = lookup.rows if self._keeps is None else lookup.rows * lookup.spread(self._keeps)
        return rows + lookup.spread(self._begins)


class RowUnits:
    """Where rows lie in a kernel's memory, in units of as many floats as divide all its rows and all places where a table
    begins: where tables are equally wide, a row is one unit."""

    def __init__(self, touched: TouchedRows) -> None:
        device, widths = touched.memory.device, [shard.local_cols for shard in touched.shards]
        self._touched = touched
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

    def shrink(self, ids: Tensor, feature: Tensor, kept: Tensor) -> None:
        """Multiplies the rows of ``ids`` [N], whose features are ``feature`` [N], by ``kept`` [N], equal for equal rows."""
        units = self.of(ids, feature)  # [N, U]
        factors = kept.unsqueeze(1).expand_as(units).reshape(-1, 1)  # [N * U, 1]
        memory, rows = self._touched.memory.view(-1, self.floats), units.view(-1)
        memory.index_copy_(0, rows, (memory.index_select(0, rows) * factors).to(memory.dtype))

    def of(self, ids: Tensor, feature: Tensor) -> Tensor:
        """The units of the rows of ``ids`` [N], whose features are ``feature`` [N] -> [N, U]; a narrower row's last unit stands
        for those it has not."""
        units = torch.minimum(self._each, self._units[feature].unsqueeze(1) - 1)  # [N, U]
        return (self._begins[feature] + ids * self._units[feature]).unsqueeze(1) + units
