"""Ranks: the process group, the device, and the few collectives the program uses by name."""

import contextlib
import datetime
import hashlib
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

T = TypeVar("T")
RENDEZVOUS_SECONDS = 60.0
SECONDS_BETWEEN_CALLS = 0.2
GRACE = "TRAINER_GRACE_SECONDS"  # set by launch.run


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the others, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def identity() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) as torchrun set them; one process without torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return tuple(int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0, 1)))  # type: ignore[return-value]


def launch_id() -> tuple[str, int]:
    """torchrun's run id (empty without torchrun) and how often it has restarted the workers."""
    return os.environ.get("TORCHELASTIC_RUN_ID", ""), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def planned_faults() -> str:
    """What ``trainer.faults`` is to break in this process; empty outside of tests."""
    return os.environ.get("TRAINER_FAULTS", "")


def choose_device(wanted: str) -> torch.device:
    """``auto``: this rank's GPU where there is one, else the CPU. Raises ``ValueError`` when GPUs are missing."""
    _, _, local_rank, local_world_size = identity()
    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and not count:
        raise ValueError(
            "device=cuda, but PyTorch sees no GPU here: use device=auto or device=cpu, or install with DEVICE=cuda"
        )
    if not count:
        return torch.device("cpu")
    if local_world_size > count:
        raise ValueError(
            f"{local_world_size} ranks were started on a machine with {count} GPU(s): one rank a GPU, so start with "
            f"--nproc_per_node={count}, or use device=cpu"
        )
    return torch.device("cuda", local_rank)


def grace_seconds() -> float | None:
    """What the launcher grants from a signal to the end; None where it does not say."""
    return float(os.environ[GRACE]) if GRACE in os.environ else None


class RendezvousError(OSError):
    """The ranks did not find each other. Another start may help."""


@dataclass
class _Meeting:
    """Of this process, before there is a process group: whether it looks for the others, and through which store."""

    begun: bool = False
    store: dist.Store | None = None


_meeting = _Meeting()


@contextlib.contextmanager
def process_group(
    device: torch.device, timeout_seconds: float, rendezvous_seconds: float = RENDEZVOUS_SECONDS
) -> Iterator[Ranks]:
    """NCCL for GPU tensors, gloo for the rest. Left by an error, it does not wait for the other ranks. Raises
    ``RendezvousError`` where not all ranks are there, and connected, in time."""
    rank, world_size, local_rank, local_world_size = identity()
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ:
        patience = datetime.timedelta(seconds=rendezvous_seconds)
        store = _meet(rank, world_size, patience)
        _connect(backend, store, rank, world_size, patience)
        store.set_timeout(timeout)
        dist.distributed_c10d._set_pg_timeout(timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    yield Ranks(rank, world_size, local_rank, local_world_size, device)
    # Not in a `finally`: after an error an orderly shutdown could wait for ranks that wait for us.
    dist.destroy_process_group()


def _meet(rank: int, world_size: int, patience: datetime.timedelta) -> dist.Store:
    """The store of all ranks, once all of them are there."""
    where = f"MASTER_ADDR:MASTER_PORT={os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    _meeting.begun = True
    try:
        _await_listener(rank, patience.total_seconds())
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    except (dist.DistError, TimeoutError) as error:
        raise RendezvousError(_why_not_met(rank, world_size, where, patience, str(error))) from None
    # torchrun keeps one store over all its restarts: without a prefix a rank may find where another one listened the last
    # time, and wait there.
    store = _meeting.store = dist.PrefixStore(f"attempt-{launch_id()[1]}", store)
    arrived = [f"arrived/{other}" for other in range(world_size)]
    store.set(arrived[rank], "")
    try:
        store.wait(arrived, patience)
    except dist.DistError:
        missing = [str(other) for other, name in enumerate(arrived) if not _is_there(store, name)]
        raise RendezvousError(
            f"rank {', '.join(missing)} of {world_size} did not come to {where} within {patience.total_seconds():g} s: "
            "start all ranks at about the same time (an error of theirs is on their own machines), or raise "
            "rendezvous_timeout_seconds"
        ) from None
    return store


def _await_listener(rank: int, seconds: float) -> None:
    """Until the store's port is open: its own client says on many lines that it is not, and takes twice its time. Raises
    ``TimeoutError``. Where the rank itself opens the port there is nothing to await."""
    address, deadline = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), time.monotonic() + seconds
    while rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            return socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.1)).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(str(error)) from None
        time.sleep(SECONDS_BETWEEN_CALLS)


def _is_there(store: dist.Store, name: str) -> bool:
    try:
        return store.check([name])
    except dist.DistError:  # who held the store has ended
        return False


def _why_not_met(rank: int, world_size: int, where: str, patience: datetime.timedelta, message: str) -> str:
    """``message`` is the store's own."""
    if "EADDRINUSE" in message:
        return (
            f"rank {rank}: {where} is in use by another program: set MASTER_PORT to a free port, the same on all ranks"
        )
    return (
        f"rank {rank} did not meet all {world_size} ranks at {where} within {patience.total_seconds():g} s: start all of "
        "them at about the same time, with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, on machines that can reach "
        "each other, or raise rendezvous_timeout_seconds"
    )


def _connect(backend: str, store: dist.Store, rank: int, world_size: int, patience: datetime.timedelta) -> None:
    """Every rank to every other one; this is where a firewall between machines shows."""
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RendezvousError(
            f"rank {rank} of {world_size} could not connect to the others within {patience.total_seconds():g} s ({reason}): "
            "see that the machines reach each other (GLOO_SOCKET_IFNAME names the network interface), or raise "
            "rendezvous_timeout_seconds"
        ) from None


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over ranks; the tensor stays as it is."""
    return all_reduce_sum(tensor.clone()) / dist.get_world_size()


def sum_with_gradient(tensor: Tensor) -> Tensor:
    """The sum over ranks, differentiable: what Dice's statistics go through."""
    return _Sum.apply(tensor)


class _Sum(torch.autograd.Function):
    """Every rank's input adds to every rank's output, so a gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.clone(memory_format=torch.contiguous_format))


def from_first(make: Callable[[], T]) -> T:
    """``make()`` on rank 0 only; its value on every rank. An error of rank 0 is raised on all of them."""
    payload: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            payload = [make(), None]
        except Exception as error:  # noqa: BLE001 - handed on to every rank, so that none waits for rank 0
            payload = [None, error]
    dist.broadcast_object_list(payload, src=0)
    if payload[1] is not None:
        raise payload[1]
    return payload[0]


def sum_counters(counters: dict[str, int]) -> dict[str, int]:
    """Named counts, summed over ranks."""
    gathered: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, counters)
    totals: dict[str, int] = {}
    for part in gathered:
        for name, count in part.items():
            totals[name] = totals.get(name, 0) + count
    return dict(sorted(totals.items()))


def peak_memory_mb(device: torch.device) -> dict[str, int]:
    """The most memory that any rank has held so far, in MB: of the host, and of the GPU where there is one."""
    mine = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    if device.type == "cuda":
        mine["gpu"] = torch.cuda.max_memory_allocated(device) // 2**20
    gathered: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    return {kind: max(part[kind] for part in gathered) for kind in mine}


def on_all_ranks(error: str | None) -> str | None:
    """The first error of any rank (None where all are well): the verdict every rank acts on together."""
    gathered: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, error)
    return next((f"rank {rank}: {message}" for rank, message in enumerate(gathered) if message), None)


def first_to_say(message: str) -> bool:
    """Whether no other rank has said this yet: an error that all ranks meet is then printed once."""
    if not dist.is_initialized() and _meeting.store is None:
        # All ranks read the same configuration; but on a way that ends here each has met its own obstacle.
        return _meeting.begun or identity()[0] == 0
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else _meeting.store
    digest = hashlib.sha256(message.encode()).hexdigest()
    return store.add(f"said/{digest}", 1) == 1
