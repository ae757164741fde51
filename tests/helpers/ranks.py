"""A test on several gloo ranks in one line: ``run_distributed(function, world_size, *arguments)``.

``function(rank, world_size, *arguments)`` must be importable (top level of a module). Its return values, one a rank,
come back as a list; an assertion or error on any rank fails the caller with that rank's traceback.
"""

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.helpers import warm

TIMEOUT = datetime.timedelta(seconds=300)


def run_distributed(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        warm.start_server()
        own = (world_size, folder, dict(os.environ), warm.Streams(), function, arguments)
        context = mp.start_processes(_rank_main, own, nprocs=world_size, join=False, start_method=warm.METHOD)
        try:
            while not context.join(timeout=240):
                pass
        except Exception as failure:  # noqa: BLE001 - told with the ranks' own tracebacks
            reports = [p.read_text() for p in sorted(Path(folder).glob("error-*"))]
            raise AssertionError("\n".join(reports) or str(failure)) from None
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    environment: dict[str, str],
    streams: warm.Streams,
    function: Callable[..., Any],
    arguments: tuple,
) -> None:
    warm.become(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    try:
        result = function(rank, world_size, *arguments)
        torch.save(result, Path(folder) / f"result-{rank}")
        dist.barrier()
    except BaseException:  # noqa: BLE001 - told to the caller, whatever it is
        (Path(folder) / f"error-{rank}").write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # as trainer.runtime.process does: tearing the interpreter down under gloo's threads can abort it
