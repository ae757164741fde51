"""A rank's tensors at one instant, in host memory: training goes on while they are written."""

from collections.abc import Callable, Sequence
from functools import partial

import psutil
import torch
from torch import Tensor

from data_loaders.messages import note, warn
from trainer.checkpoint.piece import Piece
from trainer.checkpoint.tensor_file import place_tensors
from trainer.runtime.distributed import Ranks, on_all

WORTH_REPORTING = 100_000_000  # bytes
SHARE = 0.8  # of the free memory that a snapshot may take


class Snapshot:
    """Copies in memory that is kept from save to save."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._copies: list[Tensor] | None = None

    def take(self, pieces: Sequence[Piece]) -> Callable[[], list[Tensor]]:
        """Copies each piece; returns what waits for the copies (a GPU makes them while its host goes on), and gives them."""
        if self._copies is None:
            live = {str(number): piece.tensor for number, piece in enumerate(pieces)}
            placed = place_tensors(live, pinned=self._on_gpu)
            self._copies = [placed[number] for number in live]
        for copy, piece in zip(self._copies, pieces, strict=True):
            copy.copy_(piece.tensor, non_blocking=True)
        event = torch.cuda.Event() if self._on_gpu else None
        if event is not None:
            event.record()  # on the stream of training: the next step's updates come after the copies
        return partial(_awaited, self._copies, event)


def _awaited(copies: list[Tensor], event: torch.cuda.Event | None) -> list[Tensor]:
    if event is not None:
        event.synchronize()
    return copies


def bytes_of(pieces: Sequence[Piece]) -> int:
    """What this rank writes of ``pieces``."""
    return sum(piece.tensor.nbytes for piece in pieces if piece.written)


def has_room(pieces: Sequence[Piece], ranks: Ranks) -> bool:
    """Whether every rank has the memory for a snapshot of its ``pieces``. Rank 0 warns where not, and says what a large one
    takes."""
    needed, free = bytes_of(pieces), psutil.virtual_memory().available
    fits = on_all(needed <= SHARE * free / ranks.local_world_size)
    if not fits and ranks.is_first:
        warn(
            f"a snapshot of {needed / 1e9:.2f} GB a rank does not fit into the memory that is free "
            f"({free / 1e9:.2f} GB for {ranks.local_world_size} rank(s)): training will wait for checkpoints "
            "(checkpoint.asynchronous=false says the same without this line)"
        )
    elif ranks.is_first and needed >= WORTH_REPORTING:
        note(f"A checkpoint's snapshot takes {needed / 1e6:,.0f} MB of rank 0's memory")
    return fits
