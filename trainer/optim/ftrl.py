"""FTRL-Proximal for the linear part, on sharded tables whose rows are ``[w, z, n, g]``.

McMahan et al., 2013, "Ad Click Prediction: a View from the Trenches", algorithm 1, for each coordinate with gradient g:

    σ = (√(n + g²) - √n) / α;    z += g - σ w;    n += g²
    w = 0 if |z| <= λ₁, else -(z - sign(z) λ₁) / ((β + √n) / α + λ₂)

FBGEMM has no such kernel. Here ``WideLookup`` puts the weight's gradient into slot 3 of the row's gradient, and
FBGEMM's plain SGD with rate 1 leaves there -g, summed over the batch and over ranks. After backward the rows that this
step looked up are updated where they lie and slot 3 returns to zero. The state is part of the table, so it travels with
it through every sharding and checkpoint.

Rows are taken from the ids that each kernel was called with, repetitions included: all are gathered before any is
written and equal ids write equal values, so nothing needs to be made unique (on one core, 160,000 ids: 5 ms to update
them all, 5 ms for ``unique`` alone).

Shapes: N ids of a kernel's call, F features of the kernel, R rows of 4 floats in the kernel's memory.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.nn import functional
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig

from trainer.config.optim import TableOptimizerConfig
from trainer.modules.embeddings import WIDE_DIM, WideLookup, is_wide_table
from trainer.optim.tables import fused_kernels

GRADIENT_SLOT = 3


class FTRL:
    """Updates the wide tables of a sharded model after backward. Its state lives in the tables.

    Wide tables must have plain SGD with rate 1 fused in (``apply_table_optimizers``) and whole rows (table-wise or
    row-wise).
    """

    def __init__(self, model: nn.Module, config: TableOptimizerConfig) -> None:
        assert config.name == "ftrl", config
        self.config = config
        self._kernels = [
            _Kernel(kernel, tables)
            for kernel, tables in fused_kernels(model)
            if any(is_wide_table(table.name) for table in tables.embedding_tables)
        ]
        for module in model.modules():
            if isinstance(module, WideLookup):
                module.gradient_slot = GRADIENT_SLOT

    @torch.no_grad()
    def step(self) -> None:
        """Updates the rows looked up by training forward passes since the last call. A row whose gradient is exactly 0
        stays as it is."""
        for kernel in self._kernels:
            for touched in kernel.touched:
                rows = kernel.rows()
                rows.index_copy_(0, touched, ftrl_update(rows.index_select(0, touched), self.config))
            kernel.touched.clear()

    @torch.no_grad()
    def change_rate(self, lr: float) -> None:
        """A new α, which leaves every weight as it is. (z holds Σ g - (β + √n) / α w, σ being the growth of the last term
        but one, so a change of α moves z by that term's; with α alone changed, w would jump.) A pass over the tables."""
        by = 1 / lr - 1 / self.config.lr
        for kernel in self._kernels:
            for rows in kernel.wide_rows():
                rows[:, 1] -= (self.config.beta + rows[:, 2].sqrt()) * by * rows[:, 0]
        self.config = replace(self.config, lr=lr)


def ftrl_update(rows: Tensor, config: TableOptimizerConfig) -> Tensor:
    """The rows ``[w, z, n, -g]`` after a step, as ``[w, z, n, 0]``: [N, 4] -> [N, 4]."""
    w, z, n, negative_g = rows.unbind(1)  # [N] each
    g = -negative_g
    root, grown = n.sqrt(), n + g * g
    grown_root = grown.sqrt()
    moved = z + g - (grown_root - root) / config.lr * w
    # softshrink(z, l1) is z - sign(z) l1 beyond l1 and exactly 0 within.
    weight = -functional.softshrink(moved, config.l1) / ((config.beta + grown_root) / config.lr + config.l2)
    # Without a gradient z and n are what they were, but w may be an initial value, or 0 / 0 with n and beta of 0.
    return torch.stack((torch.where(g != 0, weight, w), moved, grown, torch.zeros_like(g)), dim=1)


@dataclass
class _Kernel:
    """An FBGEMM kernel with wide tables, perhaps among others, and the rows it touched."""

    kernel: SplitTableBatchedEmbeddingBagsCodegen
    tables: GroupedEmbeddingConfig
    touched: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        wide = [is_wide_table(table.name) for table in self.tables.embedding_tables]
        wide_feature = torch.tensor([wide[table] for table in self.kernel.feature_table_map])
        # Where a feature's table begins, in rows of 4 floats: all widths are multiples of 4, and so are all offsets.
        begins = self.kernel.weights_offsets.cpu() // WIDE_DIM  # [F]
        # An id of another table stands for the first wide row: updating that one too changes nothing (its gradient is 0
        # or it is updated anyway, to the same values), and no mask has to be counted, which would stop a GPU.
        first = begins[wide_feature][0]
        device = self.kernel.weights_offsets.device
        self._begins = torch.where(wide_feature, begins, first).to(device)
        self._keeps = None if bool(wide_feature.all()) else wide_feature.long().to(device)
        self.kernel.register_forward_pre_hook(self._record, with_kwargs=True)

    def rows(self) -> Tensor:
        """The kernel's memory as rows of 4 floats: [R, 4]."""
        memory = self.kernel.weights_dev if self.kernel.weights_dev.numel() else self.kernel.weights_host
        return memory.detach().view(-1, WIDE_DIM)

    def wide_rows(self) -> list[Tensor]:
        """The rows of each wide table's shard, live: [R, 4] each."""
        found, tables = [], self.tables.embedding_tables
        begins = dict(zip(self.kernel.feature_table_map, self.kernel.weights_offsets.tolist(), strict=False))
        for number, table in enumerate(tables):
            if is_wide_table(table.name):
                begin = begins[number] // WIDE_DIM
                found.append(self.rows()[begin : begin + table.local_rows])
        return found

    def _record(self, kernel: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not (kernel.training and torch.is_grad_enabled()):
            return
        indices = named["indices"] if "indices" in named else inputs[0]  # [N], local to the shard
        offsets = named["offsets"] if "offsets" in named else inputs[1]  # [F * bags + 1]
        if indices.numel():
            self.touched.append(self._addresses(indices.long(), offsets.long()))

    def _addresses(self, indices: Tensor, offsets: Tensor) -> Tensor:
        features = self._begins.numel()
        bags = (offsets.numel() - 1) // features
        counts = offsets[::bags].diff()  # [F] ids of a feature

        def spread(values: Tensor) -> Tensor:
            return values.repeat_interleave(counts, output_size=indices.numel())

        if self._keeps is not None:
            indices = indices * spread(self._keeps)
        return indices + spread(self._begins)
