"""How the ranks find each other, in a time that ends, and what is said where they do not; the process group they then form."""

import contextlib
import datetime
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data_loaders.errors import UserError
from data_loaders.messages import one_line
from trainer.runtime.distributed import (
    Ranks,
    identity,
    is_launched,
    launch_id,
    launcher_opens_port,
    meeting_point,
    stay_on_this_machine,
)

RENDEZVOUS_SECONDS = 60.0
SECONDS_BETWEEN_CALLS = 0.2


class RendezvousError(OSError):
    """The ranks did not find each other. Another start may help."""


@dataclass
class _Meeting:
    """Of this process, before there is a process group: whether it looks for the others, and through which store."""

    begun: bool = False
    store: dist.Store | None = None

    def begin(self) -> None:
        self.begun = True

    def through(self, store: dist.Store) -> dist.Store:
        self.store = store
        return store


_meeting = _Meeting()


@contextlib.contextmanager
def process_group(
    device: torch.device, timeout_seconds: float, rendezvous_seconds: float = RENDEZVOUS_SECONDS
) -> Iterator[Ranks]:
    """NCCL for GPU tensors, gloo for the rest. Left by an error, it does not wait for the other ranks, if there are any. Raises
    ``RendezvousError`` where not all ranks are there, and connected, in time."""
    rank, world_size, local_rank, local_world_size = identity()
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if is_launched():
        patience = datetime.timedelta(seconds=rendezvous_seconds)
        store = _meet(rank, world_size, patience)
        _connect(backend, store, rank, world_size, patience)
        store.set_timeout(timeout)
        dist.distributed_c10d._set_pg_timeout(timeout)
        if device.type == "cuda":
            _connect_gpus(store, rank, world_size, rendezvous_seconds, lambda: _first_collective(device))
    else:
        stay_on_this_machine()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield Ranks(rank, world_size, local_rank, local_world_size, device)
    except BaseException:
        # After an error an orderly shutdown could wait for ranks that wait for us.
        if not is_launched():
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _meet(rank: int, world_size: int, patience: datetime.timedelta) -> dist.Store:
    """The store of all ranks, once all of them are there."""
    check_meeting_point()
    where = f"MASTER_ADDR:MASTER_PORT={':'.join(meeting_point())}"
    _meeting.begin()
    try:
        _await_listener(rank, patience.total_seconds())
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    except (dist.DistError, TimeoutError) as error:
        raise RendezvousError(_why_not_met(rank, world_size, where, patience, str(error))) from None
    # torchrun keeps one store over all its restarts: without a prefix a rank may find where another one listened the last
    # time, and wait there.
    store = _meeting.through(dist.PrefixStore(f"attempt-{launch_id()[1]}", store))
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


def check_meeting_point() -> None:
    """Raises ``UserError`` where there is a rank, but no place to meet the others."""
    host, port = meeting_point()
    missing = [name for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)) if not value]
    if missing:
        raise UserError(
            f"RANK is set, but not {' and '.join(missing)}: start the ranks by clicktrainer train or torchrun, set it, the same "
            "on all ranks, or, for one process alone, unset RANK"
        )
    if not port.isdecimal():
        raise UserError(f"MASTER_PORT is {port!r}: give the number of a free port, the same on all ranks")


def _await_listener(rank: int, seconds: float) -> None:
    """Until the store's port is open: its own client says on many lines that it is not, and takes twice its time. Raises
    ``TimeoutError``. Where the rank itself opens the port there is nothing to await."""
    (host, port), deadline = meeting_point(), time.monotonic() + seconds
    while rank or launcher_opens_port():
        try:
            return socket.create_connection((host, int(port)), timeout=max(deadline - time.monotonic(), 0.1)).close()
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
        reason = one_line(error)
        raise RendezvousError(
            f"rank {rank} of {world_size} could not connect to the others within {patience.total_seconds():g} s ({reason}): "
            "see that the machines reach each other (GLOO_SOCKET_IFNAME names the network interface), or raise "
            "rendezvous_timeout_seconds"
        ) from None


def _first_collective(device: torch.device) -> None:
    torch.cuda.set_device(device)  # of this thread
    dist.all_reduce(torch.zeros(1, device=device))
    torch.cuda.synchronize(device)


def _connect_gpus(
    store: dist.Store, rank: int, world_size: int, seconds: float, first_collective: Callable[[], None]
) -> None:
    """NCCL connects the ranks at their first collective, and waits there for all of them without an end: so a thread calls
    one, and is left behind where that takes more than ``seconds`` (the process is about to end)."""
    failed: list[Exception] = []

    def connect() -> None:
        try:
            first_collective()
        except Exception as error:  # noqa: BLE001 - raised below, as this rank's
            failed.append(error)

    come = [f"on-gpu/{other}" for other in range(world_size)]
    store.set(come[rank], "")
    thread = threading.Thread(target=connect, name="first collective", daemon=True)
    thread.start()
    thread.join(seconds)
    missing = [str(other) for other, name in enumerate(come) if not _is_there(store, name)]
    if not (thread.is_alive() or failed):
        return
    if thread.is_alive() and missing:
        raise RendezvousError(
            f"rank {', '.join(missing)} of {world_size} did not come to the first exchange between GPUs within "
            f"{seconds:g} s: see what holds its machine up (nvidia-smi must answer there), or raise "
            "rendezvous_timeout_seconds"
        )
    reason = f" ({one_line(failed[0])})" if failed else ""
    raise RendezvousError(
        f"the GPU of rank {rank} of {world_size} could not connect to the others' within {seconds:g} s{reason}: see that the "
        "machines reach each other (NCCL_SOCKET_IFNAME names the network interface; NCCL_DEBUG=INFO shows what NCCL "
        "tries), or raise rendezvous_timeout_seconds"
    )


def first_to_say(message: str) -> bool:
    """Whether no other rank has said this yet: an error that all ranks meet is then printed once."""
    if not dist.is_initialized() and _meeting.store is None:
        # The ranks of a machine read the same configuration and see the same GPUs; another machine's need not. On a way that
        # ends here each has met its own obstacle.
        return _meeting.begun or identity()[2] == 0
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else _meeting.store
    digest = hashlib.sha256(message.encode()).hexdigest()
    return store.add(f"said/{digest}", 1) == 1
