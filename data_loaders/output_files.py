"""Files that a command writes where its user says: never over a file of another kind."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_loaders.errors import UserError
from data_loaders.storage import Stat, Storage, is_uri

MAKER = b"made_by"  # in a Parquet file's metadata: the module that wrote it
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


def is_made_by(path: Path, maker: bytes) -> bool:
    """Whether a file is Parquet with ``maker`` under ``MAKER`` in its metadata."""
    try:
        return (pq.read_schema(path).metadata or {}).get(MAKER) == maker
    except (OSError, ValueError, pa.ArrowException):
        return False


def check_apart(output: Path, key: str, paths: Sequence[str], root: str) -> None:
    """Raises ``UserError`` where ``output`` is one of the files that ``paths`` stand for, by whatever name, or would be
    the next time."""
    storage = Storage(root)
    same = output.exists() and any(
        not is_uri(stat.name) and os.path.samefile(stat.name, output)
        for path in paths
        for stat in _found(storage, path)
    )
    if same or any(storage.stands_for(path, str(output)) for path in paths):
        raise UserError(f"--output {output} is among the files of {key}: choose a name elsewhere")


def _found(storage: Storage, path: str) -> list[Stat]:
    """Nothing for what is not there: that is another error, or none."""
    try:
        return storage.expand([path])
    except ValueError:
        return []
