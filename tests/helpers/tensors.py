"""Tensors of every type, and their bits."""

import torch

from trainer.checkpoint.tensor_file import DTYPES


def of_every_dtype():
    """A tensor of each dtype [3, 5], and a single value."""
    generator = torch.Generator().manual_seed(3)
    found = {"dense/one": torch.tensor(-2.5), "dense/none": torch.empty(0, 3)}
    for code, dtype in DTYPES.items():
        found[f"dense/{code}"] = (torch.randn(3, 5, generator=generator) * 100).to(dtype)
    return found


def bits(tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
