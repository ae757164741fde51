"""Sections ``evaluation`` and ``early_stopping``."""

from dataclasses import dataclass, field

from data_loaders.errors import UserError
from trainer.config.checks import check_patience, positive


@dataclass
class QualitiesConfig:
    """What ranked lists are like beside their clicks: coverage and exposure of items, diversity, novelty (docs/metrics.md)."""

    item: str | None = None
    """Column that identifies the item of a row; asks for coverage and exposure. Needs ``evaluation.request``."""
    category: str | None = None
    """Column of the item's category; asks for diversity, of categories."""
    cosine: bool = False
    """Diversity as cosine distance of the items' rows in the table that column ``item`` is looked up in; by
    ``clicktrainer evaluate`` alone."""
    novelty: bool = False
    """Novelty, for which the column ``item`` of data.train is counted; by ``clicktrainer evaluate`` alone."""

    def __post_init__(self) -> None:
        for name in ("category", "cosine", "novelty"):
            if getattr(self, name) and not self.item:
                raise UserError(f"evaluation.qualities.{name} needs evaluation.qualities.item: name the item's column")

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that lists are described by."""
        return tuple(name for name in (self.item, self.category) if name)


@dataclass
class EvaluationConfig:
    """When valid is evaluated, and what is computed besides AUC and log loss (docs/metrics.md)."""

    every_steps: int | None = None
    """Steps between two evaluations of valid; by default once an epoch."""
    batch_size: int | None = None
    """Global batch size of evaluation; by default that of training."""
    before_training: bool = False
    """Score the rows to be trained once before the first step, as models that are trained day by day are judged
    (progressive validation); ``before`` in ``metrics.json``."""
    group_by: str | None = None
    """Column, a feature or not, whose groups GAUC averages over."""
    request: str | None = None
    """Column that identifies the request, for NDCG, hit rate and MRR."""
    top_k: list[int] = field(default_factory=lambda: [1, 5, 10])
    """Cut-offs of the hit rate, of NDCG and of the qualities."""
    slices: list[str] = field(default_factory=list)
    """Columns for whose values metrics are computed separately."""
    qualities: QualitiesConfig = field(default_factory=QualitiesConfig)
    """Coverage, exposure, diversity and novelty of the ranked lists."""
    memory_mb: int = 1024
    """Memory of each rank for the rows that grouped metrics keep; further rows go to temporary files."""
    calibration_bins: int = 20
    """Bins of the expected calibration error."""
    base_auc: float | None = None
    """AUC of the model that ``relaimpr`` compares with."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "batch_size"):
            if getattr(self, name) is not None:
                positive(getattr(self, name), f"evaluation.{name}")
        for name in ("memory_mb", "calibration_bins"):
            positive(getattr(self, name), f"evaluation.{name}")
        if not self.top_k or min(self.top_k) < 1 or len(set(self.top_k)) < len(self.top_k):
            raise UserError(f"evaluation.top_k is {self.top_k}: give different positive numbers, such as [1, 5, 10]")
        if self.qualities.item and not self.request:
            raise UserError("evaluation.qualities.item needs evaluation.request: name the column of the request")
        if len(set(self.slices)) < len(self.slices):
            raise UserError(f"evaluation.slices is {self.slices}: name each column once")
        if self.base_auc is not None and not 0.5 < self.base_auc < 1:
            raise UserError(f"evaluation.base_auc is {self.base_auc}: RelaImpr compares with an AUC between 0.5 and 1")

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that rows are grouped by, each once."""
        names = self.group_by, self.request, *self.slices, *self.qualities.columns
        return tuple(dict.fromkeys(name for name in names if name))


@dataclass
class EarlyStoppingConfig:
    """Stop when evaluations no longer improve; the best checkpoint is then restored and evaluated."""

    metric: str = "valid.auc"
    """Metric that must improve."""
    patience: int | None = None
    """Evaluations in a row without improvement before training stops; not given: never."""
    min_delta: float = 0.0
    """Least change of the metric that counts as an improvement."""

    def __post_init__(self) -> None:
        check_patience(self.metric, self.patience, self.min_delta, "early_stopping")
