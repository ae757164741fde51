"""Which version of an export folder is served: ``current.json``. Imports nothing heavy: a supervisor reads it, too."""

import json
from pathlib import Path

from data_loaders.errors import UserError
from data_loaders.state_files import write_json

CURRENT = "current.json"
MANIFEST = "MANIFEST.json"
LARGEST = 1 << 16  # bytes


def current(export: Path) -> Path:
    """The version to serve of an export folder; ``export`` itself where it is a version. Raises ``UserError``."""
    if (export / MANIFEST).is_file():
        return export
    try:
        with open(export / CURRENT, "rb") as file:
            named = json.loads(file.read(LARGEST))
    except OSError:
        raise UserError(
            f"{export} holds no exported model: write one with clicktrainer export RUN --output {export}"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"{export}: {CURRENT} is no JSON: publish a version again with clicktrainer export") from None
    version = named.get("version") if isinstance(named, dict) else None
    if not isinstance(version, str) or Path(version).name != version or version in ("", ".", ".."):
        raise UserError(f"{export}: {CURRENT} names {version!r:.200}, which is no folder's name")
    return export / version


def publish(export: Path, version: str) -> None:
    """From now on ``version`` is the one to serve; atomic."""
    write_json(export / CURRENT, {"version": version})
