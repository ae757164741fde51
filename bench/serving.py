"""Latency of ``clicktrainer serve`` under an open-loop load: requests leave when they are due, whether or not others were
answered, and latency counts from then, so that a server that stalls is not spared.

    python -m bench.serving EXPORT --name din --candidates 100 --rate 100 --seconds 20      # bench/results/serving.json

Requests are made from the export's golden rows: histories of one row as the context, other columns of random rows as candidates.
"""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from trainer.runtime.process import guarded
from trainer.serve.artifact import LOGIT, Artifact
from trainer.serve.versions import current

BODIES = 64  # different requests, in turn
WARM_SECONDS = 3.0
PATIENCE = 60.0  # seconds until the server is ready
READY = re.compile(r"Serving \S+ on http://127\.0\.0\.1:(\d+)")


def main() -> None:
    parser = harness.parser(__doc__, "serving.json")
    parser.add_argument("export", type=Path)
    parser.add_argument("--name", required=True, help="of the result in the file")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()

    def run() -> None:
        bodies = requests(Artifact(current(options.export)), options.candidates)
        with server(options.export) as (port, ready_seconds, process):
            asyncio.run(load(port, bodies, options.rate, WARM_SECONDS))
            before = cpu_seconds(process)
            measured = asyncio.run(load(port, bodies, options.rate, options.seconds))
            spent = cpu_seconds(process) - before
        result = summary(measured, options.rate, options.candidates)
        result |= {"server_cpu_ms": 1e3 * spent / len(measured), "ready_seconds": ready_seconds}
        print(json.dumps(result, indent=1))
        harness.record(options.output, result, options.name)

    guarded(run)


def requests(artifact: Artifact, candidates: int) -> list[bytes]:
    """Bodies of ``/v1/score``, the same ones each time."""
    rows = artifact.golden().drop_columns([LOGIT]).to_pylist()
    histories = {
        artifact.config.data.schema.features[key].column or key for key in artifact.config.data.schema.sequences
    }
    draw = random.Random(0)
    return [_body(draw.choices(rows, k=candidates), histories) for _ in range(BODIES)]


def _body(rows: Sequence[dict[str, Any]], shared: set[str]) -> bytes:
    context = {key: value for key, value in rows[0].items() if key in shared}
    offered = {key: [row[key] for row in rows] for key in rows[0] if key not in shared}
    return json.dumps({"context": context, "candidates": offered}, default=lambda value: value.isoformat()).encode()


@contextmanager
def server(export: Path) -> Iterator[tuple[int, float, int]]:
    """A server of one worker: its port, the seconds until it was ready, its process."""
    words = [sys.executable, "-m", "trainer", "serve", str(export), "serve.port=0", "serve.workers=1"]
    with tempfile.NamedTemporaryFile("r") as log, open(log.name, "w") as file:
        start = time.monotonic()
        process = subprocess.Popen(words, stderr=file)
        try:
            while not (found := READY.search(log.read())):
                log.seek(0)
                if process.poll() is not None or time.monotonic() - start > PATIENCE:
                    raise RuntimeError(f"the server is not ready: {log.read()}")
                time.sleep(0.01)
            yield int(found.group(1)), time.monotonic() - start, process.pid
        finally:
            process.terminate()
            process.wait()


def cpu_seconds(process: int) -> float:
    """Of its children, the workers, until now."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    fields = [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split() for child in children]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")  # utime, stime


async def load(port: int, bodies: Sequence[bytes], rate: float, seconds: float) -> list[tuple[int, float]]:
    """Status and seconds of each request; they are due at equal distances."""
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    start = time.monotonic() + 0.1

    async def one(number: int) -> tuple[int, float]:
        due = start + number / rate
        await asyncio.sleep(due - time.monotonic())
        connection = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        status = await ask(*connection, bodies[number % len(bodies)])
        idle.append(connection)
        return status, time.monotonic() - due

    found = await asyncio.gather(*(one(number) for number in range(int(rate * seconds))))
    for _, writer in idle:
        writer.close()
    return found


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> int:
    """The status of the answer, which is read to its end."""
    head = f"POST /v1/score HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = re.search(r"content-length: (\d+)", answer)
    assert length is not None, answer
    await reader.readexactly(int(length.group(1)))
    return int(answer.split()[1])


def summary(measured: Sequence[tuple[int, float]], rate: float, candidates: int) -> dict[str, Any]:
    """Latencies of the answers with 200, in milliseconds; how many answers had each status."""
    answered = [1e3 * seconds for status, seconds in measured if status == 200]
    percentiles = (
        {f"p{share}_ms": float(np.percentile(answered, share)) for share in (10, 50, 90, 99)} if answered else {}
    )
    statuses = Counter(str(status) for status, _ in measured)
    return {
        "rate": rate,
        "candidates": candidates,
        "requests": len(measured),
        "statuses": dict(statuses),
        **percentiles,
    }


if __name__ == "__main__":
    main()
