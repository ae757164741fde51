"""What a user says about differences between the old run and the new one: patterns on canonical names.

A name is ``tables/<table>``, ``dense/<parameter or buffer>`` or ``features/<feature or cross>``; a pattern may hold ``*``,
``?`` and ``[…]``. A feature's name stands for its columns in the dense layers, its linear weights (``wide_<feature>``) and
a table that no other feature reads.
"""

import math
import os
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from data_loaders.errors import UserError

KINDS = ("tables/", "dense/", "features/")
LISTS = ("skip", "require", "drop", "grow")
MAPS = ("rename", "optimizer")


@dataclass
class WarmStartConfig:
    """Start from the checkpoint of an earlier run (docs/state.md)."""

    path: str | None = None
    """Checkpoint, or folder of a run (its newest checkpoint)."""
    dry_run: bool = False
    """Report what would be taken, and stop."""
    prepared: str | None = None
    """The earlier run's folder of vocabularies, where it has moved from its ``data.prepared``."""
    trust_root: str | None = None
    """Folder or URI that ``path`` must lie under, links followed: for whoever sets up jobs that others start. Nothing
    in a checkpoint is executed, but a model from a stranger would be trained on and served."""
    rename: dict[str, str] = field(default_factory=dict)
    """Old name -> new name."""
    skip: list[str] = field(default_factory=list)
    """New tables and parameters that keep their initial values."""
    require: list[str] = field(default_factory=list)
    """New tables and parameters that must come from the earlier run."""
    drop: list[str] = field(default_factory=list)
    """Old tables and parameters that may be lost."""
    grow: list[str] = field(default_factory=list)
    """Tables whose ids kept their rows although no vocabulary shows it."""
    optimizer: dict[str, str] = field(default_factory=dict)
    """Pattern of tables and dense parameters -> what becomes of their optimizer state: ``keep`` (default), ``reset`` or
    ``decay=<factor>``, which multiplies sums of AdaGrad and moments of Adam. The first match counts."""

    def __post_init__(self) -> None:
        if self.path is None and (
            self.dry_run or self.prepared or any(getattr(self, name) for name in (*LISTS, *MAPS))
        ):
            raise UserError(
                "warm_start has rules but no path: give warm_start.path, a checkpoint or the folder of a run"
            )
        if self.path is not None and self.trust_root is not None and not _lies_under(self.path, self.trust_root):
            raise UserError(
                f"warm_start.path={self.path} lies outside warm_start.trust_root={self.trust_root}: copy the run there, or, "
                "if you trust it where it is, set warm_start.trust_root=null"
            )
        for name in LISTS:
            for pattern in getattr(self, name):
                _check_name(pattern, f"warm_start.{name}")
        for pattern, text in self.optimizer.items():
            _check_name(pattern, "warm_start.optimizer")
            state_factor(text, f"warm_start.optimizer.{pattern}")
        self._check_renames()

    def factor(self, name: str) -> float | None:
        """What the optimizer state of ``name`` is multiplied by; None: it is left as a new run has it."""
        for pattern, text in self.optimizer.items():
            if fnmatchcase(name, pattern):
                return state_factor(text, pattern)
        return 1.0

    def _check_renames(self) -> None:
        for old, new in self.rename.items():
            for name in (old, new):
                _check_name(name, "warm_start.rename")
            if old.partition("/")[0] != new.partition("/")[0]:
                raise UserError(f"warm_start.rename: '{old}' cannot become '{new}': both must be of one kind")
        if len(set(self.rename.values())) < len(self.rename):
            raise UserError(f"warm_start.rename: two old names become one new one ({self.rename}): choose one of them")


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def state_factor(text: str, where: str) -> float | None:
    """``keep`` -> 1, ``reset`` -> None, ``decay=0.5`` -> 0.5. Raises ``UserError``."""
    if text in ("keep", "reset"):
        return 1.0 if text == "keep" else None
    word, _, number = text.partition("=")
    try:
        factor = float(number) if word == "decay" else math.nan
    except ValueError:
        factor = math.nan
    if not 0 < factor <= 1:
        raise UserError(f"{where} is {text!r}: give keep, reset, or decay=<factor above 0, at most 1>")
    return factor


def _lies_under(path: str, root: str) -> bool:
    path, root = (posixpath.normpath(it) if "://" in it else os.path.realpath(it) for it in (path, root))
    return path == root or path.startswith(root.rstrip("/") + "/")


def _check_name(name: str, where: str) -> None:
    if not name.startswith((*KINDS, "*")):
        raise UserError(f"{where}: {name!r} is no name: it begins with {', '.join(KINDS)} or *")
