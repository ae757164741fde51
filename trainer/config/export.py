"""Section ``export``."""

from dataclasses import dataclass

from data_loaders.errors import UserError
from data_loaders.schema import one_of
from trainer.config.checks import positive

TABLE_FORMS = ("fp32", "fp16", "int8")


@dataclass
class ExportConfig:
    """How ``clicktrainer export`` stores a model, and how much of its quality that may cost (docs/serving.md)."""

    tables: str = "fp32"
    """How rows of tables are stored: fp32, fp16, or int8 with a scale and an offset a row (0.31 to 0.38 of fp32)."""
    max_auc_loss: float = 1e-4
    """Nothing is exported where the stored rows cost more AUC than this on the held-out rows."""
    onnx: bool = False
    """Whether to write the dense part as ``head.onnx``, too, for other engines, and to compare it with the run."""
    rows: int = 500_000
    """Held-out rows that are scored to compare, at most: the first ones of valid, else of test, else of train."""

    def __post_init__(self) -> None:
        one_of(self.tables, TABLE_FORMS, "export.tables")
        positive(self.rows, "export.rows")
        if not self.max_auc_loss >= 0:
            raise UserError(f"export.max_auc_loss is {self.max_auc_loss}: give a number from 0, such as 1e-4")
