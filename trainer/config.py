"""Dataclasses for every section of the configuration: Hydra's schema, and what the program sees below its edge.

Each ``__post_init__`` checks what types cannot: it runs when the composed configuration becomes objects, before any
process group starts. Every ``ValueError`` names the key, the value and the remedy.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from data_loaders.schema import Schema, one_of
from trainer.warm_start.rules import WarmStartConfig

TABLE_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd", "adam", "ftrl")
DENSE_OPTIMIZERS = ("adam", "adamw", "adagrad", "sgd", "rmsprop", "adamax", "nadam", "radam", "adadelta")
SHARDING_TYPES = ("table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard", "data_parallel")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
DECAYS = ("constant", "linear", "cosine")
RESUMES = ("auto", "never")
BEST = ("valid.auc", "valid.logloss", "valid.ne")
ON_CORRUPT = ("fallback", "error")


@dataclass
class RunConfig:
    """``dir`` is the run folder; left empty it is ``root/name/<date-time>``, chosen once by rank 0."""

    root: str = "runs"
    name: str = "run"
    dir: str | None = None

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name in (".", "..") or len(self.name) > 200:
            raise ValueError(f"run.name is {self.name!r}: give a plain folder name of 1 to 200 characters, without '/'")


@dataclass
class StreamConfig:
    """How rows are read. ``shards``: logical shards, each a fixed part of every global batch; with ``seed`` they alone
    fix the order of rows, whatever the number of ranks. ``shuffle: false`` takes rows in order of files (time), a batch
    after the other. ``shuffle_rows``: rows in the shuffle buffer over all ranks."""

    shards: int = 64
    shuffle: bool = True
    shuffle_rows: int = 1 << 18
    threads: int = 1
    prefetch_batches: int = 4

    def __post_init__(self) -> None:
        for name in ("shards", "shuffle_rows", "threads", "prefetch_batches"):
            positive(getattr(self, name), f"data.stream.{name}")


@dataclass
class SyntheticConfig:
    """Rows to generate where ``data.root`` has none; only ``data=synthetic`` sets it."""

    train_rows: int = 1_000_000
    valid_rows: int = 100_000
    test_rows: int = 100_000
    seed: int = 7


@dataclass
class DataConfig:
    """``train``, ``valid`` and ``test`` are paths, folders or globs under ``root``, a folder or a URI (``s3://…``).
    ``probability`` names a column with the true click probability, where the data has one (synthetic): the best possible
    AUC is then reported.

    ``new_since`` is the folder of an earlier run, or of one of its checkpoints: of the files of ``train`` only those are
    trained that it and the runs before it (their own ``new_since``) have not seen. They are known by their paths under
    ``root``.

    ``prepared`` is the output folder of ``data_loaders.prepare`` that the files come from: with its vocabularies and
    statistics ``trainer.predict --raw`` turns raw rows into the same features."""

    name: str = ""
    root: str = "???"  # OmegaConf's mark of a mandatory value
    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    new_since: str | None = None
    prepared: str | None = None
    probability: str | None = None
    synthetic: SyntheticConfig | None = None
    stream: StreamConfig = field(default_factory=StreamConfig)
    schema: Schema = field(default_factory=Schema)


@dataclass
class TableOptimizerConfig:
    """The optimizer of embedding tables, fused into backward. ``lr`` is FTRL's alpha; ``beta``, ``l1`` and ``l2`` belong
    to FTRL, ``eps`` to the AdaGrads and Adam, ``beta1`` and ``beta2`` to Adam."""

    name: str = "rowwise_adagrad"
    lr: float = 0.02
    eps: float = 1e-8
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        one_of(self.name, TABLE_OPTIMIZERS, "optim: table optimizer name")
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise ValueError(f"optim: a table optimizer's lr is {self.lr}: it must be a positive number")
        for name in ("eps", "weight_decay", "beta", "l1", "l2"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim: a table optimizer's {name} is {getattr(self, name)}: it must not be negative")


@dataclass
class ScheduleConfig:
    """Learning rate of the dense optimizer: a linear warm-up over ``warmup_steps``, then ``decay`` to ``final`` times the
    rate at the end of the run."""

    warmup_steps: int = 0
    decay: str = "constant"
    final: float = 0.0

    def __post_init__(self) -> None:
        one_of(self.decay, DECAYS, "optim.dense.schedule.decay")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.dense.schedule.warmup_steps is {self.warmup_steps}: it must not be negative")
        if not 0 <= self.final <= 1:
            raise ValueError(f"optim.dense.schedule.final is {self.final}: it is a share of the rate, from 0 to 1")


@dataclass
class DenseOptimizerConfig:
    """A ``torch.optim`` optimizer. ``options`` are further arguments of its constructor (``betas``, ``momentum`` …)."""

    name: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        one_of(self.name, DENSE_OPTIMIZERS, "optim.dense.name")
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise ValueError(f"optim.dense.lr is {self.lr}: it must be a positive number")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optim.dense.clip_norm is {self.clip_norm}: give a positive norm, or null for none")


@dataclass
class OptimConfig:
    """``tables`` is for all tables but those of the linear part (``wide``) and those named in ``by_table``."""

    tables: TableOptimizerConfig = field(default_factory=TableOptimizerConfig)
    wide: TableOptimizerConfig = field(default_factory=lambda: TableOptimizerConfig(name="adagrad"))
    by_table: dict[str, TableOptimizerConfig] = field(default_factory=dict)
    dense: DenseOptimizerConfig = field(default_factory=DenseOptimizerConfig)

    def __post_init__(self) -> None:
        for where, table in (("tables", self.tables), *((f"by_table.{n}", t) for n, t in self.by_table.items())):
            if table.name == "ftrl":
                raise ValueError(
                    f"optim.{where}.name is 'ftrl', which is for the linear part only (its rows carry FTRL's state): "
                    "set optim.wide.name=ftrl, and one of rowwise_adagrad, adagrad, sgd, adam here"
                )

    def of_table(self, table: str, *, wide: bool) -> TableOptimizerConfig:
        return self.by_table.get(table, self.wide if wide else self.tables)


@dataclass
class ShardingConfig:
    """``types``: sharding types the planner may choose from; empty: all that the device and the optimizer allow.
    ``by_table``: one type for a table. ``hbm_gb``, ``ddr_gb``: memory of one device and of one rank's share of the host;
    left empty they are measured."""

    types: list[str] = field(default_factory=list)
    by_table: dict[str, str] = field(default_factory=dict)
    hbm_gb: float | None = None
    ddr_gb: float | None = None

    def __post_init__(self) -> None:
        for name in self.types:
            one_of(name, SHARDING_TYPES, "sharding.types")
        for table, name in self.by_table.items():
            one_of(name, SHARDING_TYPES, f"sharding.by_table.{table}")


@dataclass
class CheckpointConfig:
    """A checkpoint every ``every_steps`` steps or ``every_minutes`` minutes, whichever comes first, and at the end; the
    last ``keep`` stay, and with ``best`` (such as ``valid.auc`` or ``valid.logloss``) that of the best evaluation.

    ``asynchronous``: training goes on while a snapshot is written, which takes as much memory as a rank's tables and
    optimizer state. ``max_failures``: so many failed saves in a row are reported and tried again. ``on_corrupt``: a
    damaged newest checkpoint is passed over (``fallback``) or ends the run (``error``)."""

    every_steps: int | None = None
    every_minutes: float | None = 10.0
    keep: int = 2
    best: str | None = None
    asynchronous: bool = True
    max_failures: int = 3
    on_corrupt: str = "fallback"

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_minutes"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), f"checkpoint.{name}")
        if self.keep < 2:
            raise ValueError(f"checkpoint.keep is {self.keep}: keep at least 2, so that one survives a damaged other")
        if self.max_failures < 0:
            raise ValueError(f"checkpoint.max_failures is {self.max_failures}: it must not be negative")
        if self.best is not None:
            one_of(self.best, BEST, "checkpoint.best")
        one_of(self.on_corrupt, ON_CORRUPT, "checkpoint.on_corrupt")


@dataclass
class EvaluationConfig:
    """``every_steps``: valid is evaluated so often (None: at each epoch's end). ``batch_size``: global; the training
    batch size by default. ``before_training``: the rows to be trained are scored once before the first step, as a model
    that goes on day by day is judged (progressive validation); ``metrics.json`` has it as ``before``."""

    every_steps: int | None = None
    batch_size: int | None = None
    before_training: bool = False

    def __post_init__(self) -> None:
        for name in ("every_steps", "batch_size"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), f"evaluation.{name}")


@dataclass
class DebugConfig:
    """``ledger``: write down which rows each step trained, as Parquet in ``ledger/`` of the run folder
    (``trainer/ledger.py``)."""

    ledger: bool = False


@dataclass
class TrainConfig:
    """The whole job. ``batch_size`` is global: rows of one step over all ranks. ``steps`` ends the run early, even
    within an epoch (and with it the decay of a learning rate). ``precision`` is that of the dense part (``auto``: bf16
    where the hardware multiplies bf16 matrices). ``resume=auto`` goes on from the newest whole checkpoint of
    ``run.dir``; ``never`` refuses a folder that holds any. A job in which nothing moves for ``hang_timeout_seconds`` is
    ended, and says which rank hangs (twelve times as long for a first step, an evaluation and a checkpoint);
    ``timeout_seconds`` is the process group's own limit, for what the watchdog cannot see."""

    run: RunConfig = field(default_factory=RunConfig)
    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    device: str = "auto"
    precision: str = "auto"
    seed: int = 1
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 4096
    log_every_steps: int = 50
    resume: str = "auto"
    timeout_seconds: float = 1800.0
    hang_timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        one_of(self.device, DEVICES, "device")
        one_of(self.precision, PRECISIONS, "precision")
        one_of(self.resume, RESUMES, "resume")
        for name in ("epochs", "batch_size", "log_every_steps", "timeout_seconds", "hang_timeout_seconds"):
            positive(getattr(self, name), name)
        if self.hang_timeout_seconds >= self.timeout_seconds:
            raise ValueError(
                f"hang_timeout_seconds is {self.hang_timeout_seconds}, and timeout_seconds {self.timeout_seconds}: give the "
                "first one less, so that it is the watchdog that ends a hanging job and says who hangs"
            )
        if self.steps is not None:
            positive(self.steps, "steps")
        if not self.data.schema.features:
            raise ValueError(
                "data.schema.features is empty: declare at least one feature, or choose a data set, such as data=synthetic"
            )
        if self.batch_size % self.data.stream.shards:
            near = sorted(
                (n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0),
                key=lambda n: abs(n - self.data.stream.shards),
            )
            up = -(-self.batch_size // self.data.stream.shards) * self.data.stream.shards
            raise ValueError(
                f"batch_size is {self.batch_size}, which data.stream.shards={self.data.stream.shards} does not divide: use "
                f"batch_size={up}, or data.stream.shards={' or '.join(map(str, near[:2]))}"
            )
        for table in (*self.optim.by_table, *self.sharding.by_table):
            if not table.startswith("wide_"):
                one_of(table, self.data.schema.tables, "optim.by_table / sharding.by_table")

    def check_world_size(self, world_size: int) -> None:
        """Raises ``ValueError``, naming values that work, where a rank would have no logical shard."""
        shards = self.data.stream.shards
        if world_size <= shards:
            return
        larger = [n for n in range(world_size, self.batch_size + 1) if self.batch_size % n == 0][:3]
        remedy = (
            f"data.stream.shards={' or '.join(map(str, larger))} (they divide batch_size={self.batch_size})"
            if larger
            else f"batch_size={world_size} and data.stream.shards={world_size} or more"
        )
        raise ValueError(
            f"{world_size} ranks cannot share data.stream.shards={shards} logical shards: start at most {shards} ranks, or "
            f"use {remedy}"
        )


def positive(value: float, where: str) -> None:
    if not value > 0 or not math.isfinite(value):
        raise ValueError(f"{where} is {value}: it must be a positive number")
