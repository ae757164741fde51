"""The FBGEMM kernels of a sharded model on this rank: which tables' shards each holds, the state that it keeps beside them, and
its count of steps."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.distributed.embedding_types import ShardedEmbeddingTable

from trainer.sharding.torchrec_internals import lookups_of


class FusedKernel(NamedTuple):
    """``shards``: of tables, as they lie in the memory of ``module``, one after the other."""

    module: SplitTableBatchedEmbeddingBagsCodegen
    shards: list[ShardedEmbeddingTable]


def fused_kernels(model: nn.Module) -> list[FusedKernel]:
    return _kernels(model, SplitTableBatchedEmbeddingBagsCodegen)


def dense_kernels(model: nn.Module) -> list[FusedKernel]:
    """Of data-parallel tables, which are whole on every rank: without an optimizer."""
    return _kernels(model, DenseTableBatchedEmbeddingBagsCodegen)


def _kernels(model: nn.Module, kind: type[nn.Module]) -> list[FusedKernel]:
    groups = [group for lookup in lookups_of(model) for group in lookup.modules()]
    found = [(getattr(group, "emb_module", None), group) for group in groups]
    return [FusedKernel(module, group.config.embedding_tables) for module, group in found if isinstance(module, kind)]


@dataclass(frozen=True)
class FusedShard:
    """What FBGEMM keeps beside a shard of ``table`` that begins at ``row`` and ``column``: live memory by the names of
    ``optim.tables.state_names``, [rows of the shard] for row-wise AdaGrad, else [rows, columns of the shard]."""

    table: str
    row: int
    column: int
    states: dict[str, Tensor]


def fused_shards(kernels: Iterable[FusedKernel]) -> list[FusedShard]:
    """The shards of the tables whose optimizer has states."""
    return [
        FusedShard(shard.name, row, column, states)
        for kernel, shards in kernels
        if kernel.optimizer != EmbOptimType.EXACT_SGD
        for shard, states in zip(shards, kernel.get_optimizer_state(), strict=True)
        for row, column in [shard.local_metadata.shard_offsets]
    ]


def set_fused_steps(kernels: Iterable[FusedKernel], step: int) -> None:
    """Sets the step count of fused Adam (its bias correction), which FBGEMM keeps out of the optimizer's state."""
    for kernel, _ in kernels:
        if kernel.optimizer == EmbOptimType.ADAM:
            kernel.iter.fill_(step)
            kernel.iter_cpu.fill_(step)


def count_training_steps_only(kernels: Iterable[FusedKernel]) -> None:
    """FBGEMM's Adam counts every forward pass as a step, evaluation too: takes those back, so that the bias correction
    depends on training steps alone and a resumed run equals an uninterrupted one."""
    for kernel, _ in kernels:
        if kernel.optimizer == EmbOptimType.ADAM:
            kernel.register_forward_hook(_uncount_evaluation)


def _uncount_evaluation(kernel: nn.Module, inputs: Any, output: Any) -> None:
    if not kernel.training:
        kernel.iter.sub_(1)
        kernel.iter_cpu.sub_(1)


def pointwise_states(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> list[Tensor]:
    """What Adam keeps, live and laid out as the kernel's weights are; none of other optimizers."""
    if kernel.optimizer != EmbOptimType.ADAM:
        return []
    on_device = kernel.weights_dev.numel() > 0
    names = ("momentum1", "momentum2")
    found = [getattr(kernel, f"{name}_{'dev' if on_device else 'host'}").data for name in names]
    assert all(state.numel() == max(kernel.weights_dev.numel(), kernel.weights_host.numel()) for state in found)
    return found
