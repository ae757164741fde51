"""What the doctor has done in processes of its own: `python -m trainer.doctor.probe gpus`, or
`… collectives BACKEND RANK WORLD_SIZE STORE`. Each prints one line of JSON."""

import datetime
import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from trainer.runtime.gpus import explain_start, refusal

ROUNDS = 20
FLOATS = 1 << 18  # 1 MiB


def main() -> None:
    what, *arguments = sys.argv[1:]
    print(json.dumps(gpus() if what == "gpus" else collectives(*arguments)), flush=True)
    os._exit(0)  # a communication thread in the interpreter's teardown aborts it now and then (trainer.runtime.process)


def gpus() -> dict[str, Any]:
    """What PyTorch sees: its CUDA build, the devices, and pairs that cannot reach each other's memory; ``unusable``: why a
    device cannot train."""
    try:
        return _gpus()
    except RuntimeError as error:  # a driver that is too old, or does not start
        why = explain_start(str(error), torch.version.cuda)
        return {"build": torch.version.cuda, "devices": [], "apart": [], "unusable": [why]}


def _gpus() -> dict[str, Any]:
    count = torch.cuda.device_count()
    devices, unusable = [], []
    for index in range(count):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        problem = refusal(f"GPU {index}, {facts.name},", (facts.major, facts.minor))
        if problem:
            unusable.append(problem)
        else:
            torch.ones(8, device=f"cuda:{index}").sum().item()  # it computes
        devices.append({"name": facts.name, "capability": [facts.major, facts.minor], "free": free, "total": total})
    pairs = [(a, b) for a in range(count) for b in range(count) if a < b]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    return {"build": torch.version.cuda, "devices": devices, "apart": apart, "unusable": unusable}


def collectives(backend: str, rank: str, world_size: str, store: str) -> dict[str, Any]:
    """The sum of all ranks, right, and how long it takes: of one number, and of 1 MiB."""
    device = torch.device("cuda", int(rank)) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=int(rank), world_size=int(world_size), timeout=limit
    )
    times = {name: _all_reduce(torch.ones(size, device=device)) for name, size in (("one", 1), ("mib", FLOATS))}
    return {"rank": int(rank), "seconds": times}


def _all_reduce(values: torch.Tensor) -> float:
    """Seconds an all-reduce; raises ``RuntimeError`` where the sum is wrong."""
    expected = sum(range(1, dist.get_world_size() + 1))
    values.mul_(dist.get_rank() + 1)
    dist.all_reduce(values)
    if not bool((values == expected).all()):
        raise RuntimeError(f"the sum over ranks is {values[0].item()}, and should be {expected}")
    began = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(values.fill_(1.0))
    values[0].item()  # waits for a GPU
    return (time.perf_counter() - began) / ROUNDS


if __name__ == "__main__":
    main()
