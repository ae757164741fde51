"""A piece of a tensor: what one rank holds of it, and where that lies in the whole."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """``tensor`` is the live memory at ``offset`` of the tensor ``name``, whose shape is ``shape``: read to be saved,
    written when loaded. ``written``: whether this rank saves it. ``widths``: the columns that each of its parts
    stands for, where a tensor has one value for each part of a row (``trainer.sharding.model_state``)."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor = field(repr=False, compare=False)
    written: bool = True
    widths: tuple[int, ...] | None = None


def whole_piece(name: str, tensor: Tensor, widths: tuple[int, ...] | None = None) -> Piece:
    return Piece(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor.detach(), widths=widths)


def empty_piece(name: str, shape: tuple[int, ...], dtype: torch.dtype, widths: tuple[int, ...] | None = None) -> Piece:
    """On a rank that holds nothing of a tensor [rows, columns]."""
    return Piece(name, shape, (0, 0), torch.empty(0, shape[1], dtype=dtype), written=False, widths=widths)


def written_once(replicated: Sequence[Piece]) -> list[Piece]:
    """Pieces that all ranks hold alike, each marked to be written by one rank: from the largest on, by the one that has
    the fewest bytes to write until then. The same choice on all ranks, without asking."""
    loads = [0] * dist.get_world_size()
    found = []
    for piece in sorted(replicated, key=lambda piece: (-piece.tensor.nbytes, piece.name)):
        writer = loads.index(min(loads))
        loads[writer] += piece.tensor.nbytes
        found.append(replace(piece, written=writer == dist.get_rank()))
    return found


def in_order(pieces: Sequence[Piece]) -> list[Piece]:
    return sorted(pieces, key=lambda piece: (piece.name, piece.offset))
