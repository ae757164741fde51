"""Reading a number back from a GPU, by a function whose name a stack shows."""

from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU. On a GPU this waits for all that the device was given, and so for the ranks that its collectives
    wait for: the watchdog and the straggler measure take a rank in here for a waiting one. Not for every step: see
    ``tests/gpu/allowed_syncs.txt``."""
    return tensor.cpu()
