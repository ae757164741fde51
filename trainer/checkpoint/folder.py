"""The folder of a run's checkpoints: which are there, which is newest, which may go.

``step-N`` folders are committed checkpoints; ``.tmp-step-N-<hex>`` and ``.trash-step-N-<hex>``, and in an object store
prefixes ``step-N`` without a manifest, are what a crash left behind; ``best.json`` names the best one. Nothing else is ever
looked into or deleted, and no link is followed.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from data_loaders.errors import UserError
from data_loaders.messages import note
from data_loaders.state_files import json_text
from trainer.checkpoint.format import verify
from trainer.checkpoint.paths import AnyPath, Unreachable
from trainer.checkpoint.place import place_of
from trainer.runtime.checked_json import Number, Whole, check_form, parse_json, printable

BEST = "best.json"
BEST_FORM = {"step": Whole(), "metric": str, "value": Number()}
LARGEST_NOTE = 4096  # bytes


def step_of(path: AnyPath) -> int:
    return int(path.name.removeprefix("step-"))


def committed(folder: AnyPath) -> list[AnyPath]:
    """``step-N`` folders, newest first (links are not followed)."""
    return sorted(place_of(folder).committed(folder), key=step_of, reverse=True)


def newest(folder: AnyPath, on_corrupt: str = "fallback") -> AnyPath | None:
    """The newest whole checkpoint. For every damaged one that it passes over it prints a line to stderr; with
    ``on_corrupt="error"`` it raises ``UserError`` at the first. Raises ``OSError`` for a store that does not answer."""
    return first_whole(committed(folder), on_corrupt, verify, say=True)


def first_whole(
    paths: Iterable[AnyPath], on_corrupt: str, check: Callable[[AnyPath], str | None], *, say: bool
) -> AnyPath | None:
    """The first of ``paths`` that ``check`` finds nothing wrong with, as ``newest``. ``say``: whether this rank prints."""
    for path in paths:
        problem = check(path)
        if problem is None:
            return path
        if on_corrupt == "error":
            raise UserError(
                f"checkpoint {path}: {problem}: restore it, delete it, or set checkpoint.on_corrupt=fallback to go on "
                "from the one before"
            )
        if say:
            line = f"WARNING: checkpoint {path} is damaged and passed over: {problem}"
            note(printable(line))
    return None


def clean(folder: AnyPath) -> None:
    """Removes what a crashed save left behind in ``folder``. Only the run that owns it may call this, on one rank."""
    place_of(folder).clean(folder)


def prune(folder: AnyPath, keep: int) -> list[str]:
    """Removes all checkpoints but the newest ``keep`` and the best one; returns the names of the removed ones."""
    best = read_best(folder)
    gone = [path for path in committed(folder)[keep:] if best is None or step_of(path) != best["step"]]
    for path in gone:
        remove(path)
    return [path.name for path in gone]


def remove(path: AnyPath) -> None:
    """So that no half of a checkpoint is ever seen under its name."""
    place_of(path).remove(path)


def read_best(folder: AnyPath) -> dict[str, Any] | None:
    """``step``, ``metric`` and ``value`` of the best checkpoint; None where none is named, or nothing that can be read."""
    try:
        best = parse_json(place_of(folder).read(folder / BEST, LARGEST_NOTE))
        check_form(best, BEST_FORM, BEST)
    except Unreachable:  # there may well be one
        raise
    except (OSError, ValueError):
        return None
    return best if set(best) == set(BEST_FORM) else None


def write_best(folder: AnyPath, best: Mapping[str, Any]) -> None:
    """``step``, ``metric`` and ``value`` of the best checkpoint; whole or not at all."""
    place = place_of(folder)
    place.write(folder / BEST, json_text(dict(best)))
    place.flush(folder)
