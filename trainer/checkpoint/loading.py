"""A checkpoint, loaded by all ranks together. What reads it (``format.Reader``) neither prints nor communicates."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from data_loaders.errors import UserError
from data_loaders.messages import note
from trainer.checkpoint.format import Reader
from trainer.checkpoint.manifest import FACTS, JOB_FACTS, read_json
from trainer.checkpoint.paths import AnyPath
from trainer.checkpoint.piece import Piece
from trainer.checkpoint.verification import verify_together
from trainer.runtime.distributed import Ranks, on_all_ranks, on_ranks


class Restorable(Protocol):
    """``pieces`` are live memory, which is filled in place; ``restore`` gets the facts and the reader after that."""

    pieces: Sequence[Piece]

    def restore(self, facts: Mapping[str, Any], reader: Reader) -> None: ...


def load(
    path: AnyPath, state: Restorable, ranks: Ranks, *, weights_only: bool = False, verified: bool = False
) -> dict[str, Any]:
    """Loads a committed checkpoint in place, strictly both ways, and returns its facts.

    ``weights_only``: to score with, as ``Reader.load``. ``verified``: its bytes have been hashed already (``newest_whole``).
    Raises ``UserError`` on every rank where it is damaged, or does not fit ``state``.
    """
    problem = None if verified else verify_together(path, ranks)
    if problem:
        raise UserError(f"checkpoint {path}: {problem}")
    facts, reader, converted = read_json(path, FACTS, JOB_FACTS), Reader(path), list[str]()
    try:
        converted = reader.load(state.pieces, weights_only=weights_only)
    except ValueError as error:
        problem = str(error)
    if problem := on_all_ranks(problem):
        raise UserError(problem)
    lines = {line for found in on_ranks(converted) for line in found}
    if ranks.is_first:
        for line in sorted(lines):
            note(f"checkpoint {path.name}: {line}")
    state.restore(facts, reader)
    return facts
