"""All that the trainer does by private names of TorchRec (1.6 and 1.8), and TorchRec's classes that it puts right, each with the
reason."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import batched_embedding_kernel
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ShardingOption, Storage
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist
from torchrec.distributed.types import CommOp, ModuleSharder, ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.config.sharding import SHARDING_TYPES
from trainer.sharding.table_plan import EmbeddingTable

EXCHANGES = (  # of lookups' results and their gradients
    CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL.name,
    CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER.name,
    CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name,
)
ROW_WISE = ("row_wise", "table_row_wise")  # pooled by sums whatever the table's pooling


@contextlib.contextmanager
def table_kernels(make: Callable[..., nn.Module]) -> Iterator[None]:
    """Within, TorchRec has ``make`` for FBGEMM's class of tables with an optimizer fused in: it has no argument for that."""
    fbgemm = batched_embedding_kernel.SplitTableBatchedEmbeddingBagsCodegen
    batched_embedding_kernel.SplitTableBatchedEmbeddingBagsCodegen = make
    try:
        yield
    finally:
        batched_embedding_kernel.SplitTableBatchedEmbeddingBagsCodegen = fbgemm


def lookups_of(model: nn.Module) -> list[nn.Module]:
    """What holds the kernels of a sharded model: lists of their collections, and so not among ``model.modules()``."""
    collections = [module for module in model.modules() if isinstance(module, ShardedEmbeddingModule)]
    return [lookup for module in collections for lookup in module._lookups]


def without_ddp(model: nn.Module) -> None:
    """Takes the lookups of data-parallel tables out of their DistributedDataParallel."""
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingModule):
            for number, lookup in enumerate(module._lookups):
                if isinstance(lookup, DistributedDataParallel):
                    module._lookups[number] = lookup.module


def chosen_options(planner: EmbeddingShardingPlanner) -> list[ShardingOption]:
    """Those that its last plan is made of: the plan itself has no estimates of memory and times."""
    return planner._best_plan or []


class BagSharder(EmbeddingBagCollectionSharder):
    """TorchRec's, with the row-wise types it leaves out on a CPU though they work there, and with right means."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SHARDING_TYPES)

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        return ShardedBags(
            module=module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )


class SequenceSharder(EmbeddingCollectionSharder):
    """TorchRec's; looks for repeated ids on a GPU only where they would cross the network, since that takes two dozen
    launches and a wait a step."""

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingCollection:
        cross = env.world_size > 1 and any(each.sharding_type != "data_parallel" for each in params.values())
        self._use_index_dedup = cross and device is not None and device.type == "cuda"
        return super().shard(module, params, env, device, module_fqn)


class ShardedBags(ShardedEmbeddingBagCollection):
    """TorchRec's, with its division for mean pooling put right.

    A row-wise table is pooled by sums, since no rank has all ids of a bag, and TorchRec (1.6 and 1.8) divides the
    result by the length of the bag plus 1e-6. It divides the columns of *all* tables of the collection, also those that
    a table-wise kernel has averaged already or that are sums, and takes a feature that one table sums for a sum in
    every other table.

    With ``deterministic`` the ids of a bag also keep their order on their way to the shards of a row-wise table, as those
    of a sequence do: FBGEMM's kernel for bags takes them in any order, and so a GPU would add them up in any order.
    """

    def _create_input_dist(self, input_feature_names: list[str]) -> None:
        super()._create_input_dist(input_feature_names)
        if torch.are_deterministic_algorithms_enabled():
            for exchange in self._input_dists:
                if isinstance(exchange, RwSparseFeaturesDist):
                    exchange._is_sequence = True

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Any:
        divides: bool = self._has_mean_pooling_callback  # type: ignore[has-type]
        self._has_mean_pooling_callback = False
        try:
            distributed = super().input_dist(ctx, features)
        finally:
            self._has_mean_pooling_callback = divides
        if divides:
            ctx.divisor = self._divisor(features)
        return distributed

    @torch.no_grad()
    def _divisor(self, features: KeyedJaggedTensor) -> Tensor:
        """What each entry of the output [B, ΣD] is to be divided by."""
        keys, divided, widths = self._columns(tuple(features.keys()))
        lengths = features.lengths().view(len(features.keys()), -1).index_select(0, keys)  # [columns, B]
        divisor = torch.where(divided, lengths.clamp(min=1), 1).T.to(torch.float32)
        return divisor.repeat_interleave(widths, dim=1, output_size=sum(self._embedding_dims))

    def _columns(self, keys: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each column of the output: its feature's place among ``keys``, whether to divide it, its width."""
        known = self.__dict__.setdefault("_columns_by_keys", {})
        if keys not in known:
            configs = self._embedding_bag_configs
            place, divided = {}, {}
            for config, names in zip(configs, get_embedding_names_by_table(configs), strict=True):
                row_wise = self.module_sharding_plan[config.name].sharding_type in ROW_WISE
                for feature, name in zip(config.feature_names, names, strict=True):
                    place[name], divided[name] = keys.index(feature), row_wise and config.pooling == PoolingType.MEAN
            known[keys] = (
                torch.tensor([place[name] for name in self._embedding_names], device=self._device),
                torch.tensor([[divided[name]] for name in self._embedding_names], device=self._device),
                torch.tensor(self._embedding_dims, device=self._device),
            )
        return known[keys]


def sharders() -> list[ModuleSharder[nn.Module]]:
    """For both kinds of collections. Ids are checked in the loader, so FBGEMM's check (a pass over all ids, which turns
    a bad id into row 0) is off."""
    fused = {"bounds_check_mode": BoundsCheckMode.NONE}
    return [
        BagSharder(fused_params=dict(fused)),
        SequenceSharder(fused_params=dict(fused)),
    ]


class Enumerator(EmbeddingEnumerator):
    """TorchRec's, with three things put right.

    The memory of optimizer state is ours: TorchRec takes it for as many values of the weights' own type, by the class of
    an optimizer (which our parameters do not carry), and knows no counts. Lookups give fp32 and exchange fp32, forward
    and backward: TorchRec takes both to be of the tables' type. And options are in a fixed order: TorchRec takes them from
    a set of strings, whose order differs from process to process, and equally good plans would be chosen by chance."""

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        constraints: dict[str, ParameterConstraints],
        tables: Sequence[EmbeddingTable],
    ) -> None:
        super().__init__(topology, batch_size, constraints)
        self._tables, self._gpu = {table.name: table for table in tables}, topology.compute_device == "cuda"
        self.open: list[ShardingOption] = []

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        for data in self._sharder_data_map.values():
            data.qcomm_dtype_sizes.update(dict.fromkeys(EXCHANGES, (4.0, 4.0)))
        for option in sharding_options:
            option.output_dtype = DataType.FP32
        super().populate_estimates(sharding_options)
        for option in sharding_options:
            option.output_dtype = (
                None  # else it goes into the plan, and from there to FBGEMM, which has it from its default
            )
            for part in option.shards:
                size = self._tables[option.name].state_bytes(*part.size)
                part.storage += Storage(hbm=size, ddr=0) if self._gpu else Storage(hbm=0, ddr=size)

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        options = super().enumerate(module, sharders)
        self.open = sorted(
            options, key=lambda o: (o.path, o.name, SHARDING_TYPES.index(o.sharding_type), o.compute_kernel)
        )
        return self.open
