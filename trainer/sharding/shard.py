"""The sharded model: TorchRec's sharders as we need them, and what must hold once it is built."""

from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import (
    DefaultDataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist
from torchrec.distributed.types import (
    ModuleSharder,
    ParameterSharding,
    ShardingEnv,
    ShardingPlan,
)
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.config.sharding import SHARDING_TYPES
from trainer.optim.tables import (
    embedding_tables,
)

ROW_WISE = ("row_wise", "table_row_wise")  # pooled by sums whatever the table's pooling


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
        divides, self._has_mean_pooling_callback = self._has_mean_pooling_callback, False
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


def shard(model: nn.Module, plan: ShardingPlan, device: torch.device) -> DistributedModelParallel:
    """Moves the tables to where the plan says, uninitialised (see ``initialize_tables``), and the dense part to
    DistributedDataParallel, with rank 0's values.

    The dense graph must be the same at every step (``static_graph``: gradients are all-reduced while backward runs and
    stay in the buckets they are reduced in); buffers belong to their rank.
    """
    _check_dense_is_initialised(model)
    sharded = DistributedModelParallel(
        model,
        device=device,
        plan=plan,
        sharders=sharders(),
        data_parallel_wrapper=DefaultDataParallelWrapper(bucket_cap_mb=25, static_graph=True),
    )
    _settle_buckets(sharded)
    return sharded


def _settle_buckets(model: nn.Module) -> None:
    """DistributedDataParallel sorts its buckets anew in its third step, by the order in which gradients came, and where a
    gradient lies in a bucket decides in which order a ring of three or more ranks adds it up. Three empty steps before
    the first real one, with the gradients of all parameters 0, leave the buckets as they will stay: a resumed run then
    adds up as the uninterrupted one."""
    lookups = [module._lookups for module in model.modules() if isinstance(module, ShardedEmbeddingModule)]
    everywhere = [model, *(lookup for each in lookups for lookup in each)]  # _lookups is a plain list
    found = [m for part in everywhere for m in part.modules() if isinstance(m, DistributedDataParallel)]
    for wrapped in dict.fromkeys(found):
        ignored = wrapped.parameters_to_ignore
        parameters = [p for name, p in wrapped.module.named_parameters() if p.requires_grad and name not in ignored]
        wrapped.module.forward = lambda _, parameters=parameters: sum(0 * p.flatten()[0] for p in parameters)
        for _ in range(3):
            wrapped(None).backward()  # with device_ids, DistributedDataParallel cannot be called without an argument
        del wrapped.module.forward
        for parameter in parameters:
            parameter.grad = None


def _check_dense_is_initialised(model: nn.Module) -> None:
    """DistributedModelParallel gives meta parameters memory, but values only through ``reset_parameters``."""
    tables = {table.parameter for table in embedding_tables(model)}
    names = [name for name, parameter in model.named_parameters() if parameter.is_meta and name not in tables]
    bare = [name for name in names if not hasattr(model.get_submodule(name.rpartition(".")[0]), "reset_parameters")]
    assert not bare, f"dense parameters on meta without reset_parameters: {bare}"
