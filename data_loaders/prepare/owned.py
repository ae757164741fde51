"""Which files of a folder ``prepare`` wrote: it deletes those, and no others.

A finished output holds ``.prepared.json``: every other file by its path, with its size and, of small ones, its sha256. What
is not listed there, or is no longer as it was written, belongs to somebody else.
"""

import hashlib
import json
import os
from pathlib import Path

from data_loaders.state_files import read_json

MARKER = ".prepared.json"
_MADE_BY = "data_loaders.prepare"
_SMALL = 1 << 20  # bytes: what people edit


def record(folder: Path) -> str:
    """The marker's text, for the current content of a folder."""
    files = {str(path.relative_to(folder)): _facts(path) for path in _entries(folder) if path.is_file()}
    return json.dumps({"made_by": _MADE_BY, "files": files}, indent=1) + "\n"


def foreign(folder: Path) -> list[str] | None:
    """What is in a folder and was not written by ``prepare``, or has changed since; None where nothing says what was."""
    files = _listed(folder)
    if files is None:  # an empty one is left where delete was interrupted
        return [] if folder.is_dir() and not _entries(folder) else None
    parents = {str(parent) for name in files for parent in Path(name).parents}
    found = []
    for path in _entries(folder):
        name = str(path.relative_to(folder))
        is_folder = path.is_dir() and not path.is_symlink()
        if not (name in parents if is_folder else name == MARKER or files.get(name) == _facts(path)):
            found.append(name)
    return sorted(found)


def delete(folder: Path) -> None:
    """What ``prepare`` wrote, and the folders that this leaves empty. The marker last, so that an interrupted
    deletion can be resumed."""
    files = _listed(folder) or {}
    for path in _entries(folder):  # and not by the names in the marker, which may lead elsewhere
        if path.is_file() and not path.is_symlink() and files.get(str(path.relative_to(folder))) == _facts(path):
            path.unlink()
    folders = [path for path in _entries(folder) if path.is_dir() and not path.is_symlink()]
    for path in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        _remove_if_empty(path)
    if [path.name for path in folder.iterdir()] == [MARKER]:
        (folder / MARKER).unlink()
    _remove_if_empty(folder)


def _listed(folder: Path) -> dict[str, list] | None:
    content = read_json(folder / MARKER, {})
    files = content.get("files") if isinstance(content, dict) and content.get("made_by") == _MADE_BY else None
    return files if isinstance(files, dict) else None


def _entries(folder: Path) -> list[Path]:
    """Files, folders and links below, links not followed."""
    found = [(Path(inside), name) for inside, folders, files in os.walk(folder) for name in (*folders, *files)]
    return [inside / name for inside, name in found]


def _facts(path: Path) -> list:
    """Size and digest (None of a large file); nothing of a link or what is no file."""
    if path.is_symlink() or not path.is_file():
        return []
    size = path.stat().st_size
    return [size, hashlib.sha256(path.read_bytes()).hexdigest() if size <= _SMALL else None]


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
