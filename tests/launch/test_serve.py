"""The server as a process: it is ready when it says so, takes over a new version, refuses a damaged one, and drains."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import warm
from tests.helpers.exported import Client, export, train
from trainer.serve.versions import current, publish

pytestmark = pytest.mark.slow
BODY = {"candidates": {"item_id": [3, 4, 5], "age": [1.0, 2.0, 3.0]}}
REPOSITORY = Path(__file__).resolve().parents[2]


class Serving:
    """`clicktrainer serve`, and what it has printed so far."""

    def __init__(self, exports, log, *settings):
        words = [sys.executable, "-m", "trainer", "serve", str(exports), "serve.port=0", *settings]
        self.log = log
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        with open(log, "w") as file:
            self.process = subprocess.Popen(words, stderr=file, env=environment)

    def wait_for(self, pattern):
        until = time.monotonic() + warm.PATIENCE
        while not (found := re.search(pattern, self.log.read_text())):
            assert time.monotonic() < until and self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return found


@pytest.fixture(scope="module")
def exports(click_log, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    run = train(click_log, folder / "fm", "model=fm")
    export(run, folder / "exports")
    first = current(folder / "exports")
    export(run, folder / "exports", "export.tables=fp16", "export.max_auc_loss=1", "--no-publish")
    (second,) = [path for path in (folder / "exports").glob("step-*") if path != first]
    return folder / "exports", first, second


def test_a_day_of_a_server(exports, tmp_path):
    folder, first, second = exports
    serving = Serving(folder, tmp_path / "log", "serve.workers=2", "serve.reload_seconds=0.2")
    try:
        port = int(serving.wait_for(r"Serving step-\S+ on http://127.0.0.1:(\d+) \(2 workers\)").group(1))
        client = Client(port)
        assert client.post("/v1/score", BODY)[1]["model"] == f"fm/{first.name}"
        damaged = folder / "step-9-damaged"
        shutil.copytree(first, damaged)
        (damaged / "dense.safetensors").write_bytes(b"x")
        publish(folder, damaged.name)
        serving.wait_for("step-9-damaged is not served: step-")
        assert client.post("/v1/score", BODY)[1]["model"] == f"fm/{first.name}"
        publish(folder, second.name)
        serving.wait_for(f"Serving {second.name}")
        until = time.monotonic() + warm.PATIENCE
        while client.post("/v1/score", BODY)[1]["model"] != f"fm/{second.name}":
            assert time.monotonic() < until
        text = client.get("/metrics")[1].decode()
        assert re.search(r'clicktrainer_requests_total\{code="200"\} \d', text)
        serving.process.send_signal(signal.SIGTERM)
        assert serving.process.wait(warm.PATIENCE) == 0
        assert "Traceback" not in serving.log.read_text()
    finally:
        serving.process.kill()
        publish(folder, first.name)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["serve.prt=1"], "serve.prt"),
        (["model=din"], "'model=din' is no setting of a server"),
        (["serve.port=99999"], "serve.port is 99999"),
    ],
)
def test_a_mistake_ends_it_in_one_line(exports, tmp_path, settings, expected):
    serving = Serving(exports[0], tmp_path / "log", *settings)
    assert serving.process.wait(warm.PATIENCE) == 2
    (line,) = serving.log.read_text().splitlines()
    assert line.startswith("error: ") and expected in line
