"""The choice of the engine that runs the expressions."""

import re
from pathlib import Path

from data_loaders.errors import UserError
from data_loaders.prepare.declaration import ENGINES
from data_loaders.prepare.duckdb_engine import DuckDBEngine
from data_loaders.prepare.engine import Engine
from data_loaders.schema import one_of


def make_engine(name: str, work: Path, *, memory_limit: str, threads: int, options: dict[str, str]) -> Engine:
    """``memory_limit``: such as 4GB, of the whole process. ``options``: settings of the engine's own. Raises ``UserError``
    for an engine that is not installed."""
    one_of(name, ENGINES, "engine")
    memory = parse_bytes(memory_limit)
    if name == "duckdb":
        return DuckDBEngine(work, memory, threads, options)
    try:  # an optional package
        from data_loaders.prepare.spark_engine import SparkEngine
    except ModuleNotFoundError as error:
        if error.name not in ("pyspark", "py4j"):
            raise
        raise UserError(
            "engine=spark needs the package pyspark (pip install 'pyspark>=4,<4.1') and Java 17; engine=duckdb needs neither"
        ) from None
    return SparkEngine(work, memory, threads, options)


def parse_bytes(text: str) -> int:
    """``4GB``, ``4GiB``, ``500MB`` -> bytes. Raises ``UserError``."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kKmMgGtT]?)(i?)[bB]?\s*", str(text))
    try:
        number = float(found.group(1))
    except (AttributeError, ValueError):
        raise UserError(f"memory_limit={text}: write a size such as 4GB or 800MB") from None
    base = 1024 if found.group(3) else 1000
    return int(number * base ** " KMGT".index(found.group(2).upper() or " "))
