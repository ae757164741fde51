"""A piece of a tensor: what one rank holds of it, and where that lies in the whole."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """``tensor`` is the live memory at ``offset`` of the tensor ``name``, whose shape is ``shape``: read to be saved,
    written when loaded. ``written``: whether this rank saves it. ``widths``: the columns that each of its parts
    stands for, where a tensor has one value for each part of a row (``trainer.pieces``)."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor = field(repr=False, compare=False)
    written: bool = True
    widths: tuple[int, ...] | None = None
