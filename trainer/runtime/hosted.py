"""A rank within a program that is not ours and goes on afterwards, such as a notebook: that is found again as it was."""

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

from data_loaders.errors import UserError
from trainer.runtime.cpu import computing_as_a_rank
from trainer.runtime.distributed import settings_kept
from trainer.runtime.process import QUIET, explanation, quiet_libraries


@contextlib.contextmanager
def hosted(device: str = "auto") -> Iterator[None]:
    """What a rank sets of its process is set within: environment, threads, arithmetic, random numbers, libraries' warnings.
    Raises ``UserError`` also for the system's errors, with the line that the command line would print."""
    if dist.is_initialized():
        raise UserError(
            "this process is in a process group of torch.distributed already: end it "
            "(torch.distributed.destroy_process_group()), or work in another process"
        )
    try:
        with settings_kept(), computing_as_a_rank(device), torch.random.fork_rng(devices=[]), _quiet():
            yield
    except OSError as error:
        raise UserError(explanation(error)) from error
    finally:
        gc.collect()  # a sharded model is in circles with its pipeline, and its tables are large


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in QUIET}
    with warnings.catch_warnings():
        quiet_libraries()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
