"""Section ``sharding``."""

from dataclasses import dataclass, field

from data_loaders.schema import one_of

SHARDING_TYPES = ("table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard", "data_parallel")


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
