"""Section ``sharding``."""

from dataclasses import dataclass, field

from data_loaders.schema import one_of

SHARDING_TYPES = ("table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard", "data_parallel")


@dataclass
class ShardingConfig:
    """How tables are divided over ranks (docs/scaling.md)."""

    types: list[str] = field(default_factory=list)
    """Sharding types that the planner may choose from; empty: all that device and optimizer allow."""
    by_table: dict[str, str] = field(default_factory=dict)
    """Sharding type of a table."""
    hbm_gb: float | None = None
    """Memory of a GPU in GB; by default measured."""
    ddr_gb: float | None = None
    """Memory of a rank's share of the host in GB; by default measured."""

    def __post_init__(self) -> None:
        for name in self.types:
            one_of(name, SHARDING_TYPES, "sharding.types")
        for table, name in self.by_table.items():
            one_of(name, SHARDING_TYPES, f"sharding.by_table.{table}")
