"""Matrix products over tokens, whose number T is another in each batch."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class TokenLinear(nn.Linear):
    """``nn.Linear`` over tokens: see ``token_linear``."""

    def forward(self, inputs: Tensor) -> Tensor:
        return token_linear(inputs, self.weight, self.bias)


def token_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear`` of ``inputs`` [T, D] for a T that is another in each batch -> [T, C]."""
    if inputs.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return functional.linear(inputs, weight, bias)
    filled = fill(inputs.to(torch.get_autocast_dtype("cpu")))
    return functional.linear(filled, weight, bias)[: inputs.shape[0]]


def fill(rows: Tensor) -> Tensor:
    """``rows`` [T, D], with rows of zeros at the end where they are to be multiplied in bf16 on a CPU.

    There oneDNN compiles a kernel for each shape that it meets, and keeps the last 1024 of them. With T as it comes that was a
    third of DIN's time and gigabytes of memory, so T is filled up to one of few numbers."""
    if rows.device.type != "cpu" or rows.dtype == torch.float32:
        return rows
    return functional.pad(rows, (0, 0, 0, filled_up(rows.shape[0]) - rows.shape[0]))


def filled_up(num_tokens: int) -> int:
    """``num_tokens`` rounded up: one of 16 numbers from a power of two to the next, so at most a sixteenth more; and a
    multiple of 64."""
    step = max(64, 1 << max(num_tokens.bit_length() - 5, 0))
    return -(-num_tokens // step) * step
