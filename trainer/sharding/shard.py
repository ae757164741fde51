"""The sharded model, and what must hold once it is built."""

from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import (
    DefaultDataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.types import ShardingPlan

from trainer.sharding.cpu_tables import CpuTables
from trainer.sharding.torchrec_internals import lookups_of, sharders, table_kernels, without_ddp


def shard(model: nn.Module, plan: ShardingPlan, device: torch.device, *, compiled: bool) -> DistributedModelParallel:
    """Moves the tables to where the plan says, uninitialised (see ``initialize_tables``), and the dense part to
    DistributedDataParallel, with rank 0's values. One rank alone has none: it would take a copy of each gradient and an
    all-reduce a step. ``compiled``: on a CPU, tables work by compiled kernels.

    The dense graph must be the same at every step (``static_graph``: gradients are all-reduced while backward runs and
    stay in the buckets they are reduced in); buffers belong to their rank.
    """
    on_cpu, several = device.type == "cpu", dist.get_world_size() > 1
    with table_kernels(partial(CpuTables, compiled=compiled)) if on_cpu else nullcontext():
        sharded = DistributedModelParallel(
            model,
            device=device,
            plan=plan,
            sharders=sharders(),
            init_data_parallel=several,
            data_parallel_wrapper=DefaultDataParallelWrapper(bucket_cap_mb=25, static_graph=True),
        )
    if several:
        _settle_buckets(sharded)
    else:
        sharded.module.to(device)
        without_ddp(sharded)
    return sharded


def _settle_buckets(model: nn.Module) -> None:
    """DistributedDataParallel sorts its buckets anew in its third step, by the order in which gradients came, and where a
    gradient lies in a bucket decides in which order a ring of three or more ranks adds it up. Three empty steps before
    the first real one, with the gradients of all parameters 0, leave the buckets as they will stay: a resumed run then
    adds up as the uninterrupted one."""
    everywhere = [model, *lookups_of(model)]
    found = [m for part in everywhere for m in part.modules() if isinstance(m, DistributedDataParallel)]
    for wrapped in dict.fromkeys(found):
        ignored = wrapped.parameters_to_ignore
        parameters = [p for name, p in wrapped.module.named_parameters() if p.requires_grad and name not in ignored]
        wrapped.module.forward = lambda _, parameters=parameters: sum(0 * p.flatten()[0] for p in parameters)
        for _ in range(3):
            wrapped(None).backward()  # with device_ids, DistributedDataParallel cannot be called without an argument
        del wrapped.module.forward
        wrapped.zero_grad()
