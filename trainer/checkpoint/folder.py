"""The folder of a run's checkpoints: which are there, which is newest, which may go.

``step-N`` folders are committed checkpoints, ``.tmp-step-N-<hex>`` and ``.trash-step-N-<hex>`` what a crash left behind,
``best.json`` names the best one. Nothing else is ever looked into or deleted, and no link is followed.
"""

import os
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint.format import fsync, verify
from trainer.checkpoint.tensor_file import open_plain, parse_json
from trainer.run_folder import write_json

BEST = "best.json"
COMMITTED = re.compile(r"step-(0|[1-9][0-9]{0,17})")
OURS_TO_CLEAN = re.compile(r"\.(tmp|trash)-step-[0-9]+-[0-9a-f]{8}")


def fresh(folder: Path, prefix: str, name: str) -> Path:
    """A new name for a folder that is being written (``tmp``) or removed (``trash``)."""
    return folder / f".{prefix}-{name}-{secrets.token_hex(4)}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def committed(folder: Path) -> list[Path]:
    """``step-N`` folders, newest first (links are not followed)."""
    found = [path for path in folder.glob("step-*") if COMMITTED.fullmatch(path.name) and _is_folder(path)]
    return sorted(found, key=step_of, reverse=True)


def newest(folder: Path, on_corrupt: str = "fallback") -> Path | None:
    """The newest whole checkpoint. For every damaged one that it passes over it prints a line to stderr; with
    ``on_corrupt="error"`` it raises ``ValueError`` at the first."""
    for path in committed(folder):
        problem = verify(path)
        if problem is None:
            return path
        if on_corrupt == "error":
            raise ValueError(
                f"checkpoint {path}: {problem}: restore it, delete it, or set checkpoint.on_corrupt=fallback to go on "
                "from the one before"
            )
        print(f"WARNING: checkpoint {path} is damaged and passed over: {problem}", file=sys.stderr, flush=True)
    return None


def clean(folder: Path) -> None:
    """Removes what a crashed save left behind in ``folder``. Only the run that owns it may call this, on one rank."""
    for path in folder.iterdir():
        if OURS_TO_CLEAN.fullmatch(path.name) and _is_folder(path):
            shutil.rmtree(path)


def prune(folder: Path, keep: int, also: Collection[str] = ()) -> list[str]:
    """Removes all checkpoints but the newest ``keep``, the best one and those named in ``also``; returns the names of the
    removed ones."""
    best = read_best(folder)
    kept = {*also, *([f"step-{best['step']}"] if best else [])}
    gone = [path for path in committed(folder)[keep:] if path.name not in kept]
    for path in gone:
        remove(path)
    return [path.name for path in gone]


def remove(path: Path) -> None:
    """Renamed first, so that no half of a checkpoint is ever seen under its name."""
    trash = fresh(path.parent, "trash", path.name)
    os.rename(path, trash)
    fsync(path.parent)
    shutil.rmtree(trash)


def discard(path: Path) -> None:
    """Takes away what a failed save has written, as far as that is possible; ``clean`` gets the rest."""
    if OURS_TO_CLEAN.fullmatch(path.name) and _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)


def read_best(folder: Path) -> dict[str, Any] | None:
    """``step``, ``metric`` and ``value`` of the best checkpoint; None where none is named, or nothing that can be read."""
    try:
        with open_plain(folder / BEST) as file:
            best = parse_json(file.read())
    except (OSError, ValueError):
        return None
    known = isinstance(best, dict) and set(best) == {"step", "metric", "value"} and type(best["step"]) is int
    return best if known else None


def write_best(folder: Path, best: Mapping[str, Any]) -> None:
    """``step``, ``metric`` and ``value`` of the best checkpoint; whole or not at all."""
    write_json(folder / BEST, dict(best))
    fsync(folder)


def free_bytes(folder: Path) -> int:
    """What this process may still write to the file system of ``folder``."""
    return shutil.disk_usage(folder).free


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
