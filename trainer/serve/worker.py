"""``python -m trainer.serve.worker``: one process that scores, started by ``launch.serve``."""

import argparse
import json
import os
import socket
import threading
from pathlib import Path

import torch
import uvicorn

from data_loaders.messages import note
from trainer.config.serve import ServeConfig
from trainer.runtime.process import quiet_libraries
from trainer.serve import metrics, state
from trainer.serve.app import Server, size_of
from trainer.serve.batcher import Batcher
from trainer.serve.opened import open_checked

SECONDS_BETWEEN_LOOKS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--number", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("--config", type=json.loads)
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)  # more threads than one a worker take its cores from the others
    run(options.folder, options.number, options.port, ServeConfig(**options.config))


def run(folder: Path, number: int, port: int, config: ServeConfig) -> None:
    accepted = state.accepted(folder)
    opened = open_checked(Path(accepted.version), hashes=False)  # the loader has hashed it
    batcher = Batcher(opened.scorer, max_rows=config.max_rows, max_waiting=config.max_waiting)
    server = Server(opened.artifact, batcher, config, folder / state.METRICS)
    metrics.serves(opened.artifact.version, None, size_of(opened.artifact))
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(folder, number, accepted, server, stop), daemon=True)
    watcher.start()
    with shared_socket(config.host, port) as listening:
        listening.listen(1024)
        state.ready(folder, number).touch()
        settings = uvicorn.Config(
            server.app,
            log_level="error",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=int(config.grace_seconds),
            timeout_keep_alive=75,
        )
        uvicorn.Server(settings).run(sockets=[listening])
    stop.set()
    batcher.close()


def watch(folder: Path, number: int, served: state.Accepted, server: Server, stop: threading.Event) -> None:
    """Takes over the version that the supervisor has accepted; ends with the supervisor."""
    supervisor = os.getppid()
    while not stop.wait(SECONDS_BETWEEN_LOOKS):
        if os.getppid() != supervisor:
            os._exit(1)
        now = state.accepted(folder)
        if now.refused > served.refused and number == 0:
            metrics.reloads.labels("refused").inc(now.refused - served.refused)
        if now.version != served.version:
            try:
                opened = open_checked(Path(now.version), hashes=False)
                server.swap(opened.artifact, opened.scorer)
            except Exception as error:  # noqa: BLE001 - the model that is served stays
                note(f"worker {number}: {error}")
        served = now


def shared_socket(host: str, port: int) -> socket.socket:
    """All workers listen on one address; the kernel deals out connections."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind((host, port))
    return made


if __name__ == "__main__":
    main()
