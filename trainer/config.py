"""Dataclasses for every section of the configuration: Hydra's schema, and what the program sees below its edge.

Each ``__post_init__`` checks what types cannot: it runs when the composed configuration becomes objects, before any
process group starts. Every ``ValueError`` names the key, the value and the remedy.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from data_loaders.schema import Schema, one_of
from data_loaders.secrets import holds_credentials
from trainer.warm_start.rules import WarmStartConfig

TABLE_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd", "adam", "ftrl")
DENSE_OPTIMIZERS = ("adam", "adamw", "adagrad", "sgd", "rmsprop", "adamax", "nadam", "radam", "adadelta")
SHARDING_TYPES = ("table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard", "data_parallel")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
DECAYED_ROWS = ("touched", "all")
DECAYS = ("constant", "linear", "cosine")
RESUMES = ("auto", "never")
LONGEST_SECONDS = 10**9  # what timers take
MOST_ROWS_OF_A_STEP = 2**31 - 1  # counted in 32 bits
BEST = ("valid.auc", "valid.auc_pr", "valid.gauc", "valid.logloss", "valid.ne")
ON_CORRUPT = ("fallback", "error")


@dataclass
class RunConfig:
    """``root``: the folder of all runs. ``name``: of runs that belong together, that of model and data set unless given.
    ``dir``: the run folder; left empty it is ``root/name/<date-time>``, chosen once by rank 0."""

    root: str = "runs"
    name: str = "run"
    dir: str | None = None

    def __post_init__(self) -> None:
        for key in ("root", "dir"):
            if (value := getattr(self, key)) is not None and (not value or "\0" in value):
                given = "is empty" if not value else f"is {value!r}, with a null byte"
                raise ValueError(f"run.{key} {given}: give the path of a folder{', or null' if key == 'dir' else ''}")
        if not self.name or "\0" in self.name or "/" in self.name or self.name in (".", "..") or len(self.name) > 200:
            raise ValueError(f"run.name is {self.name!r}: give a plain folder name of 1 to 200 characters, without '/'")


@dataclass
class StreamConfig:
    """How rows are read. ``shards``: logical shards, each a fixed part of every global batch; with ``seed`` they alone
    fix the order of rows, whatever the number of ranks. ``shuffle: false`` takes rows in order of files (time), a batch
    after the other. ``shuffle_rows``: rows in the shuffle buffer over all ranks. ``threads``: that read, on each rank.
    ``prefetch_batches``: made ahead, on each rank."""

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
    """Rows to generate where ``data.root`` has none; only ``data=synthetic`` and ``synthetic_pairs`` set it. ``train_rows``,
    ``valid_rows``, ``test_rows``: how many. ``seed``: that they are drawn with."""

    train_rows: int = 1_000_000
    valid_rows: int = 100_000
    test_rows: int = 100_000
    seed: int = 7

    def __post_init__(self) -> None:
        for name in ("train_rows", "valid_rows", "test_rows"):
            positive(getattr(self, name), f"data.synthetic.{name}")
        check_seed(self.seed, "data.synthetic.seed")


@dataclass
class DataConfig:
    """``train``, ``valid`` and ``test`` are paths, folders or globs under ``root``, a folder or a URI (``s3://…``).
    ``probability`` names a column with the true click probability, where the data has one (synthetic): the best possible
    AUC is then reported. ``name``: of the data set, for the record.

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
class ScheduleConfig:
    """A learning rate over the run: a linear warm-up over ``warmup_steps``, then ``decay`` to ``final`` times the
    rate at the end of the run."""

    warmup_steps: int = 0
    decay: str = "constant"
    final: float = 0.0

    def __post_init__(self) -> None:
        one_of(self.decay, DECAYS, "optim: schedule.decay")
        if self.warmup_steps < 0:
            raise ValueError(f"optim: schedule.warmup_steps is {self.warmup_steps}: it must not be negative")
        if not 0 <= self.final <= 1:
            raise ValueError(f"optim: schedule.final is {self.final}: it is a share of the rate, from 0 to 1")


@dataclass
class TableOptimizerConfig:
    """The optimizer of embedding tables, fused into backward. ``name``: which one (``adam``: on GPUs alone; ``ftrl``: for the
    linear part alone). ``lr``: the learning rate, FTRL's alpha; ``beta``, ``l1`` and ``l2`` belong to FTRL, ``eps`` to the
    AdaGrads and Adam, ``beta1`` and ``beta2`` to Adam.

    ``weight_decay`` with ``weight_decay_rows: touched`` shrinks the rows that a step looks up by lr · weight_decay of
    themselves, once a step (``trainer.optim.mini_batch_aware``); ``all`` is an L2 term of the loss,
    weight_decay / 2 · ‖table‖², which moves every row at every step: for data-parallel tables only.

    ``mini_batch_l2``: λ of DIN's mini-batch aware regularisation, lr · λ / n of a row once in every step in which its id
    occurs, n being how often it does in the training data (``trainer.optim.mini_batch_aware``)."""

    name: str = "rowwise_adagrad"
    lr: float = 0.02
    eps: float = 1e-8
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0
    weight_decay_rows: str = "touched"
    mini_batch_l2: float = 0.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        one_of(self.name, TABLE_OPTIMIZERS, "optim: table optimizer name")
        one_of(self.weight_decay_rows, DECAYED_ROWS, "optim: a table optimizer's weight_decay_rows")
        if self.name == "ftrl" and self.schedule != ScheduleConfig():
            raise ValueError(
                "optim.wide.schedule: FTRL's rate belongs to the sums it keeps and falls with them by itself; remove the "
                "schedule (optim.plateau works), or choose adagrad or sgd"
            )
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise ValueError(f"optim: a table optimizer's lr is {self.lr}: it must be a positive number")
        for name in ("eps", "weight_decay", "beta", "l1", "l2", "mini_batch_l2"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim: a table optimizer's {name} is {getattr(self, name)}: it must not be negative")
        self._check_mini_batch_l2()

    def _check_mini_batch_l2(self) -> None:
        if self.mini_batch_l2 and self.name == "ftrl":
            raise ValueError(
                f"optim: ftrl has mini_batch_l2={self.mini_batch_l2}, but its weights follow from sums over all gradients: "
                "use l2 instead"
            )
        if self.lr * self.mini_batch_l2 > 1:
            raise ValueError(
                f"optim: a table optimizer's mini_batch_l2 is {self.mini_batch_l2}, which with lr={self.lr} would more than "
                f"take away the row of an id that occurs once: give at most {1 / self.lr:g}"
            )


@dataclass
class DenseOptimizerConfig:
    """A ``torch.optim`` optimizer: ``name``, ``lr``, ``weight_decay``. ``clip_norm``: the largest norm of the whole gradient,
    which is scaled down to it (None: never). ``options`` are further arguments of its constructor (``betas``, ``momentum`` …).
    ``ema_decay``: evaluation and prediction take an exponential moving average of the dense parameters in their place
    (0.999 is one over some thousand steps)."""

    name: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float | None = None
    ema_decay: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        one_of(self.name, DENSE_OPTIMIZERS, "optim.dense.name")
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise ValueError(f"optim.dense.lr is {self.lr}: it must be a positive number")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optim.dense.clip_norm is {self.clip_norm}: give a positive norm, or null for none")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"optim.dense.ema_decay is {self.ema_decay}: it is between 0 and 1, such as 0.999, or null"
            )


@dataclass
class PlateauConfig:
    """All learning rates, of the dense part and of tables, are multiplied by ``factor`` after ``patience`` evaluations in a
    row that did not improve ``metric`` by more than ``min_delta``, down to ``min_factor`` of what the schedule says. No
    ``patience``: not at all."""

    metric: str = "valid.auc"
    factor: float = 0.1
    patience: int | None = None
    min_delta: float = 0.0
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        check_patience(self.metric, self.patience, self.min_delta, "optim.plateau")
        if not 0 < self.factor < 1:
            raise ValueError(f"optim.plateau.factor is {self.factor}: it must be above 0 and below 1")
        if not 0 <= self.min_factor <= 1:
            raise ValueError(f"optim.plateau.min_factor is {self.min_factor}: it is a share of the rate, from 0 to 1")


@dataclass
class OptimConfig:
    """``tables`` is for all tables but those of the linear part (``wide``) and those named in ``by_table``."""

    tables: TableOptimizerConfig = field(default_factory=TableOptimizerConfig)
    wide: TableOptimizerConfig = field(default_factory=lambda: TableOptimizerConfig(name="adagrad"))
    by_table: dict[str, TableOptimizerConfig] = field(default_factory=dict)
    dense: DenseOptimizerConfig = field(default_factory=DenseOptimizerConfig)
    plateau: PlateauConfig = field(default_factory=PlateauConfig)

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
    ``restore_best``: it is the best one that the final evaluation, ``trainer.evaluate`` and ``trainer.predict`` take,
    instead of the last one; so it is with ``early_stopping``.

    ``asynchronous``: training goes on while a snapshot is written, which takes as much memory as a rank's tables and
    optimizer state. ``max_failures``: so many failed saves in a row are reported and tried again. ``on_corrupt``: a
    damaged newest checkpoint is passed over (``fallback``) or ends the run (``error``).

    ``root``: checkpoints go to ``<root>/<name of the run folder>`` instead of the run folder's ``checkpoints``: a folder, or
    a URI of ``data_loaders.storage`` such as ``s3://bucket/prefix``. Where ``run.dir`` is empty, and the run folder's
    name a date, it is ``<root>/<run.name>/<date-time>``. No two runs under a root may have the same name."""

    root: str | None = None
    every_steps: int | None = None
    every_minutes: float | None = 10.0
    keep: int = 2
    best: str | None = None
    restore_best: bool = False
    asynchronous: bool = True
    max_failures: int = 3
    on_corrupt: str = "fallback"

    def __post_init__(self) -> None:
        if self.root is not None:
            if not self.root:
                raise ValueError("checkpoint.root is empty: give a folder or a URI, or null for the run folder")
            from data_loaders.storage import root_name  # here, as pyarrow takes a while

            root_name(self.root)
        for name in ("every_steps", "every_minutes"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), f"checkpoint.{name}")
        if self.keep < 2:
            raise ValueError(f"checkpoint.keep is {self.keep}: keep at least 2, so that one survives a damaged other")
        if self.max_failures < 0:
            raise ValueError(f"checkpoint.max_failures is {self.max_failures}: it must not be negative")
        if self.best is not None:
            one_of(self.best, BEST, "checkpoint.best")
        elif self.restore_best:
            raise ValueError(
                "checkpoint.restore_best=true, but checkpoint.best is null: say by what, such as valid.auc"
            )
        one_of(self.on_corrupt, ON_CORRUPT, "checkpoint.on_corrupt")


@dataclass
class EvaluationConfig:
    """``every_steps``: valid is evaluated so often (None: at each epoch's end). ``batch_size``: global; the training
    batch size by default. ``before_training``: the rows to be trained are scored once before the first step, as a model
    that goes on day by day is judged (progressive validation); ``metrics.json`` has it as ``before``.

    Columns of the data, features or not (docs/metrics.md): ``group_by`` for GAUC, ``request`` for NDCG, hit rate (at each
    of ``top_k``) and MRR, ``slices`` for figures of each of a column's values. Their rows are kept, ``memory_mb`` of them a
    rank in memory, the others in temporary files. ``calibration_bins`` of expected calibration error. ``base_auc``: the AUC
    of the model that ``relaimpr`` compares with."""

    every_steps: int | None = None
    batch_size: int | None = None
    before_training: bool = False
    group_by: str | None = None
    request: str | None = None
    top_k: list[int] = field(default_factory=lambda: [1, 5, 10])
    slices: list[str] = field(default_factory=list)
    memory_mb: int = 1024
    calibration_bins: int = 20
    base_auc: float | None = None

    def __post_init__(self) -> None:
        for name in ("every_steps", "batch_size"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), f"evaluation.{name}")
        for name in ("memory_mb", "calibration_bins"):
            positive(getattr(self, name), f"evaluation.{name}")
        if not self.top_k or min(self.top_k) < 1 or len(set(self.top_k)) < len(self.top_k):
            raise ValueError(f"evaluation.top_k is {self.top_k}: give different positive numbers, such as [1, 5, 10]")
        if len(set(self.slices)) < len(self.slices):
            raise ValueError(f"evaluation.slices is {self.slices}: name each column once")
        if self.base_auc is not None and not 0.5 < self.base_auc < 1:
            raise ValueError(f"evaluation.base_auc is {self.base_auc}: RelaImpr compares with an AUC between 0.5 and 1")

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that rows are grouped by, each once."""
        return tuple(dict.fromkeys(name for name in (self.group_by, self.request, *self.slices) if name))


@dataclass
class EarlyStoppingConfig:
    """Training ends after ``patience`` evaluations in a row that did not improve ``metric`` by more than ``min_delta``. The
    best checkpoint by that metric is then restored and evaluated (``checkpoint.best``, ``checkpoint.restore_best``). No
    ``patience``: not at all."""

    metric: str = "valid.auc"
    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        check_patience(self.metric, self.patience, self.min_delta, "early_stopping")


@dataclass
class LossConfig:
    """``label_smoothing``: a click counts as 1 - label_smoothing / 2, none as label_smoothing / 2.
    ``negative_sampling_rate``: the share of negatives that the preparation left in the training data (and not in ``valid`` and
    ``test``); evaluation and prediction correct the probabilities for it."""

    label_smoothing: float = 0.0
    negative_sampling_rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing is {self.label_smoothing}: it must be at least 0 and below 1")
        if not 0 < self.negative_sampling_rate <= 1:
            raise ValueError(
                f"loss.negative_sampling_rate is {self.negative_sampling_rate}: it is the share of negatives that the "
                "training data hold, above 0 and at most 1"
            )


@dataclass
class LoggingConfig:
    """Where metrics go besides ``metrics.jsonl`` (docs/seeing.md). ``tensorboard``: to its files, in ``tensorboard/`` of the
    run folder. ``mlflow``: to MLflow. ``wandb``: to Weights & Biases."""

    tensorboard: bool = True
    mlflow: bool = False
    wandb: bool = False


@dataclass
class AlertsConfig:
    """Early warnings (``trainer/alerts.py``); ``enabled: false`` turns them off. What rows look like is judged after
    ``after_rows`` rows, and whether anything is learnt after ``after_steps`` steps and the warm-up of learning rates."""

    enabled: bool = True
    after_rows: int = 20_000
    after_steps: int = 200

    def __post_init__(self) -> None:
        for name in ("after_rows", "after_steps"):
            positive(getattr(self, name), f"alerts.{name}")


@dataclass
class ProfilingConfig:
    """The window of ``profile=true`` (docs/seeing.md). ``after_steps``: it begins after so many steps of this process, which a
    run that goes on counts anew. ``steps``: it has so many. ``ranks``: they write a trace each."""

    after_steps: int = 20
    steps: int = 5
    ranks: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        for name in ("after_steps", "steps"):
            positive(getattr(self, name), f"profiling.{name}")
        if not self.ranks or min(self.ranks) < 0 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"profiling.ranks is {self.ranks}: give different ranks, such as [0] or [0, 1]")

    def check_world_size(self, world_size: int) -> None:
        """Raises ``ValueError`` for a rank that there is not."""
        if max(self.ranks) >= world_size:
            raise ValueError(
                f"profiling.ranks is {self.ranks}, but {world_size} rank(s) were started: give ranks from 0 to {world_size - 1}"
            )


@dataclass
class DebugConfig:
    """``ledger``: write down which rows each step trained, as Parquet in ``ledger/`` of the run folder
    (``trainer/ledger.py``)."""

    ledger: bool = False


@dataclass
class TrainConfig:
    """The whole job. ``profile``: a window of steps is profiled, and where their time went is told (``profiling`` says
    which). ``device``: what computes (``auto``: GPUs where there are any). ``seed``: of initial values, the
    order of rows, dropout. ``batch_size`` is global: rows of one step over all ranks. ``epochs``: passes over train.
    ``steps`` ends the run early, even within an epoch (and with it the decay of a learning rate). ``log_every_steps``:
    how often a line of metrics is written. ``accumulate_steps`` is 1 and, asked for more, says why. ``precision`` is that
    of the dense part (``auto``: bf16 where the hardware multiplies bf16 matrices). ``deterministic``: on a GPU too, sums
    are added up in one fixed order, slower, so that a resumed run equals an uninterrupted one bit by bit (docs/state.md).
    ``resume=auto`` goes on from the newest whole checkpoint of ``run.dir``; ``never`` refuses a folder that holds any. A
    job in which nothing moves for ``hang_timeout_seconds`` is ended, and says which rank hangs (twelve times as long
    while it builds, and for a first step, an evaluation and a checkpoint); ``timeout_seconds`` is the process group's
    own limit, for what the watchdog cannot see. Before all that the ranks wait ``rendezvous_timeout_seconds`` for each
    other. ``report``: the run ends with ``report.html`` in its folder (docs/seeing.md)."""

    run: RunConfig = field(default_factory=RunConfig)
    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    report: bool = True
    profile: bool = False
    device: str = "auto"
    precision: str = "auto"
    deterministic: bool = False
    seed: int = 1
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 4096
    accumulate_steps: int = 1
    log_every_steps: int = 50
    resume: str = "auto"
    timeout_seconds: float = 1800.0
    hang_timeout_seconds: float = 600.0
    rendezvous_timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        one_of(self.device, DEVICES, "device")
        one_of(self.precision, PRECISIONS, "precision")
        one_of(self.resume, RESUMES, "resume")
        for name in ("epochs", "batch_size", "log_every_steps", "timeout_seconds"):
            positive(getattr(self, name), name)
        for name in ("hang_timeout_seconds", "rendezvous_timeout_seconds"):
            positive(getattr(self, name), name)
        for name in ("timeout_seconds", "hang_timeout_seconds", "rendezvous_timeout_seconds"):
            if getattr(self, name) > LONGEST_SECONDS:
                raise ValueError(f"{name} is {getattr(self, name)}: give at most {LONGEST_SECONDS} seconds")
        check_seed(self.seed, "seed")
        if self.batch_size > MOST_ROWS_OF_A_STEP:
            raise ValueError(f"batch_size is {self.batch_size}: give at most {MOST_ROWS_OF_A_STEP} rows")
        if self.hang_timeout_seconds >= self.timeout_seconds:
            raise ValueError(
                f"hang_timeout_seconds is {self.hang_timeout_seconds}, and timeout_seconds {self.timeout_seconds}: give the "
                "first one less, so that it is the watchdog that ends a hanging job and says who hangs"
            )
        if self.accumulate_steps != 1:
            raise ValueError(
                f"accumulate_steps is {self.accumulate_steps}: tables are updated inside each backward, so that gradients of "
                "several batches cannot be added up for them; set batch_size to "
                f"{self.batch_size * max(self.accumulate_steps, 1)} instead, or add ranks"
            )
        if self.steps is not None:
            positive(self.steps, "steps")
        if not self.data.schema.features:
            raise ValueError(
                "data.schema.features is empty: declare at least one feature, or choose a data set, such as data=synthetic"
            )
        if self.batch_size % self.data.stream.shards:
            near = sorted(divisors(self.batch_size), key=lambda n: abs(n - self.data.stream.shards))
            up = -(-self.batch_size // self.data.stream.shards) * self.data.stream.shards
            raise ValueError(
                f"batch_size is {self.batch_size}, which data.stream.shards={self.data.stream.shards} does not divide: use "
                f"batch_size={up}, or data.stream.shards={' or '.join(map(str, near[:2]))}"
            )
        for table in (*self.optim.by_table, *self.sharding.by_table):
            if not table.startswith("wide_"):
                one_of(table, self.data.schema.tables, "optim.by_table / sharding.by_table")

        self._check_judged()

    def _check_judged(self) -> None:
        """What evaluations decide needs evaluations; early stopping names the best checkpoint's metric."""
        judged = {"early_stopping": self.early_stopping, "optim.plateau": self.optim.plateau}
        gauc = [f"{name}.metric" for name, section in judged.items() if section.metric == "valid.gauc"]
        gauc += ["checkpoint.best"] if self.checkpoint.best == "valid.gauc" else []
        if gauc and not self.evaluation.group_by:
            raise ValueError(
                f"{gauc[0]} is valid.gauc, but evaluation.group_by is null: name the column to group rows by"
            )
        asked = [name for name, section in judged.items() if section.patience is not None]
        if asked and not self.data.valid:
            raise ValueError(f"{asked[0]} watches a metric of valid, but data.valid is empty: name valid's files")
        if self.early_stopping.patience is None:
            return
        metric, best = self.early_stopping.metric, self.checkpoint.best
        if best not in (None, metric):
            raise ValueError(
                f"early_stopping.metric is {metric} and checkpoint.best is {best}: the best checkpoint is restored when "
                "training stops, so give both the same metric, or leave checkpoint.best out"
            )
        self.checkpoint.best, self.checkpoint.restore_best = metric, True

    def check_addresses(self) -> None:
        """Before anything is started. Raises ``ValueError`` for credentials in an address, which would end up in logs."""
        data, warm = self.data, self.warm_start
        named = {
            **{"data.root": data.root, "data.prepared": data.prepared, "data.new_since": data.new_since},
            **{"warm_start.path": warm.path, "warm_start.prepared": warm.prepared},
            **{"checkpoint.root": self.checkpoint.root, "run.root": self.run.root, "run.dir": self.run.dir},
            **{f"data.{split}": " ".join(getattr(data, split)) for split in ("train", "valid", "test")},
        }
        for key, address in named.items():
            if address and holds_credentials(address):
                raise ValueError(
                    f"{key} holds credentials (not shown here): leave them out, and give them by environment variables "
                    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, …) or the machine's role"
                )

    def check_world_size(self, world_size: int) -> None:
        """Raises ``ValueError``, naming values that work, where a rank would have no logical shard."""
        if self.profile:
            self.profiling.check_world_size(world_size)
        shards = self.data.stream.shards
        if world_size <= shards:
            return
        larger = [n for n in divisors(self.batch_size) if n >= world_size][:3]
        remedy = (
            f"data.stream.shards={' or '.join(map(str, larger))} (they divide batch_size={self.batch_size})"
            if larger
            else f"batch_size={world_size} and data.stream.shards={world_size} or more"
        )
        raise ValueError(
            f"{world_size} ranks cannot share data.stream.shards={shards} logical shards: start at most {shards} ranks, or "
            f"use {remedy}"
        )


def check_patience(metric: str, patience: int | None, min_delta: float, where: str) -> None:
    one_of(metric, BEST, f"{where}.metric")
    if patience is not None:
        positive(patience, f"{where}.patience")
    if not min_delta >= 0:
        raise ValueError(f"{where}.min_delta is {min_delta}: it must not be negative")


def positive(value: float, where: str) -> None:
    if not value > 0 or value == math.inf:
        raise ValueError(f"{where} is {value}: it must be a positive number")
    if value >= 1 << 63:
        raise ValueError(f"{where} is {value}: give a smaller number, below 2^63")


def check_seed(value: int, where: str) -> None:
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{where} is {value}: give a whole number from 0 to 2^63 - 1")


def divisors(number: int) -> list[int]:
    """Ascending; of one up to ``MOST_ROWS_OF_A_STEP`` in no time."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
