"""Whether a version's tables fit in this machine's memory: mapped rows that do not are read from disk, request by request."""

from collections.abc import Iterable
from pathlib import Path

from data_loaders.errors import UserError
from data_loaders.messages import note
from trainer.serve.artifact import Artifact

MEMINFO = Path("/proc/meminfo")
REQUIRE = "require"


def check_memory(artifact: Artifact, served: Artifact | None, mode: str, meminfo: Path = MEMINFO) -> None:
    """Prints the sizes. ``served``: the version that stays in memory until ``artifact`` takes over; its pages count as
    available in ``meminfo``, so both are needed. Raises ``UserError`` with ``mode`` require where they do not fit."""
    own = table_bytes([artifact])
    needed = table_bytes([artifact, *([served] if served else [])])
    free = available(meminfo)
    sizes = f"{artifact.version}: tables of {own / 1e9:.3g} GB, {free / 1e9:.3g} GB of memory available"
    if needed <= free:
        return note(sizes)
    short = f"{sizes}, {needed / 1e9:.3g} GB needed" + (
        f" beside {served.version} until it is replaced" if served else ""
    )
    if mode == REQUIRE:
        raise UserError(f"{short}: export with export.tables=int8, free memory, or serve.memory=warn")
    note(f"{short}: rows that do not fit are read from disk at request time; export.tables=int8 makes them smaller")
    return None


def table_bytes(artifacts: Iterable[Artifact]) -> int:
    """A file that versions share by links counts once, as it does in memory."""
    stats = [(artifact.path / table.file).stat() for artifact in artifacts for table in artifact.tables]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def available(meminfo: Path = MEMINFO) -> int:
    """Bytes that programs can get without swapping: MemAvailable."""
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
