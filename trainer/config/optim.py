"""Section ``optim``."""

import math
from dataclasses import dataclass, field
from typing import Any

from data_loaders.schema import one_of
from trainer.config.checks import check_patience

TABLE_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd", "adam", "ftrl")
DENSE_OPTIMIZERS = ("adam", "adamw", "adagrad", "sgd", "rmsprop", "adamax", "nadam", "radam", "adadelta")
DECAYED_ROWS = ("touched", "all")
DECAYS = ("constant", "linear", "cosine")


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
