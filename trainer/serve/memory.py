"""Whether a version's tables fit in this machine's memory: mapped rows that do not are read from disk, request by request."""

from collections.abc import Iterable

from data_loaders.errors import UserError
from data_loaders.messages import note
from trainer.serve.artifact import Artifact

REQUIRE = "require"


def check_memory(artifact: Artifact, served: Artifact | None, mode: str, free: int) -> None:
    """Prints the sizes. ``free``: bytes of memory that programs can get without swapping. ``served``: the version that stays
    in memory until ``artifact`` takes over; its pages count as free, so both are needed. Raises ``UserError`` with ``mode``
    require where they do not fit."""
    own = table_bytes([artifact])
    needed = table_bytes([artifact, *([served] if served else [])])
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
