"""The load of the serving benchmark leaves when it is due, answered or not, and latencies are of the answers with 200."""

import asyncio

import pytest

from bench.serving import load, summary


async def answered(statuses):
    """What ``load`` finds at a server that answers nobody before as many requests have come as there are ``statuses``."""
    came, everyone = [], asyncio.Event()

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
        came.append(body)
        status = statuses[len(came) - 1]
        if len(came) == len(statuses):
            everyone.set()
        await everyone.wait()
        writer.write(f"HTTP/1.1 {status} -\r\nContent-Length: 2\r\n\r\nok".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return await load(port, [b"one", b"three"], rate=1000, seconds=len(statuses) / 1000), came


def test_no_request_waits_for_the_answer_of_another():
    found, came = asyncio.run(asyncio.wait_for(answered([200, 503, 200, 504]), 60))
    assert sorted(status for status, _ in found) == [200, 200, 503, 504]
    assert sorted(came) == [b"one", b"one", b"three", b"three"]
    assert all(seconds > 0 for _, seconds in found)


def test_a_refusal_is_no_latency():
    result = summary([(200, 0.001), (200, 0.003), (503, 9.0)], 10, 100)
    assert result["statuses"] == {"200": 2, "503": 1} and result["requests"] == 3
    assert result["p50_ms"] == pytest.approx(2) and result["p99_ms"] == pytest.approx(1 + 0.99 * 2)
