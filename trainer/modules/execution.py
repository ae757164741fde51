"""How layers compute, whatever they compute: decided where a model is made, and the same as long as the model lives.

A model's constructor takes what its paper names. These choices belong to the job, so they surround the constructor, as
``torch.device`` does, and layers read them while they are made:

    with executed_by(Execution(all_reduce=all_reduce_sum)):
        model = Model(schema, device=device)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

SumOverRanks = Callable[[Tensor], object]  # in place


def float32(device: torch.device) -> torch.dtype | None:
    return None


def bfloat16(device: torch.device) -> torch.dtype | None:
    return torch.bfloat16


@dataclass(frozen=True)
class Execution:
    """``autocast_dtype``: what every ``Head`` multiplies matrices in on a device, None for float32. ``all_reduce``: the
    sum over ranks, for statistics of the global batch (``BatchStatistics``); None where there is one rank. ``compiled``:
    on a CPU, by compiled kernels (``trainer/kernels``), which must be there."""

    autocast_dtype: Callable[[torch.device], torch.dtype | None] = float32
    all_reduce: SumOverRanks | None = None
    compiled: bool = False


PLAIN = Execution()
_CURRENT = ContextVar("execution", default=PLAIN)


def current() -> Execution:
    return _CURRENT.get()


@contextmanager
def executed_by(execution: Execution) -> Iterator[None]:
    """Layers that are made within compute as ``execution`` says."""
    token = _CURRENT.set(execution)
    try:
        yield
    finally:
        _CURRENT.reset(token)
