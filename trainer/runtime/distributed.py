"""Ranks: who they are by what their launcher says, the device, and the few collectives the program uses by name."""

import contextlib
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from data_loaders.errors import UserError
from data_loaders.messages import one_line
from trainer.runtime import gpus

T = TypeVar("T")
LOOPBACK = "127.0.0.1"
SOCKET_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
GRACE = "TRAINER_GRACE_SECONDS"  # set by launch.ranks


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


def is_launched() -> bool:
    """Whether there is a launcher, such as torchrun, and so other ranks to meet."""
    return "RANK" in os.environ


def stay_on_this_machine() -> None:
    """Has gloo and NCCL listen on the loopback interface, in this process and those it starts, unless the user has named
    another one: what listens elsewhere is open to the network."""
    names = [name for name, found in psutil.net_if_addrs().items() if any(each.address == LOOPBACK for each in found)]
    for variable in SOCKET_INTERFACES:
        if names:
            os.environ.setdefault(variable, names[0])


def meeting_point() -> tuple[str, str]:
    """Address and port where the ranks meet; empty where they are not set."""
    return os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")


def launcher_opens_port() -> bool:
    """Whether torchrun itself listens at the meeting point, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def planned_faults() -> str:
    """What ``trainer.runtime.fault_injection`` is to break in this process; empty outside of tests."""
    return os.environ.get("TRAINER_FAULTS", "")


def choose_device(wanted: str) -> torch.device:
    """``auto``: this rank's GPU where there is one, else the CPU. Raises ``UserError`` when GPUs are missing, or there and
    of no use: for a driver that is too old, or without FBGEMM's code for them."""
    _, _, local_rank, local_world_size = identity()
    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and not count:
        raise UserError(
            "device=cuda, but PyTorch sees no GPU here: use device=auto or device=cpu, or install with DEVICE=cuda"
        )
    if not count:
        return torch.device("cpu")
    if local_world_size > count:
        raise UserError(
            f"{local_world_size} ranks were started on a machine with {count} GPU(s): one rank a GPU, so start with "
            f"--nproc_per_node={count}, or use device=cpu"
        )
    for index in range(local_world_size):  # all of them: each rank finds the same, and the first one says it
        check_gpu(index)
    return torch.device("cuda", local_rank)


def check_gpu(index: int) -> None:
    """Raises ``UserError`` for a GPU that cannot train. (PyTorch counts them without starting CUDA.)"""
    try:
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    except (RuntimeError, AssertionError) as error:
        reason = gpus.explain_start(str(error), torch.version.cuda)
        raise UserError(f"GPU {index} cannot be used: {reason}; or use device=cpu") from None
    problem = gpus.refusal(name, capability)
    if problem is not None:
        raise UserError(f"GPU {index} cannot be used: {problem}; CUDA_VISIBLE_DEVICES chooses others, device=cpu none")


def grace_seconds() -> float | None:
    """What the launcher grants from a signal to the end; None where it does not say."""
    return float(os.environ[GRACE]) if GRACE in os.environ else None


def make_deterministic() -> None:
    """Has this process, which has not used its GPU yet, add up in one order wherever PyTorch, FBGEMM, cuBLAS and NCCL know
    one; an operation that has none raises ``RuntimeError`` (``unordered_operation_named``)."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # else PyTorch refuses matrix products
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # NVLink's switches add up in the order in which values come
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # for programs that read what they have not written


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """Afterwards the environment, and what ``make_deterministic`` sets, are as they were."""
    environment, fill = dict(os.environ), torch.utils.deterministic.fill_uninitialized_memory
    deterministic, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def unordered_operation_named() -> Iterator[None]:
    """Raises ``UserError`` where, after ``make_deterministic``, something is computed that has no fixed order."""
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise UserError(
            f"deterministic=true, but {operation} adds up in no fixed order on this device: do without it in the model, or "
            "set deterministic=false"
        ) from None


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place. One rank asks nobody, here and below."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over ranks; the tensor stays as it is."""
    ranks = dist.get_world_size()
    return all_reduce_sum(tensor.clone()) / ranks if ranks > 1 else tensor


def from_first(make: Callable[[], T]) -> T:
    """``make()`` on rank 0 only; its value on every rank. An error of rank 0 is raised on all of them, of the same class, so
    that all ranks end alike."""
    payload: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            payload = [make(), None]
        except Exception as error:  # noqa: BLE001 - handed on to every rank, so that none waits for rank 0
            payload = [None, sendable(error)]
    dist.broadcast_object_list(payload, src=0)
    if payload[1] is not None:
        raise payload[1]
    return payload[0]


def sendable(error: Exception) -> Exception:
    """``error``, or where it cannot be pickled one that can, which ends a rank in the same way."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # noqa: BLE001 - whatever an exception's own constructor or contents object to
        kind = next((kind for kind in (UserError, OSError) if isinstance(error, kind)), RuntimeError)
        return kind(f"{type(error).__name__}: {one_line(error)}").with_traceback(error.__traceback__)


def sum_counters(counters: dict[str, int]) -> dict[str, int]:
    """Named counts, summed over ranks."""
    totals: dict[str, int] = {}
    for part in on_ranks(counters):
        for name, count in part.items():
            totals[name] = totals.get(name, 0) + count
    return dict(sorted(totals.items()))


def peak_memory_mb(device: torch.device) -> dict[str, int]:
    """The most memory that any rank has held so far, in MB: of the host, and of the GPU where there is one."""
    mine = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    if device.type == "cuda":
        mine["gpu"] = torch.cuda.max_memory_allocated(device) // 2**20
    gathered = on_ranks(mine)
    return {kind: max(part[kind] for part in gathered) for kind in mine}


def on_all_ranks(error: str | None) -> str | None:
    """The first error of any rank, on all of them; None where there is none."""
    return next((f"rank {rank}: {message}" for rank, message in enumerate(on_ranks(error)) if message), None)


def on_all(mine: bool) -> bool:
    """Whether it is so on every rank: the cheapest question there is."""
    answer = torch.tensor([mine], dtype=torch.int32)
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer)


def on_ranks(mine: Any) -> list[Any]:
    """What every rank says, in order of ranks."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered
