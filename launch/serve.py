"""`clicktrainer serve EXPORT`: worker processes over one address, and the reload of new versions.

The supervisor scores nothing and imports no PyTorch. A new version is read by a process of its own first: only one that is whole,
and scores as it did at export, is handed to the workers, which swap it in between two batches."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from data_loaders.errors import UserError
from data_loaders.messages import fail, note
from launch import rank
from launch.options import merge, split
from trainer.config import arguments
from trainer.config.serve import ServeConfig
from trainer.serve import state
from trainer.serve.versions import current

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_BEFORE_A_RESTART = 1.0
MOST_EARLY_ENDS = 3  # of workers that never were ready


def main(argv: Sequence[str]) -> int:
    options = arguments.serve().parse_intermixed_args(argv)
    try:
        own, others = split(options.overrides, "serve")
        if others:
            raise UserError(f"{others[0]!r} is no setting of a server: write serve.KEY=VALUE (docs/serving.md)")
        config = merge("serve", {}, own, ServeConfig)
        with tempfile.TemporaryDirectory(prefix="clicktrainer-serve-") as folder:
            return Supervisor(options.export.absolute(), config, Path(folder)).run()
    except (UserError, OSError) as error:
        return fail(error)


class Supervisor:
    """Starts workers, restarts those that die, and ends them all when it is asked to stop."""

    def __init__(self, export: Path, config: ServeConfig, folder: Path) -> None:
        self.export, self.config, self.folder = export, config, folder
        self.workers: list[subprocess.Popen[bytes]] = []
        self.refused: set[tuple[str, float]] = set()
        self.loading: tuple[Path, subprocess.Popen[bytes]] | None = None
        self.stopping = False
        (folder / state.METRICS).mkdir()

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        version = current(self.export)
        if self._load(version).wait() != 0:
            return 2  # which it has said why
        state.accept(self.folder, state.Accepted(str(version)))
        with reserved(self.config.host, self.config.port) as held:
            self.port = held.getsockname()[1]
            self.workers = [
                self._start(number) for number in range(self.config.workers or len(os.sched_getaffinity(0)))
            ]
            try:
                return self._watch()
            finally:
                self._end()

    def _watch(self) -> int:
        announced, early, looked = False, 0, time.monotonic()
        while not self.stopping:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            ready = [state.ready(self.folder, number).exists() for number in range(len(self.workers))]
            if not announced and all(ready):
                announced = True
                version = Path(state.accepted(self.folder).version).name
                note(f"Serving {version} on http://{self.config.host}:{self.port} ({len(self.workers)} workers)")
            for number, worker in enumerate(self.workers):
                if worker.poll() is not None and not self.stopping:
                    early += not ready[number]
                    if early >= MOST_EARLY_ENDS:
                        return 1
                    self._restart(number)
            if time.monotonic() - looked >= self.config.reload_seconds or self.loading is not None:
                looked = time.monotonic()
                self._reload()
        return 0

    def _restart(self, number: int) -> None:
        note(f"worker {number} ended with exit code {self.workers[number].returncode}: it is started again")
        state.ready(self.folder, number).unlink(missing_ok=True)
        time.sleep(SECONDS_BEFORE_A_RESTART)
        self.workers[number] = self._start(number)

    def _reload(self) -> None:
        """Looks for a new version, or how the loading of one goes."""
        served = state.accepted(self.folder)
        if self.loading is None:
            try:
                version = current(self.export)
                changed = os.stat(version).st_mtime
            except (UserError, OSError):
                return  # being written, or gone: the version that is served stays
            if str(version) != served.version and (str(version), changed) not in self.refused:
                self.loading = version, self._load(version, served.version)
            return
        version, process = self.loading
        code = process.poll()
        if code is None:
            return
        self.loading = None
        if code == 0:
            state.accept(self.folder, state.Accepted(str(version), served.refused))
            note(f"Serving {version.name}")
        else:
            self.refused.add((str(version), os.stat(version).st_mtime if version.exists() else 0.0))
            state.accept(self.folder, state.Accepted(served.version, served.refused + 1))
            note(f"{version.name} is not served: {Path(served.version).name} stays")

    def _load(self, version: Path, served: str = "") -> "subprocess.Popen[bytes]":
        words = [str(version), self.config.memory, *([served] if served else [])]
        return subprocess.Popen(rank.command("trainer.serve.loader", words), env=self._environment())

    def _start(self, number: int) -> "subprocess.Popen[bytes]":
        words = ["--folder", str(self.folder), "--number", str(number), "--port", str(self.port)]
        words += ["--config", json.dumps(dataclasses.asdict(self.config))]
        return subprocess.Popen(rank.command("trainer.serve.worker", words), env=self._environment())

    def _environment(self) -> dict[str, str]:
        shared = {"PROMETHEUS_MULTIPROC_DIR": str(self.folder / state.METRICS)}
        return {**os.environ, **shared}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _end(self) -> None:
        """Workers answer what has come, then end."""
        processes = [*self.workers, *([self.loading[1]] if self.loading else [])]
        for process in processes:
            process.terminate()
        until = time.monotonic() + self.config.grace_seconds + 1
        for process in processes:
            try:
                process.wait(max(until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder / state.METRICS, ignore_errors=True)


def reserved(host: str, port: int) -> socket.socket:
    """Holds the port for the workers, without listening. Raises ``UserError`` where another program has it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise UserError(f"serve.host={host} serve.port={port}: {error.strerror}: choose another port") from None
    return made
