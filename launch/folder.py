"""The folder of several runs (of a sweep, of many days): one process at a time, one set of settings."""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_loaders.errors import UserError
from data_loaders.state_files import read_json, write_json

LOCK = ".lock"
SHOWN = 5


@contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Makes the folder, which the user named by ``key``, and holds it. Raises ``UserError`` while another process does, or
    where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / LOCK, "a")  # noqa: SIM115 - held as long as the block lasts
    except OSError as error:
        raise UserError(f"{key}={folder} cannot be made ({error.strerror}): choose a writable place") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{key}={folder} is in use by another process: wait for it, or choose another") from None
        yield


def check_settings(folder: Path, key: str, settings: Mapping[str, Any]) -> None:
    """Keeps the settings that a folder is begun with, in ``settings.json``. Raises ``UserError`` where they were others, where
    they cannot be written, and where the folder holds something else. A damaged file is written anew."""
    path = folder / "settings.json"
    others = sorted(each.name for each in folder.iterdir() if each.name not in (LOCK, path.name))
    if others and not path.exists():
        raise UserError(
            f"{key}={folder} holds other files already ({', '.join(others[:SHOWN])}{', …' if len(others) > SHOWN else ''}): name "
            "a new folder, or an empty one"
        )
    before = read_json(path, {})
    if not before:
        try:
            write_json(path, settings)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): choose a writable {key}") from None
        return
    for name, value in settings.items():
        if before.get(name) != value:
            raise UserError(
                f"{key}={folder} was begun with other settings ({name} was {before.get(name)}, is {value}): restore them, "
                f"or choose another {key}"
            )
