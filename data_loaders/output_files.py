"""Files that a command writes where its user says: never over a file of another kind."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from data_loaders.errors import UserError

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib makes one slash of two


def check_output(option: str, path: Path, suffixes: Sequence[str], is_ours: Callable[[Path], bool]) -> None:
    """Raises ``UserError`` unless ``path``, which the user gave by ``option``, ends in one of ``suffixes``, and nothing is
    there or a file that this command may replace: one that ``is_ours``."""
    if _URI.match(str(path)):
        raise UserError(f"{option} {path} is an address: name a file of this machine, and copy it there")
    if path.suffix not in suffixes:
        raise UserError(f"{option} {path}: only {', '.join(suffixes)} can be written: give a name that ends so")
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file in it")
    if path.exists() and not is_ours(path):
        raise UserError(
            f"{option} {path} exists and is not what this command writes: choose another name, or move that file away"
        )


def head_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(1 << 12)
