"""Section ``data``."""

from dataclasses import dataclass, field

from data_loaders.schema import Schema
from trainer.config.checks import check_seed, positive


@dataclass
class StreamConfig:
    """How rows are read."""

    shards: int = 64
    """Logical shards, each a fixed part of every global batch. Together with ``seed`` they alone determine the order of
    rows, whatever the number of ranks."""
    shuffle: bool = True
    """Shuffle rows; ``false`` reads them in the order of files (time), one batch after the other. Where prepare has
    shuffled all files (``order.shuffle``), row groups alone change places from epoch to epoch."""
    shuffle_rows: int = 1 << 18
    """Size of the shuffle buffer in rows, over all ranks; of data that prepare has shuffled, of what is read at a time."""
    threads: int = 1
    """Threads of each rank that read, decode and shuffle; one more copies rows into batches."""
    prefetch_batches: int = 4
    """Batches made ahead on each rank."""

    def __post_init__(self) -> None:
        for name in ("shards", "shuffle_rows", "threads", "prefetch_batches"):
            positive(getattr(self, name), f"data.stream.{name}")


@dataclass
class SyntheticConfig:
    """Rows to generate where ``data.root`` has none (``data=synthetic`` and ``data=synthetic_pairs``)."""

    train_rows: int = 1_000_000
    """Rows of train."""
    valid_rows: int = 100_000
    """Rows of valid."""
    test_rows: int = 100_000
    """Rows of test."""
    seed: int = 7
    """Seed of the generator."""

    def __post_init__(self) -> None:
        for name in ("train_rows", "valid_rows", "test_rows"):
            positive(getattr(self, name), f"data.synthetic.{name}")
        check_seed(self.seed, "data.synthetic.seed")


@dataclass
class DataConfig:
    """Files and their schema."""

    name: str = ""
    """Name of the data set, for the record."""
    root: str = "???"  # OmegaConf's mark of a mandatory value
    """Folder, or URI such as ``s3://bucket/folder``, that ``train``, ``valid`` and ``test`` lie under."""
    train: list[str] = field(default_factory=list)
    """Paths, folders or globs of the training files, under ``root``."""
    valid: list[str] = field(default_factory=list)
    """Paths, folders or globs of the validation files, under ``root``."""
    test: list[str] = field(default_factory=list)
    """Paths, folders or globs of the test files, under ``root``."""
    new_since: str | None = None
    """Folder of an earlier run, or one of its checkpoints: train only those files of ``train`` that this run and the
    runs before it (by their own ``new_since``) have not trained. Files are compared by their paths under ``root``."""
    prepared: str | None = None
    """Output folder of ``clicktrainer prepare`` that the files come from. ``clicktrainer predict --raw`` needs its
    vocabularies and statistics."""
    probability: str | None = None
    """Column with the true click probability, where the data has one (synthetic): the best possible AUC is reported."""
    synthetic: SyntheticConfig | None = None
    stream: StreamConfig = field(default_factory=StreamConfig)
    schema: Schema = field(default_factory=Schema)
