"""Exports of small trained runs, and a server over one in this process."""

import contextlib
import http.client
import json
import threading
import time
from pathlib import Path

import uvicorn

from tests.helpers import tiny
from trainer.config import arguments
from trainer.config.serve import ServeConfig
from trainer.export import __main__ as command
from trainer.serve.app import Server
from trainer.serve.batcher import Batcher
from trainer.serve.opened import open_checked


def train(log: Path, run: Path, *overrides: str) -> Path:
    done = tiny.train(1, log, run, "data.test=[]", *overrides)
    assert done.returncode == 0, done.stderr
    return run


def export(run: Path, output: Path, *given: str) -> Path:
    command.run(arguments.export().parse_intermixed_args([str(run), "--output", str(output), *given]))
    return output


@contextlib.contextmanager
def serving(version: Path, **settings):
    """A ``Server`` over ``version``, answering on ``port``."""
    config = ServeConfig(**settings)
    opened = open_checked(version, hashes=True)
    batcher = Batcher(opened.scorer, max_rows=config.max_rows, max_waiting=config.max_waiting)
    server = Server(opened.artifact, batcher, config)
    running = uvicorn.Server(uvicorn.Config(server.app, port=0, log_level="error", lifespan="off"))
    running.install_signal_handlers = lambda: None
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    server.port = running.servers[0].sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        running.should_exit = True
        thread.join()
        batcher.close()


class Client:
    """One connection, kept alive."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def get(self, path: str):
        return self.ask("GET", path)

    def post(self, path: str, body, **headers: str):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, content, {"content-type": "application/json", **headers})

    def ask(self, method, path, body=None, headers=()):
        """Status and content."""
        self.connection.request(method, path, body, dict(headers))
        answer = self.connection.getresponse()
        content = answer.read()
        found = json.loads(content) if answer.headers.get_content_type() == "application/json" else content
        return answer.status, found
