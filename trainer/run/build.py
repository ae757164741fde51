"""Configuration -> objects, in the order TorchRec needs: schema, model with tables on meta, task, plan, in-backward
table optimizers, sharding, dense optimizer, data, pipeline. Each step takes the values it uses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from data_loaders import synthetic
from data_loaders.errors import UserError
from data_loaders.loader import Loader
from data_loaders.manifest import Manifest
from data_loaders.messages import note
from data_loaders.schema import Layout, Schema
from data_loaders.storage import is_uri, root_name
from trainer import kernels
from trainer.config.data import DataConfig, StreamConfig
from trainer.config.job import LossConfig, TrainConfig
from trainer.modules.embeddings import initial_values_of_tables
from trainer.modules.execution import Execution
from trainer.modules.task import ClickTask
from trainer.optim.combined import CombinedOptimizer
from trainer.optim.tables import apply_table_optimizers
from trainer.runtime import cpu
from trainer.runtime.distributed import Ranks, all_reduce_sum, from_first, mean_over_ranks
from trainer.runtime.step_mask import StepMask
from trainer.sharding import initialize, planner, shard
from trainer.sharding.pipeline import StepPipeline
from trainer.sharding.table_plan import TablePlan

COUNTED_AT_ONCE = 1 << 16  # rows of a rank whose ids are held until they are counted


@dataclass(frozen=True)
class Built:
    """The sharded, steppable model, and the record of each of its tables."""

    task: DistributedModelParallel
    optimizer: CombinedOptimizer
    pipeline: StepPipeline
    mask: StepMask
    tables: tuple[TablePlan, ...]


def execution(config: TrainConfig, world_size: int) -> Execution:
    """Of a model that trains among ranks."""
    all_reduce = all_reduce_sum if world_size > 1 else None
    return Execution(
        cache(partial(autocast_dtype, config.precision)), all_reduce, config.kernels and kernels.available()
    )


def build_task(model: nn.Module, *, may_drop: bool, loss: LossConfig | None = None) -> ClickTask:
    """Model + loss; where rows may be dropped, the number of rows that a loss is the mean of is that of all ranks."""
    loss = loss or LossConfig()
    return ClickTask(
        model,
        label_smoothing=loss.label_smoothing,
        negative_sampling_rate=loss.negative_sampling_rate,
        mean_over_ranks=mean_over_ranks if may_drop else None,
    )


def build(config: TrainConfig, model: nn.Module, ranks: Ranks, local_batch_size: int, total_steps: int) -> Built:
    """Plans, shards and initialises a model and gives it its optimizers and pipeline."""
    if ranks.device.type == "cpu":
        cpu.multiply_float32_by_onednn()
    task = build_task(model, may_drop=config.data.schema.may_drop, loss=config.loss)
    plan = planner.make_plan(
        task,
        config.sharding,
        config.optim,
        batch_size=local_batch_size,
        device=ranks.device,
        world_size=ranks.world_size,
        local_world_size=ranks.local_world_size,
        ids_per_row=planner.ids_per_row(config.data.schema),
    )
    apply_table_optimizers(task, plan.tables, ranks.device)
    sharded = shard.shard(task, plan.sharding, ranks.device, compiled=config.kernels and kernels.available())
    initialize.initialize_tables(sharded, plan.tables, config.seed, initial_values_of_tables(config.data.schema))
    mask = StepMask(ranks.device)
    optimizer = CombinedOptimizer(sharded, plan.tables, config.optim, total_steps=total_steps, mask=mask)
    pipeline = StepPipeline(sharded, optimizer, ranks.device)
    return Built(sharded, optimizer, pipeline, mask, plan.tables)


def build_train_loader(
    data: DataConfig,
    layout: Layout,
    batch_size: int,
    seed: int,
    ranks: Ranks,
    manifest: Manifest | None = None,
    *,
    record_origin: bool = False,
) -> tuple[Loader, Manifest]:
    """The training stream and the files it reads: ``manifest``, or else all that ``data.train`` names."""
    manifest = manifest or scan(data, "train", layout)
    stream = data.stream
    order = {"batch_size": batch_size, "shards": stream.shards, "shuffle": stream.shuffle, "seed": seed}
    loader = _build_loader(manifest, data.schema, layout, stream, ranks, **order, record_origin=record_origin)
    return loader, manifest


def count_ids(
    optimizer: CombinedOptimizer, data: DataConfig, layout: Layout, batch_size: int, manifest: Manifest, ranks: Ranks
) -> None:
    """Before the first step of a run: counts how often each id occurs in the training data, for tables with mini-batch aware
    regularisation. Reads these tables' features alone, unless a row may be left out for another one."""
    regularised = optimizer.mini_batch_aware
    if not regularised.tables:
        return
    schema, labeled = data.schema, data.schema.may_drop
    if not schema.may_drop:
        wanted = {key for table in regularised.tables for key in table.features}
        layout = layout.only(wanted)
        numbers_left_out = {name: feature for name, feature in schema.features.items() if feature.table}
        schema = replace(schema, features=numbers_left_out)
    loader = build_ordered_loader(manifest, schema, layout, batch_size, data.stream, ranks, labeled=labeled)
    if ranks.is_first:
        note(f"Counting ids in {loader.num_rows:,} rows (mini_batch_l2) …")
    regularised.count(loader.epoch(0), batches_per_round=max(1, COUNTED_AT_ONCE // loader.local_batch_size))


def build_ordered_loader(
    manifest: Manifest,
    schema: Schema,
    layout: Layout,
    batch_size: int,
    stream: StreamConfig,
    ranks: Ranks,
    *,
    labeled: bool = True,
    group_by: Sequence[str] = (),
) -> Loader:
    """File order, each rank a contiguous part: for evaluation and prediction. ``group_by``: columns to group rows by."""
    whole = -(-batch_size // ranks.world_size) * ranks.world_size
    order = {"batch_size": whole, "shards": ranks.world_size, "shuffle": False, "contiguous": True, "seed": 0}
    return _build_loader(manifest, schema, layout, stream, ranks, **order, labeled=labeled, group_by=group_by)


def _build_loader(
    manifest: Manifest, schema: Schema, layout: Layout, stream: StreamConfig, ranks: Ranks, **order: Any
) -> Loader:
    return Loader(
        manifest,
        schema,
        layout,
        shuffle_rows=stream.shuffle_rows,
        threads=stream.threads,
        prefetch_batches=stream.prefetch_batches,
        rank=ranks.rank,
        world_size=ranks.world_size,
        pin_memory=ranks.device.type == "cuda",
        **order,
    )


def scan(data: DataConfig, split: str, layout: Layout) -> Manifest:
    """The files of a split, read by rank 0, the same on all ranks. Raises ``UserError`` on every rank."""
    paths = getattr(data, split)
    if not paths:
        raise UserError(
            f"data.{split} is empty: name at least one Parquet file, folder or glob under data.root={data.root}"
        )
    schema = data.schema
    extra = [name for name in (schema.label, schema.weight) if name]
    return from_first(lambda: Manifest.scan(paths, data.root, [*schema.columns(layout), *extra]))


def ensure_synthetic(data: DataConfig) -> None:
    """Writes the synthetic click log where ``data.root`` does not hold it yet (rank 0; the others wait). Raises
    ``UserError`` unless that is a local folder."""
    if data.synthetic is None:
        return
    if is_uri(root := root_name(data.root)):
        raise UserError(f"data.root is '{root}', but a synthetic log is written to a local folder: give one")
    rows = {"train": data.synthetic.train_rows, "valid": data.synthetic.valid_rows, "test": data.synthetic.test_rows}
    folder, seed = Path(root), data.synthetic.seed

    probability = data.probability or "click_probability"

    def write() -> None:
        if not synthetic.matches(data.schema, folder, rows=rows, seed=seed, probability=probability):
            note(f"Writing a synthetic click log of {sum(rows.values()):,} rows to {folder} …")
            synthetic.write(data.schema, folder, rows=rows, seed=seed, probability=probability)

    from_first(write)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bf16 if asked for, or (``auto``) where it is multiplied faster: recent GPUs, CPUs with AMX or AVX512-BF16."""
    if precision == "auto":
        fast = _multiplies_bf16() if device.type == "cuda" else cpu.multiplies_bf16()
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if precision == "bf16" else None


def _multiplies_bf16() -> bool:
    """Of this rank's GPU: PyTorch by default says yes where it would only emulate it."""
    return torch.cuda.is_bf16_supported(including_emulation=False)
