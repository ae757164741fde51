"""Dataclasses for every section of the configuration: Hydra's schema, and what the program sees below its edge.

Each ``__post_init__`` checks what types cannot: it runs when the composed configuration becomes objects, before any
process group starts. Every ``UserError`` names the key, the value and the remedy.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from data_loaders.errors import UserError
from data_loaders.schema import one_of
from data_loaders.secrets import holds_credentials
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.checks import check_seed, positive
from trainer.config.data import DataConfig
from trainer.config.evaluation import EarlyStoppingConfig, EvaluationConfig
from trainer.config.export import ExportConfig
from trainer.config.monitoring import AlertsConfig, LoggingConfig, ProfilingConfig
from trainer.config.optim import OptimConfig, TableOptimizerConfig
from trainer.config.sharding import ShardingConfig
from trainer.config.warm_start import WarmStartConfig

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
RESUMES = ("auto", "never")
LONGEST_SECONDS = 10**9  # what timers take
MOST_ROWS_OF_A_STEP = 2**31 - 1  # counted in 32 bits


@dataclass
class RunConfig:
    """Where a run keeps its files."""

    root: str = "runs"
    """Folder of all runs."""
    name: str = "run"
    """Name that related runs share; by default ``<model>_<data>``."""
    dir: str | None = None
    """Folder of this run. By default ``<root>/<name>/<date-time>``, chosen once by rank 0."""

    def __post_init__(self) -> None:
        for key in ("root", "dir"):
            if (value := getattr(self, key)) is not None and (not value or "\0" in value):
                given = "is empty" if not value else f"is {value!r}, with a null byte"
                raise UserError(f"run.{key} {given}: give the path of a folder{', or null' if key == 'dir' else ''}")
        if not self.name or "\0" in self.name or "/" in self.name or self.name in (".", "..") or len(self.name) > 200:
            raise UserError(f"run.name is {self.name!r}: give a plain folder name of 1 to 200 characters, without '/'")


@dataclass
class LossConfig:
    """What the log loss is corrected by."""

    label_smoothing: float = 0.0
    """A click counts as 1 - label_smoothing / 2, a non-click as label_smoothing / 2."""
    negative_sampling_rate: float = 1.0
    """Share of the negatives that preparation kept in the training data (valid and test keep all). Evaluation and
    prediction correct probabilities for it."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"loss.label_smoothing is {self.label_smoothing}: it must be at least 0 and below 1")
        if not 0 < self.negative_sampling_rate <= 1:
            raise UserError(
                f"loss.negative_sampling_rate is {self.negative_sampling_rate}: it is the share of negatives that the "
                "training data hold, above 0 and at most 1"
            )


@dataclass
class DebugConfig:
    """For debugging."""

    ledger: bool = False
    """Write which rows each step trained as Parquet, to ``ledger/`` of the run folder
    (``trainer/monitoring/row_log.py``)."""


@dataclass
class TrainConfig:
    """A whole job."""

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
    export: ExportConfig = field(default_factory=ExportConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    report: bool = True
    """Write ``report.html`` into the run folder at the end (docs/seeing.md)."""
    profile: bool = False
    """Profile a window of steps and print where their time went; ``profiling`` chooses the window."""
    device: str = "auto"
    """Device that computes; ``auto`` takes GPUs where there are any."""
    precision: str = "auto"
    """Precision of the dense part; ``auto`` is bf16 where the hardware multiplies it faster: recent GPUs, CPUs
    with AMX or AVX512-BF16."""
    kernels: bool = True
    """On a CPU, use the kernels that `make setup` compiled for it; ``false``: PyTorch and FBGEMM alone, as where nothing was
    compiled (docs/training.md)."""
    deterministic: bool = False
    """On a GPU, add sums in a fixed order (slower), so that a resumed run equals an uninterrupted one bit by bit
    (docs/state.md)."""
    seed: int = 1
    """Seed of initial values, order of rows and dropout."""
    epochs: int = 1
    """Passes over train."""
    redraw_tables: bool = False
    """Draw all tables anew before each epoch but the first, their optimizers' state with them; the network stays: against
    overfitting of ids from the second epoch on (docs/training.md)."""
    steps: int | None = None
    """End the run after this many steps, even within an epoch. Learning rates decay over them."""
    batch_size: int = 4096
    """Global batch size: rows of a step over all ranks."""
    accumulate_steps: int = 1
    """Must be 1: each backward pass updates the tables. Raise ``batch_size`` instead."""
    log_every_steps: int | None = None
    """Steps between two lines of metrics; by default a twentieth of the run, 10 to 50."""
    resume: str = "auto"
    """``auto`` resumes from the newest whole checkpoint of ``run.dir``; ``never`` refuses a folder that holds one."""
    timeout_seconds: float = 1800.0
    """Limit of a collective in the process group, for what the watchdog cannot see."""
    hang_timeout_seconds: float = 600.0
    """A job in which nothing moves for this long is ended, with a message that names the rank that hangs. Twelve times
    as long while building, and for a first step, an evaluation and a checkpoint."""
    rendezvous_timeout_seconds: float = 60.0
    """How long ranks wait for each other at the start."""

    def __post_init__(self) -> None:
        one_of(self.device, DEVICES, "device")
        one_of(self.precision, PRECISIONS, "precision")
        one_of(self.resume, RESUMES, "resume")
        for name in ("epochs", "batch_size", "timeout_seconds"):
            positive(getattr(self, name), name)
        for name in ("hang_timeout_seconds", "rendezvous_timeout_seconds"):
            positive(getattr(self, name), name)
        for name in ("timeout_seconds", "hang_timeout_seconds", "rendezvous_timeout_seconds"):
            if getattr(self, name) > LONGEST_SECONDS:
                raise UserError(f"{name} is {getattr(self, name)}: give at most {LONGEST_SECONDS} seconds")
        check_seed(self.seed, "seed")
        if self.batch_size > MOST_ROWS_OF_A_STEP:
            raise UserError(f"batch_size is {self.batch_size}: give at most {MOST_ROWS_OF_A_STEP} rows")
        if self.hang_timeout_seconds >= self.timeout_seconds:
            raise UserError(
                f"hang_timeout_seconds is {self.hang_timeout_seconds}, and timeout_seconds {self.timeout_seconds}: give the "
                "first one less, so that it is the watchdog that ends a hanging job and says who hangs"
            )
        if self.accumulate_steps != 1:
            batch_size = self.batch_size * max(self.accumulate_steps, 1)
            raise UserError(f"accumulate_steps is {self.accumulate_steps}: set batch_size to {batch_size} instead")
        for name in ("steps", "log_every_steps"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), name)
        if not self.data.schema.features:
            raise UserError(
                "data.schema.features is empty: declare at least one feature, or choose a data set, such as data=synthetic"
            )
        if self.batch_size % self.data.stream.shards:
            near = sorted(divisors(self.batch_size), key=lambda n: abs(n - self.data.stream.shards))
            up = -(-self.batch_size // self.data.stream.shards) * self.data.stream.shards
            raise UserError(
                f"batch_size is {self.batch_size}, which data.stream.shards={self.data.stream.shards} does not divide: use "
                f"batch_size={up}, or data.stream.shards={' or '.join(map(str, near[:2]))}"
            )
        for table in (*self.optim.by_table, *self.sharding.by_table):
            if not table.startswith("wide_"):
                one_of(table, self.data.schema.tables, "optim.by_table / sharding.by_table")
        self._freeze_tables()
        self._check_judged()

    def _freeze_tables(self) -> None:
        """A frozen table learns by steps of 0."""
        frozen = [name for name, table in self.data.schema.tables.items() if table.freeze]
        rest = TableOptimizerConfig("sgd", lr=0.0, clock=False)
        for name in frozen:
            if self.optim.by_table.get(name, rest) != rest:
                raise UserError(f"data.schema.tables.{name}.freeze and optim.by_table.{name}: leave out one of them")
        if frozen:
            self.optim = replace(self.optim, by_table={**self.optim.by_table, **dict.fromkeys(frozen, rest)})

    def _check_judged(self) -> None:
        """What evaluations decide needs evaluations; early stopping names the best checkpoint's metric."""
        judged: dict[str, Any] = {"early_stopping": self.early_stopping, "optim.plateau": self.optim.plateau}
        gauc = [f"{name}.metric" for name, section in judged.items() if section.metric == "valid.gauc"]
        gauc += ["checkpoint.best"] if self.checkpoint.best == "valid.gauc" else []
        if gauc and not self.evaluation.group_by:
            raise UserError(
                f"{gauc[0]} is valid.gauc, but evaluation.group_by is null: name the column to group rows by"
            )
        asked = [name for name, section in judged.items() if section.patience is not None]
        if asked and not self.data.valid:
            raise UserError(f"{asked[0]} watches a metric of valid, but data.valid is empty: name valid's files")
        if self.early_stopping.patience is None:
            return
        metric, best = self.early_stopping.metric, self.checkpoint.best
        if best not in (None, metric):
            raise UserError(
                f"early_stopping.metric is {metric} and checkpoint.best is {best}: the best checkpoint is restored when "
                "training stops, so give both the same metric, or leave checkpoint.best out"
            )
        self.checkpoint = replace(self.checkpoint, best=metric, restore_best=True)

    def check_addresses(self) -> None:
        """Before anything is started. Raises ``UserError`` for credentials in an address, which would end up in logs."""
        data, warm = self.data, self.warm_start
        named = {
            **{"data.root": data.root, "data.prepared": data.prepared, "data.new_since": data.new_since},
            **{"warm_start.path": warm.path, "warm_start.prepared": warm.prepared},
            **{"checkpoint.root": self.checkpoint.root, "run.root": self.run.root, "run.dir": self.run.dir},
            **{f"data.{split}": " ".join(getattr(data, split)) for split in ("train", "valid", "test")},
        }
        for key, address in named.items():
            if address and holds_credentials(address):
                raise UserError(
                    f"{key} holds credentials (not shown here): leave them out, and give them by environment variables "
                    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, …) or the machine's role"
                )

    def check_world_size(self, world_size: int) -> None:
        """Raises ``UserError``, naming values that work, where a rank would have no logical shard."""
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
        raise UserError(
            f"{world_size} ranks cannot share data.stream.shards={shards} logical shards: start at most {shards} ranks, or "
            f"use {remedy}"
        )


def divisors(number: int) -> list[int]:
    """Ascending; of one up to ``MOST_ROWS_OF_A_STEP`` in no time."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
