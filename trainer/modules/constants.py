"""Numbers as tensors that are made once: to fill one takes a launch."""

from functools import cache

import torch
from torch import Tensor


def constant(value: float, like: Tensor) -> Tensor:
    """``value`` [], of the type and on the device of ``like``. A program that is traced has its own."""
    if torch.compiler.is_compiling():
        return like.new_full((), value)
    return _made_once(value, like.dtype, like.device)


@cache
def _made_once(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)
