"""Section ``data``."""

from dataclasses import dataclass, field

from data_loaders.schema import Schema
from trainer.config.checks import check_seed, positive


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
