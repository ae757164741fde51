"""What `clicktrainer doctor --gpu` has done in processes of its own: `python -m trainer.doctor.card pinned FOLDER`,
`… nccl RANK WORLD_SIZE STORE`, `… difference RUN RUN`. Each prints one line of JSON."""

import datetime
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.checkpoint import Reader, newest
from trainer.checkpoint.direct_file import DirectFile

PINNED_BYTES = 512 << 20
NCCL_BYTES = 128 << 20
ROUNDS = 5
LIMIT = datetime.timedelta(seconds=240)


def main() -> None:
    what, *arguments = sys.argv[1:]
    probes: dict[str, Callable[..., Any]] = {"pinned": pinned, "nccl": nccl, "difference": difference}
    print(json.dumps(probes[what](*arguments)), flush=True)
    os._exit(0)  # without the interpreter's teardown, as trainer.doctor.probe


def pinned(folder: str) -> dict[str, Any]:
    """Random bytes of the GPU, copied into pinned memory and written from there past the page cache, as a checkpoint is:
    whether the file holds them, and GB/s of both ways."""
    path = Path(folder) / "pinned"
    generator = torch.Generator(device="cuda").manual_seed(0)
    made = torch.randint(0, 256, (PINNED_BYTES,), dtype=torch.uint8, device="cuda", generator=generator)
    held = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    held.copy_(made, non_blocking=True)
    torch.cuda.synchronize()
    copied = time.perf_counter()
    with DirectFile(path) as file:
        file.write(held.numpy().data)
    written = time.perf_counter()
    with path.open("rb") as file:
        read = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    path.unlink()
    expected = hashlib.sha256(made.cpu().numpy().data)
    return {
        "right": read.digest() == expected.digest(),
        "copy_gb_per_s": PINNED_BYTES / 1e9 / (copied - began),
        "write_gb_per_s": PINNED_BYTES / 1e9 / (written - copied),
    }


def nccl(rank: str, world_size: str, store: str) -> dict[str, Any]:
    """Sum and exchange over the GPUs, right, and GB/s that each GPU's links carry ("bus bandwidth" of NVIDIA's nccl-tests)."""
    index, ranks = int(rank), int(world_size)
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=index, world_size=ranks, timeout=LIMIT)
    values = torch.full((NCCL_BYTES // 4,), float(index + 1), device=device)
    dist.all_reduce(values)
    summed = bool((values == ranks * (ranks + 1) / 2).all())
    sent = torch.arange(ranks, device=device, dtype=torch.float32).add_(100.0 * index)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    exchanged = received.tolist() == [100.0 * other + index for other in range(ranks)]
    parts = values[: len(values) // ranks * ranks]
    moved = torch.empty_like(parts)
    rates = {
        "all_reduce": 2 * _rate(lambda: dist.all_reduce(values.fill_(1.0)), values),
        "all_to_all": _rate(lambda: dist.all_to_all_single(moved, parts), parts),
    }
    others = (ranks - 1) / ranks  # the share of the bytes that leaves a GPU
    dist.destroy_process_group()
    return {"right": summed and exchanged, "gb_per_s": {name: rate * others for name, rate in rates.items()}}


def difference(run: str, other: str) -> float:
    """The largest of all that the last checkpoints of two runs hold; 0: bit for bit the same."""
    first, second = (Reader(newest(Path(folder, "checkpoints"))) for folder in (run, other))
    assert set(first.names) == set(second.names)
    pairs = ((first.read(name), second.read(name)) for name in first.names)
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs if not torch.equal(a, b)), default=0.0)


def _rate(act: Any, values: torch.Tensor) -> float:
    """GB/s of ``values`` through ``act``, once warm."""
    act()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        act()
    torch.cuda.synchronize()
    return ROUNDS * values.numel() * values.element_size() / 1e9 / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
