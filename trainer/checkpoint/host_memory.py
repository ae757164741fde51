"""Memory of the host for a snapshot, pinned where a GPU copies into it.

PyTorch hands out its own pinned memory in powers of two (1,100 MiB asked, 2,048 taken) and keeps it. Here ordinary memory is
registered with CUDA, which takes what was asked for.
"""

import contextlib
import weakref

import numpy as np
import torch
from torch import Tensor

from data_loaders.messages import warn
from trainer.checkpoint.direct_file import BLOCK


def host_memory(size: int, *, pinned: bool) -> Tensor:
    """uint8 [size] that begins with a disk's block. Where CUDA does not pin it, a warning says what that costs."""
    memory = np.empty(size + BLOCK, np.uint8)
    begin = -memory.ctypes.data % BLOCK
    if pinned and size:
        _pin(memory, memory.ctypes.data + begin, size)
    return torch.from_numpy(memory)[begin : begin + size]


def _pin(memory: np.ndarray, address: int, size: int) -> None:
    """Until ``memory`` is freed."""
    code = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
    if code == 0:
        weakref.finalize(memory, torch.cuda.cudart().cudaHostUnregister, address).atexit = False
        return
    # CUDA keeps the error for whoever launches a kernel next: let that be nobody who minds.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    warn(
        f"CUDA cannot pin the {size / 1e6:,.0f} MB of a checkpoint's snapshot (its error {code}): training waits "
        "while each snapshot is copied"
    )
