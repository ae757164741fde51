"""FBGEMM's tables on a CPU, looked up and updated by our kernels instead of FBGEMM's.

Memory, names, states and arguments stay FBGEMM's: plans, checkpoints and hooks do not notice. FBGEMM's own kernels take 9 to 50
times as long for sequences, and have no Adam on a CPU. Private names of FBGEMM (1.6 and 1.8): ``_apply_split``, which makes the
memory of a state.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
    construct_split_state,
)
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.kernels import tables

_OPTIMIZERS = {
    EmbOptimType.EXACT_SGD: "sgd",
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: "rowwise_adagrad",
    EmbOptimType.EXACT_ADAGRAD: "adagrad",
    EmbOptimType.ADAM: "adam",
}
_POOLINGS = {PoolingMode.SUM: "sum", PoolingMode.MEAN: "mean", PoolingMode.NONE: "none"}


class CpuTables(SplitTableBatchedEmbeddingBagsCodegen):
    """``compiled``: by compiled kernels; without them Adam works in PyTorch, and FBGEMM does the rest. Weights of ids that
    learn, and batches whose features differ in the number of bags, are FBGEMM's in any case."""

    def __init__(
        self,
        embedding_specs: list[tuple[int, int, EmbeddingLocation, ComputeDevice]],
        *,
        compiled: bool,
        optimizer: EmbOptimType = EmbOptimType.EXACT_SGD,
        **arguments: Any,
    ) -> None:
        adam = optimizer == EmbOptimType.ADAM
        # FBGEMM refuses Adam on a CPU. AdaGrad's state has the shape of Adam's first moment; the second one is added here.
        super().__init__(embedding_specs, optimizer=EmbOptimType.EXACT_ADAGRAD if adam else optimizer, **arguments)
        if adam:
            self.optimizer = optimizer
            self._apply_split(
                construct_split_state(embedding_specs, rowwise=False, cacheable=False),
                prefix="momentum2",
                dtype=torch.float32,
            )
        self._group = self._make_group()
        self._compiled, self._ftrl = compiled, tables.Rates(lr=0.0)

    @property
    def takes_ftrl(self) -> bool:
        return self._compiled

    def learn_by_ftrl(self, shards: Sequence[int], *, alpha: float, beta: float, l1: float, l2: float) -> None:
        """From now on, and in place of the optimizer, for the tables at these places among ``embedding_specs``."""
        numbers = [self.feature_table_map[start] for start in self._group.starts[:-1].tolist()]
        optimizers = zip(numbers, self._group.optimizers, strict=True)
        names = tuple("ftrl" if number in shards else name for number, name in optimizers)
        self._group, self._ftrl = (
            replace(self._group, optimizers=names),
            tables.Rates(0.0, alpha=alpha, beta=beta, l1=l1, l2=l2),
        )

    def forward(
        self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None, **further: Any
    ) -> Tensor:
        """[N], [F * B + 1] -> [B, sum of D], or of sequences [N, D]; weights [N] of the ids of bags."""
        adam = self.optimizer == EmbOptimType.ADAM
        learns = per_sample_weights is not None and per_sample_weights.requires_grad
        if learns or further or not (self._compiled or adam):
            return super().forward(indices, offsets, per_sample_weights, **further)
        if adam:
            self.iter.add_(1)
            self.iter_cpu.add_(1)
        weights = None if per_sample_weights is None else per_sample_weights.float()
        return _LookUp.apply(self.placeholder_autograd_tensor, self, indices.long(), offsets.long(), weights)

    def look_up(self, ids: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        look_up = tables.look_up if self._compiled else tables.look_up_in_torch
        return look_up(self._group, ids, offsets, weights)

    def update(self, ids: Tensor, offsets: Tensor, gradient: Tensor, weights: Tensor | None = None) -> None:
        update = tables.update if self._compiled else tables.update_by_adam_in_torch
        update(self._group, ids, offsets, gradient, self._rates(), weights)

    def _rates(self) -> tables.Rates:
        """Of this step."""
        arguments, step = self.optimizer_args, int(self.iter_cpu)
        return replace(
            self._ftrl,
            lr=float(self.learning_rate_tensor),
            eps=arguments.eps,
            beta1=arguments.beta1,
            beta2=arguments.beta2,
            correction1=1 - arguments.beta1**step,
            correction2=1 - arguments.beta2**step,
        )

    def _make_group(self) -> tables.TableGroup:
        of_feature = self.feature_table_map
        starts = [f for f in range(len(of_feature)) if f == 0 or of_feature[f] != of_feature[f - 1]]
        optimizer = _OPTIMIZERS[self.optimizer]
        has_state = optimizer != "sgd"
        return tables.TableGroup(
            memory=self.weights_host.data,
            columns=self.D_offsets.long(),
            begins=self.weights_offsets.long(),
            starts=torch.tensor([*starts, len(of_feature)]),
            optimizers=(optimizer,) * len(starts),
            pooling=_POOLINGS[self.pooling_mode],
            states=self.momentum1_offsets.long()[starts] if has_state else torch.zeros(len(starts), dtype=torch.long),
            first=self.momentum1_host.data if has_state else None,
            second=self.momentum2_host.data if optimizer == "adam" else None,
        )


class _LookUp(torch.autograd.Function):
    """Rows are updated in backward, as FBGEMM does."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, placeholder: Tensor, group: CpuTables, ids: Tensor, offsets: Tensor, weights: Tensor | None
    ) -> Tensor:
        ctx.looked_up = group, ids, offsets, weights
        return group.look_up(ids, offsets, weights)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[None, ...]:
        group, ids, offsets, weights = ctx.looked_up
        group.update(ids, offsets, gradient, weights)
        return None, None, None, None, None
