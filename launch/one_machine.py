"""Where the ranks of one machine meet: a store that listens on 127.0.0.1, and nothing that listens elsewhere.

torchrun's own stores listen on every interface, and its agent unpickles what they hold: whoever reaches the port runs code as
the user. The store here is one for agent and ranks; gloo and NCCL are set to use the loopback interface.
"""

import socket
from datetime import timedelta

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from trainer.runtime.distributed import LOOPBACK

BACKEND = "one_machine"
STORE_SECONDS = 60.0  # as torchrun has it


class OneMachine(RendezvousHandler):
    """The rendezvous of an agent with itself."""

    def __init__(self, run_id: str) -> None:
        self._run_id, self._closed = run_id, False
        self._store = listen()

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._store.port))

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self._closed = True
        return True


def register() -> None:
    """Makes ``BACKEND`` known to torchrun's agent."""
    rendezvous_handler_registry.register(BACKEND, _make)


def listen() -> TCPStore:
    """A store that only this machine reaches. Raises ``OSError``."""
    listener = socket.socket()
    try:
        listener.bind((LOOPBACK, 0))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        raise OSError(
            f"no port can be opened on {LOOPBACK}, {error.strerror}: the loopback interface must be up"
        ) from None
    port = listener.getsockname()[1]
    return TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        timeout=timedelta(seconds=STORE_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _make(parameters: RendezvousParameters) -> RendezvousHandler:
    return OneMachine(parameters.run_id)
