"""Reading numbers back from a GPU: at once, by a function whose name a stack shows, or later, without waiting."""

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU. On a GPU this waits for all that the device was given, and so for the ranks that its collectives
    wait for: the watchdog and the straggler measure take a rank in here for a waiting one. Not for every step: see
    ``LateNumber``."""
    return tensor.cpu()


class LateNumber:
    """A number that is sent from the device at one time and read at a later one, when it will have come: the device goes on
    with what it was given in between."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._host = torch.zeros((), pin_memory=on_gpu)
        self._sent = torch.cuda.Event() if on_gpu else None

    def send(self, number: Tensor) -> None:
        """``number`` float32 []. What was sent before is read before."""
        self._host.copy_(number, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def read(self) -> float:
        if self._sent is not None:
            self._sent.synchronize()
        return self._host.item()
