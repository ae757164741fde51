"""Section ``optim``."""

import math
from dataclasses import dataclass, field
from typing import Any

from data_loaders.errors import UserError
from data_loaders.schema import one_of
from trainer.config.checks import check_patience

TABLE_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd", "adam", "ftrl")
DENSE_OPTIMIZERS = ("adam", "adamw", "adagrad", "sgd", "rmsprop", "adamax", "nadam", "radam", "adadelta")
DECAYED_ROWS = ("touched", "all")
DECAYS = ("constant", "linear", "cosine")


@dataclass
class ScheduleConfig:
    """A learning rate over the run."""

    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0."""
    decay: str = "constant"
    """How the rate falls after the warm-up until the end of the run."""
    final: float = 0.0
    """Rate at the end, as a share of the full rate."""

    def __post_init__(self) -> None:
        one_of(self.decay, DECAYS, "optim: schedule.decay")
        if self.warmup_steps < 0:
            raise UserError(f"optim: schedule.warmup_steps is {self.warmup_steps}: it must not be negative")
        if not 0 <= self.final <= 1:
            raise UserError(f"optim: schedule.final is {self.final}: it is a share of the rate, from 0 to 1")


@dataclass
class TableOptimizerConfig:
    """The optimizer of embedding tables, fused into the backward pass."""

    name: str = "rowwise_adagrad"
    """Optimizer; ``ftrl`` for the linear part only."""
    lr: float = 0.02
    """Learning rate; FTRL's alpha."""
    eps: float = 1e-8
    """Term in the denominator of AdaGrad and Adam."""
    weight_decay: float = 0.0
    """L2 weight decay of the rows that ``weight_decay_rows`` names."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""
    beta: float = 1.0
    """FTRL's beta."""
    l1: float = 0.0
    """FTRL's L1 regularisation."""
    l2: float = 0.0
    """FTRL's L2 regularisation."""
    weight_decay_rows: str = "touched"
    """``touched``: rows that a step looks up shrink by lr · weight_decay of themselves, once a step. ``all``:
    weight_decay / 2 · ‖table‖² is part of the loss and moves every row at every step; for data-parallel tables only."""
    mini_batch_l2: float = 0.0
    """λ of DIN's mini-batch aware regularisation: a row shrinks by lr · λ / n of itself once in each step in which its
    id occurs; n is how often the id occurs in the training data."""
    clock: bool = True
    """Whether the table keeps for each row the last step that trained it (4 bytes a row): for ``interval_decay``, deltas of
    exports and the report."""
    interval_decay: float = 0.0
    """α of AdagradAR: before its update a row is multiplied by 1 - min(1, α · steps since it was last trained)."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        one_of(self.name, TABLE_OPTIMIZERS, "optim: table optimizer name")
        one_of(self.weight_decay_rows, DECAYED_ROWS, "optim: a table optimizer's weight_decay_rows")
        if self.name == "ftrl" and self.schedule != ScheduleConfig():
            raise UserError(
                "optim.wide.schedule: FTRL's rate belongs to the sums it keeps and falls with them by itself; remove the "
                "schedule (optim.plateau works), or choose adagrad or sgd"
            )
        rests = self.lr == 0 and self.name == "sgd"  # a frozen table
        if not (self.lr > 0 or rests) or not math.isfinite(self.lr):
            raise UserError(f"optim: a table optimizer's lr is {self.lr}: it must be a positive number")
        for name in ("eps", "weight_decay", "beta", "l1", "l2", "mini_batch_l2", "interval_decay"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optim: a table optimizer's {name} is {getattr(self, name)}: it must not be negative")
        self._check_mini_batch_l2()
        if self.interval_decay and not self.clock:
            raise UserError(
                f"optim: a table optimizer's interval_decay is {self.interval_decay}, which counts steps by the clock: set "
                "clock=true, or interval_decay=0"
            )
        if self.interval_decay and self.name == "ftrl":
            raise UserError(
                f"optim: ftrl has interval_decay={self.interval_decay}, but its weights follow from sums over all gradients: "
                "use l2 instead"
            )

    def _check_mini_batch_l2(self) -> None:
        if self.mini_batch_l2 and self.name == "ftrl":
            raise UserError(
                f"optim: ftrl has mini_batch_l2={self.mini_batch_l2}, but its weights follow from sums over all gradients: "
                "use l2 instead"
            )
        if self.lr * self.mini_batch_l2 > 1:
            raise UserError(
                f"optim: a table optimizer's mini_batch_l2 is {self.mini_batch_l2}, which with lr={self.lr} would more than "
                f"take away the row of an id that occurs once: give at most {1 / self.lr:g}"
            )


@dataclass
class DenseOptimizerConfig:
    """The optimizer of the dense part, one of ``torch.optim``."""

    name: str = "adam"
    """Optimizer."""
    lr: float = 1e-3
    """Learning rate."""
    weight_decay: float = 0.0
    """The optimizer's weight decay."""
    clip_norm: float | None = None
    """Norm that the whole gradient is scaled down to where it is larger; not given: never."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the dense parameters, which evaluation and prediction use (0.999
    averages over some thousand steps)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer's constructor, such as ``betas`` or ``momentum``."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        one_of(self.name, DENSE_OPTIMIZERS, "optim.dense.name")
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise UserError(f"optim.dense.lr is {self.lr}: it must be a positive number")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"optim.dense.clip_norm is {self.clip_norm}: give a positive norm, or null for none")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"optim.dense.ema_decay is {self.ema_decay}: it is between 0 and 1, such as 0.999, or null")


@dataclass
class PlateauConfig:
    """Lower all learning rates, of the dense part and of tables, when evaluations no longer improve."""

    metric: str = "valid.auc"
    """Metric that must improve."""
    factor: float = 0.1
    """Factor of the rates."""
    patience: int | None = None
    """Evaluations in a row without improvement before rates fall; not given: never."""
    min_delta: float = 0.0
    """Least change of the metric that counts as an improvement."""
    min_factor: float = 0.0
    """Least product of the factors: rates do not fall below this share of the schedule."""

    def __post_init__(self) -> None:
        check_patience(self.metric, self.patience, self.min_delta, "optim.plateau")
        if not 0 < self.factor < 1:
            raise UserError(f"optim.plateau.factor is {self.factor}: it must be above 0 and below 1")
        if not 0 <= self.min_factor <= 1:
            raise UserError(f"optim.plateau.min_factor is {self.min_factor}: it is a share of the rate, from 0 to 1")


@dataclass
class OptimConfig:
    """Optimizers."""

    tables: TableOptimizerConfig = field(default_factory=TableOptimizerConfig)
    """All tables that neither ``wide`` nor ``by_table`` names."""
    wide: TableOptimizerConfig = field(default_factory=lambda: TableOptimizerConfig(name="adagrad"))
    """Tables of the linear part."""
    by_table: dict[str, TableOptimizerConfig] = field(default_factory=dict)
    """Tables by name."""
    dense: DenseOptimizerConfig = field(default_factory=DenseOptimizerConfig)
    plateau: PlateauConfig = field(default_factory=PlateauConfig)

    def __post_init__(self) -> None:
        for where, table in (("tables", self.tables), *((f"by_table.{n}", t) for n, t in self.by_table.items())):
            if table.name == "ftrl":
                raise UserError(
                    f"optim.{where}.name is 'ftrl', which is for the linear part only (its rows carry FTRL's state): "
                    "set optim.wide.name=ftrl, and one of rowwise_adagrad, adagrad, sgd, adam here"
                )

    def of_table(self, table: str, *, wide: bool) -> TableOptimizerConfig:
        return self.by_table.get(table, self.wide if wide else self.tables)
