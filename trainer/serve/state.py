"""What a supervisor and its workers know of each other: small files in a folder of their own.

``accepted.json`` names the version that workers serve, and counts the refused ones; ``ready-<worker>`` is there once a worker
answers; ``metrics/`` is Prometheus'."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from data_loaders.state_files import write_json

ACCEPTED = "accepted.json"
METRICS = "metrics"


@dataclass(frozen=True)
class Accepted:
    """``version``: a folder that was verified; ``refused``: how many were not taken over."""

    version: str
    refused: int = 0


def accept(folder: Path, accepted: Accepted) -> None:
    write_json(folder / ACCEPTED, asdict(accepted))


def accepted(folder: Path) -> Accepted:
    return Accepted(**json.loads((folder / ACCEPTED).read_text()))


def ready(folder: Path, worker: int) -> Path:
    return folder / f"ready-{worker}"
