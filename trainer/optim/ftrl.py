"""FTRL-Proximal for the linear part, on sharded tables whose rows are ``[w, z, n, g]``.

McMahan et al., 2013, "Ad Click Prediction: a View from the Trenches", algorithm 1, for each coordinate with gradient g:

    σ = (√(n + g²) - √n) / α;    z += g - σ w;    n += g²
    w = 0 if |z| <= λ₁, else -(z - sign(z) λ₁) / ((β + √n) / α + λ₂)

FBGEMM has no such kernel. ``WideLookup`` puts the weight's gradient into slot 3 of the row's gradient. Compiled kernels of a
CPU update the row by that (``trainer.sharding.cpu_tables``). Elsewhere FBGEMM's plain SGD with rate 1 leaves there -g, summed
over the batch and over ranks, and after backward the rows that this step looked up are updated where they lie, and slot 3
returns to zero. The state is part of the table, so it travels with it through every sharding and checkpoint.

Shapes: N ids of a kernel's call, F features of the kernel, R rows of 4 floats in the kernel's memory.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config.optim import TableOptimizerConfig
from trainer.modules.embeddings import WIDE_DIM, WideLookup, is_wide_table
from trainer.optim.touched_rows import RowNumbers, TouchedRows
from trainer.sharding.cpu_tables import CpuTables
from trainer.sharding.kernels import FusedKernel

GRADIENT_SLOT = 3


class FTRL:
    """Updates the wide tables of a sharded model after backward. Its state lives in the tables.

    Wide tables must have plain SGD with rate 1 fused in (``apply_table_optimizers``) and whole rows (table-wise or
    row-wise).
    """

    def __init__(self, model: nn.Module, kernels: Iterable[FusedKernel], config: TableOptimizerConfig) -> None:
        assert config.name == "ftrl", config
        self.config = config
        self._kernels = [
            _Kernel(TouchedRows(kernel))
            for kernel in kernels
            if any(is_wide_table(shard.name) for shard in kernel.shards)
        ]
        for module in model.modules():
            if isinstance(module, WideLookup):
                module.collect_gradient(GRADIENT_SLOT)
        self.restore_rate(config.lr)

    @torch.no_grad()
    def step(self) -> None:
        """Updates the rows looked up by training forward passes since the last call. A row whose gradient is exactly 0
        stays as it is."""
        for kernel in self._kernels:
            for touched in kernel.lookups:
                rows = kernel.rows()
                rows.index_copy_(0, touched, ftrl_update(rows.index_select(0, touched), self.config))
            kernel.lookups.clear()

    @torch.no_grad()
    def change_rate(self, lr: float) -> None:
        """A new α, which leaves every weight as it is. (z holds Σ g - (β + √n) / α w, σ being the growth of the last term
        but one, so a change of α moves z by that term's; with α alone changed, w would jump.) A pass over the tables."""
        by = 1 / lr - 1 / self.config.lr
        for kernel in self._kernels:
            for rows in kernel.wide_rows():
                rows[:, 1] -= (self.config.beta + rows[:, 2].sqrt()) * by * rows[:, 0]
        self.restore_rate(lr)

    def restore_rate(self, lr: float) -> None:
        """The α that the tables' state has been made with."""
        self.config = replace(self.config, lr=lr)
        for kernel in self._kernels:
            kernel.learn_in_backward(self.config)


def ftrl_update(rows: Tensor, config: TableOptimizerConfig) -> Tensor:
    """The rows ``[w, z, n, -g]`` after a step, as ``[w, z, n, 0]``: [N, 4], in place, in as few kernels as there are."""
    w, z, n, negative_g = rows.unbind(1)  # [N] each
    root = n.sqrt()
    n.addcmul_(negative_g, negative_g)
    grown_root = n.sqrt()
    z.sub_(negative_g).addcmul_(root.sub_(grown_root), w, value=1 / config.lr)
    # softshrink(z, l1) is z - sign(z) l1 beyond l1 and exactly 0 within.
    negative_denominator = torch.rsub(grown_root, -(config.beta / config.lr + config.l2), alpha=1 / config.lr)
    weight = functional.softshrink(z, config.l1).div_(negative_denominator)
    # Without a gradient z and n are what they were, but w may be an initial value, or 0 / 0 with n and beta of 0.
    torch.where(negative_g != 0, weight, w, out=w)
    negative_g.zero_()
    return rows


class _Kernel:
    """A kernel with wide tables, perhaps among others, and the rows that are still to be updated, where they lie
    among ``rows``: [N] for each lookup."""

    def __init__(self, touched: TouchedRows) -> None:
        self._rows = touched
        self._learns_in_backward = isinstance(touched.kernel, CpuTables) and touched.kernel.takes_ftrl
        self.lookups = [] if self._learns_in_backward else touched.numbers_after_backward(self._addresses())

    def learn_in_backward(self, config: TableOptimizerConfig) -> None:
        """Where the kernel can."""
        if self._learns_in_backward:
            wide = [number for number, shard in enumerate(self._rows.shards) if is_wide_table(shard.name)]
            self._rows.kernel.learn_by_ftrl(wide, alpha=config.lr, beta=config.beta, l1=config.l1, l2=config.l2)

    def rows(self) -> Tensor:
        """The kernel's memory as rows of 4 floats: [R, 4]."""
        return self._rows.memory.view(-1, WIDE_DIM)

    def wide_rows(self) -> list[Tensor]:
        """The rows of each wide table's shard, live: [R, 4] each."""
        begins = dict(zip(self._rows.shard_of_feature, self._rows.begins, strict=True))
        places = [(begins[number] // WIDE_DIM, shard) for number, shard in enumerate(self._rows.shards)]
        rows = self.rows()
        return [rows[begin : begin + shard.local_rows] for begin, shard in places if is_wide_table(shard.name)]

    def _addresses(self) -> RowNumbers:
        """Where rows lie, in rows of 4 floats: all widths are multiples of 4, and so are all offsets."""
        places = dict(zip(self._rows.shard_of_feature, self._rows.begins, strict=True))
        begins = [
            places[number] // WIDE_DIM if is_wide_table(shard.name) and number in places else None
            for number, shard in enumerate(self._rows.shards)
        ]
        # An id of another table stands for the first wide row: updating that one too changes nothing (its gradient is 0
        # or it is updated anyway, to the same values), and no mask has to be counted, which would stop a GPU.
        return RowNumbers(self._rows, begins, other=next(begin for begin in begins if begin is not None))
