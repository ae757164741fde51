"""A small sharded model: its tables, plans and batches."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_loaders.batch import Batch, Cursor
from tests.helpers.whole_tables import gather_table
from trainer import kernels
from trainer.config.optim import OptimConfig
from trainer.config.sharding import ShardingConfig
from trainer.modules.embeddings import InitialValues, WideLookup
from trainer.optim.tables import apply_table_optimizers
from trainer.runtime.step_mask import StepMask
from trainer.sharding.initialize import initialize_tables
from trainer.sharding.planner import make_plan
from trainer.sharding.shard import shard
from trainer.sharding.table_plan import TablePlan

CPU = torch.device("cpu")
# In this order, so that tables of other widths lie between and behind wide ones in a kernel's memory.
DIMS = {"wide_item": 4, "user": 8, "item": 16, "wide_user": 4, "clicked": 8}
ROWS = {"wide_item": 7, "user": 11, "item": 7, "wide_user": 11, "clicked": 13}
FEATURES = {
    "wide_item": ["item"],
    "user": ["user", "friends"],
    "item": ["item"],
    "wide_user": ["user"],
    "clicked": ["clicks"],
}
TOP_WEIGHT = torch.linspace(-1.0, 1.0, 32)  # of the dense layer: [user 8, friends 8, item 16]


def unmasked() -> StepMask:
    """Of steps that all count."""
    return StepMask(CPU)


class Head(nn.Module):
    """All that computes, away from the pipeline's tracer."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Linear(32, 1, bias=False)
        with torch.no_grad():
            self.top.weight.copy_(TOP_WEIGHT)
        self.wide = WideLookup()

    def forward(self, pooled, clicks, batch: Batch) -> tuple[Tensor, Tensor]:
        columns = pooled.to_dict()
        deep = torch.cat([columns["user@user"], columns["friends"], columns["item@item"]], dim=1)  # [B, 32]
        wide = self.wide(torch.cat([columns["user@wide_user"], columns["item@wide_item"]], dim=1))  # [B, 2]
        logits = self.top(deep).squeeze(1) + wide.sum(1)
        if clicks is not None:
            jagged = clicks["clicks"]
            sums = torch.segment_reduce(jagged.values().sum(1), "sum", lengths=jagged.lengths(), initial=0.0)
            logits = logits + sums  # [B]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
        return (loss * batch.weights).sum() / batch.normalizer, logits


class TinyModel(nn.Module):
    """A linear model over two deep tables (one with two features), two wide ones and perhaps a sequence."""

    def __init__(
        self, sequence: bool = False, rows: Mapping[str, int] = ROWS, data_type: DataType = DataType.FP32
    ) -> None:
        super().__init__()
        meta = torch.device("meta")
        pooling = {"item": PoolingType.MEAN}
        self.bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=rows[name],
                    embedding_dim=DIMS[name],
                    feature_names=FEATURES[name],
                    pooling=pooling.get(name, PoolingType.SUM),
                    data_type=DataType.FP32 if name.startswith("wide_") else data_type,
                )
                for name in DIMS
                if name != "clicked"
            ],
            device=meta,
        )
        clicked = EmbeddingConfig(
            name="clicked",
            num_embeddings=rows["clicked"],
            embedding_dim=8,
            feature_names=["clicks"],
            data_type=data_type,
        )
        self.sequences = EmbeddingCollection(tables=[clicked], device=meta) if sequence else None
        self.head = Head()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pooled = self.bags(batch.sparse)
        clicks = self.sequences(batch.sequence) if self.sequences is not None else None
        return self.head(pooled, clicks, batch)


def make_batch(rank: int, world_size: int, step: int, size: int = 6, rows: Mapping[str, int] = ROWS) -> Batch:
    """Bags of 0 to 3 ids with many repetitions within a bag, a batch and over ranks."""
    generator = torch.Generator().manual_seed(1000 * step + rank)

    def jagged(keys: list[str], tables: list[str]) -> KeyedJaggedTensor:
        lengths = torch.randint(0, 4, (len(keys), size), generator=generator)
        counts = lengths.sum(1).tolist()
        ids = [torch.randint(0, rows[t], (n,), generator=generator) for t, n in zip(tables, counts, strict=True)]
        return KeyedJaggedTensor(keys=keys, values=torch.cat(ids), lengths=lengths.flatten())

    labels = torch.randint(0, 2, (size,), generator=generator).float()
    return Batch(
        dense=torch.zeros(size, 0),
        sparse=jagged(["user", "friends", "item"], ["user", "user", "item"]),
        sequence=jagged(["clicks"], ["clicked"]),
        labels=labels,
        weights=torch.ones(size),
        normalizer=torch.tensor(float(size)),
        cursor=Cursor(0, step + 1, size * world_size, size),
    )


def reference_loss(tables: Mapping[str, Tensor], top: Tensor, batch: Batch, sequence: bool) -> Tensor:
    """The same model by plain lookups, in the tables' precision."""

    def bags(feature: str, table: str, mode: str) -> Tensor:
        jagged = (batch.sequence if feature == "clicks" else batch.sparse)[feature]
        rows = [tables[table][ids] for ids in jagged.values().split(jagged.lengths().tolist())]
        pooled = [r.sum(0) / (max(len(r), 1) if mode == "mean" else 1) for r in rows]
        return torch.stack(pooled)

    deep = [bags("user", "user", "sum"), bags("friends", "user", "sum"), bags("item", "item", "mean")]
    wide = bags("user", "wide_user", "sum")[:, 0] + bags("item", "wide_item", "sum")[:, 0]
    logits = torch.cat(deep, dim=1) @ top + wide
    if sequence:
        logits = logits + bags("clicks", "clicked", "sum").sum(1)
    return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.to(logits.dtype))


def build(
    world_size: int,
    sharding: ShardingConfig,
    optim: OptimConfig,
    *,
    sequence: bool = False,
    rows: Mapping[str, int] = ROWS,
    model: nn.Module | None = None,
    seed: int = 3,
    compiled: bool | None = None,
) -> tuple[DistributedModelParallel, tuple[TablePlan, ...]]:
    """The tiny model, planned, sharded and initialised: deep tables with deviation 0.5, wide ones with 0. ``compiled``: by
    default where there are compiled kernels."""
    model = model or TinyModel(sequence, rows)
    plan = make_plan(
        model, sharding, optim, batch_size=6, device=CPU, world_size=world_size, local_world_size=world_size
    )
    apply_table_optimizers(model, plan.tables, CPU)
    sharded = shard(model, plan.sharding, CPU, compiled=kernels.available() if compiled is None else compiled)
    deviations = {name: 0.0 if name.startswith("wide_") else 0.5 for name in DIMS}
    initialize_tables(sharded, plan.tables, seed, {name: InitialValues(std) for name, std in deviations.items()})
    return sharded, plan.tables


def all_tables(model: DistributedModelParallel, sequence: bool) -> dict[str, Tensor]:
    return {name: gather_table(model, name) for name in DIMS if sequence or name != "clicked"}


def everywhere(kind: str, *, wide: str | None = None) -> ShardingConfig:
    """All tables alike; wide ones apart where their 4 columns cannot be cut."""
    return ShardingConfig(types=[kind], by_table=dict.fromkeys(("wide_user", "wide_item"), wide) if wide else {})


LAYOUTS = {
    "table_wise": everywhere("table_wise"),
    "row_wise": everywhere("row_wise"),
    "column_wise": everywhere("column_wise", wide="table_wise"),
    "auto": ShardingConfig(),
    # Means by rows beside sums by tables, and the other way round.
    "mixed": ShardingConfig(
        by_table={"user": "table_wise", "item": "row_wise", "wide_user": "row_wise", "wide_item": "table_wise"}
    ),
}


def plan_alone(
    config: ShardingConfig,
    optim: OptimConfig,
    world_size: int = 2,
    device: str = "cpu",
    rows: Mapping[str, int] = ROWS,
    data_type: DataType = DataType.FP32,
) -> dict[str, dict]:
    """Rows of the plan's summary by table, for machines of up to 8 ranks."""
    model = TinyModel(True, rows, data_type)
    plan = make_plan(
        model,
        config,
        optim,
        batch_size=1024,
        device=torch.device(device),
        world_size=world_size,
        local_world_size=min(world_size, 8),
    )
    return {table.name: table.summary() for table in plan.tables}
