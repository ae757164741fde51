"""Sections ``evaluation`` and ``early_stopping``."""

from dataclasses import dataclass, field

from trainer.config.checks import check_patience, positive


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
