"""Small files that have to outlive a crash and a power cut: the one way to write them, and to read them back.

A file is written under another name, synced, and renamed; then the folder is synced. So whatever happens, and whenever, its
own name shows the old text or the new one, whole.
"""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any, TypeVar

from data_loaders.messages import warn

T = TypeVar("T")


def write_text(path: Path, text: str) -> None:
    """Raises ``OSError`` with the path; the text that was there before is then still there."""
    # Several processes may write at once: the last one wins.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        publish(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """NaN and infinities become null, as JSON has none."""
    return json.dumps(finite(value), indent=2) + "\n"


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def publish(part: Path, path: Path) -> None:
    """Gives the finished file ``part`` its name ``path``, in the same folder; both are on disk when it returns."""
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns once a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_below(folder: Path) -> None:
    """The same of all that is in a folder: before a rename makes it visible."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def read_json(path: Path, default: T, *, quiet: bool = False) -> T:
    """What a file of ours holds, where nothing depends on it: ``default`` where the file is not there, and where it is
    damaged or holds another type than ``default``, which a line on stderr says unless ``quiet``."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return default
    except (OSError, ValueError, RecursionError) as error:
        problem = (error.strerror if isinstance(error, OSError) else None) or "it is not JSON"
    else:
        if isinstance(value, type(default)):
            return value
        problem = f"it holds no {'list' if isinstance(default, list) else 'map'}"
    if not quiet:
        warn(f"{path} cannot be read ({problem}) and is passed over")
    return default
