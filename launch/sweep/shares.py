"""Disjoint parts of the machine for trials side by side: GPUs, and cores."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_loaders.errors import UserError


@dataclass(frozen=True)
class Share:
    """``gpus`` as CUDA_VISIBLE_DEVICES names them (empty: leave the variable), ``cores`` by number (empty: any)."""

    gpus: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()


def split(parallel: int, gpus: Sequence[str], cores: Sequence[int]) -> list[Share]:
    """Equal shares, so that trials compare; what is left over stays idle. Raises ``UserError`` for too many."""
    if parallel == 1:
        return [Share()]
    for name, things in (("GPU(s)", gpus), ("core(s)", cores)):
        if (things or name == "core(s)") and len(things) < parallel:
            raise UserError(f"sweep.parallel is {parallel}: there are {len(things)} {name} to share; give at most that")
    return [Share(_part(gpus, parallel, n), _part(cores, parallel, n)) for n in range(parallel)]


def visible_gpus(count: int, environment: Mapping[str, str]) -> list[str]:
    """Their names, which may be UUIDs."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def usable_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _part(things: Sequence, parallel: int, number: int) -> tuple:
    size = len(things) // parallel
    return tuple(things[number * size : (number + 1) * size])
