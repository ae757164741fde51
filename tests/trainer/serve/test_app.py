"""The server as a client sees it: scores, mistakes, limits, and a new model under load."""

import threading

import numpy as np
import pyarrow as pa
import pytest

from tests.helpers.exported import Client, export, serving, train
from trainer.serve.opened import open_checked
from trainer.serve.versions import current

CONTEXT = {"user_id": 7, "hour": 3, "age": 31.0, "clicked_items": [1, 5], "clicked_categories": [2, 3]}
CANDIDATES = {
    "item_id": [3, 4, 5],
    "category_id": [1, 2, 3],
    "tags": [[1], [], [2, 3]],
    "price": [None, 2.0, 3.5],
}
BODY = {"context": CONTEXT, "candidates": CANDIDATES}


@pytest.fixture(scope="module")
def versions(click_log, tmp_path_factory):
    """Two models of one export folder."""
    folder = tmp_path_factory.mktemp("serve")
    found = []
    for lr in ("1e-3", "1e-2"):
        run = train(click_log, folder / f"din-{lr}", "model=din", f"optim.dense.lr={lr}")
        found.append(current(export(run, folder / "exports")))
    return found


@pytest.fixture(scope="module")
def server(versions):
    with serving(versions[0], max_candidates=50, max_body_mb=0.1) as running:
        yield running


@pytest.fixture
def client(server):
    return Client(server.port)


def test_scores_are_the_scorers(server, client):
    status, answer = client.post("/v1/score", BODY)
    expected = server.batcher.scorer.score(CONTEXT, CANDIDATES)
    best = np.argsort(-expected, kind="stable")
    assert status == 200 and answer["index"] == best.tolist()
    np.testing.assert_array_equal(np.float32(answer["score"]), expected[best])
    assert answer["model"] == f"din-1e-3/{server.artifact.version}"


def test_the_best_n_and_what_was_counted(client):
    status, answer = client.post("/v1/score", {**BODY, "top": 2, "explain": True})
    assert status == 200 and len(answer["index"]) == len(answer["score"]) == 2
    assert answer["counts"]["price.null"] >= 1


def test_arrow_scores_as_json(client):
    sink = pa.BufferOutputStream()
    for table in (pa.table({name: [value] for name, value in CONTEXT.items()}), pa.table(CANDIDATES)):
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    kind = {"content-type": "application/vnd.apache.arrow.stream"}
    assert client.post("/v1/score", sink.getvalue().to_pybytes(), **kind) == client.post("/v1/score", BODY)
    status, answer = client.post("/v1/score", b"nonsense", **kind)
    assert status == 400 and "no Arrow stream" in answer["error"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", "the request is no JSON"),
        (b"[1]", "no JSON object"),
        (b"[" * 5000, "the request is no JSON"),
        (b'{"candidates": {"price": [NaN]}}', "the request is no JSON"),
        ({"candidate": {}}, "'candidate' is not known; did you mean 'candidates'"),
        ({"context": CONTEXT}, "candidates: give their columns"),
        ({"context": [], "candidates": CANDIDATES}, "context is no object"),
        ({"candidates": {"prize": [1.0]}}, "candidates: 'prize' is not known; did you mean 'price'"),
        ({"candidates": {"item_id": [1, 2], "price": [1.0]}}, "candidates.price has 1 values, candidates.item_id 2"),
        ({"candidates": {"item_id": [1, "x"]}}, "candidates.item_id, row 1: 'x' is not an integer"),
        ({"candidates": {"item_id": [100_000], "age": [1.0]}}, "feature 'item_id' (column 'item_id') has id 100000"),
        (
            {"context": {"item_id": 1}, "candidates": {"item_id": [1]}},
            "item_id: in the context and among the candidates",
        ),
        ({**BODY, "top": 0}, "top is 0"),
        ({**BODY, "top": True}, "top is True"),
    ],
)
def test_a_mistake_is_a_400_with_one_line(client, body, expected):
    status, answer = client.post("/v1/score", body)
    assert status == 400 and expected in answer["error"] and "\n" not in answer["error"], answer
    assert client.post("/v1/score", BODY)[0] == 200


def test_limits(client):
    assert client.post("/v1/score", {"candidates": {"item_id": [1] * 51}})[0] == 413
    assert client.post("/v1/score", {"candidates": {"item_id": [1] * 100_000}})[0] == 413
    status, answer = client.post("/v1/score", BODY, **{"x-timeout-ms": "0"})
    assert status == 504 and "before it was scored" in answer["error"]
    assert client.post("/v1/score", BODY, **{"x-timeout-ms": "soon"})[0] == 400
    assert client.get("/nowhere")[0] == 404


def test_it_describes_itself(client, versions):
    status, model = client.get("/v1/model")
    assert status == 200 and model["version"] == versions[0].name and model["model"] == "din"
    assert {table["name"] for table in model["tables"]} == {"user", "item", "category", "hour", "tag"}
    schema = client.get("/v1/schema")[1]
    assert set(schema["properties"]["candidates"]["properties"]) == {*CONTEXT, *CANDIDATES}
    assert schema["x-context"] == ["clicked_items", "clicked_categories"]
    assert client.get("/health/live")[0] == client.get("/health/ready")[0] == client.get("/v2/health/ready")[0] == 200
    text = client.get("/metrics")[1].decode()
    assert 'clicktrainer_requests_total{code="200"}' in text and "clicktrainer_request_seconds_bucket" in text
    assert b"<form" in client.get("/")[1]


def test_the_open_inference_protocol(client, server):
    name = server.batcher.scorer.name
    status, described = client.get(f"/v2/models/{name}")
    assert status == 200 and described["versions"] == [server.artifact.version]
    columns = {"item_id": ([2], [3, 4]), "age": ([2], [30.0, 40.0]), "tags": ([2, 2], [1, 2, 3, 4])}
    inputs = [{"name": n, "shape": s, "datatype": "INT64", "data": d} for n, (s, d) in columns.items()]
    status, answer = client.post(f"/v2/models/{name}/infer", {"id": "a", "inputs": inputs})
    rows = {"item_id": [3, 4], "age": [30.0, 40.0], "tags": [[1, 2], [3, 4]]}
    expected = server.batcher.scorer.score({}, rows)
    assert status == 200 and answer["id"] == "a" and answer["outputs"][0]["shape"] == [2]
    np.testing.assert_array_equal(np.float32(answer["outputs"][0]["data"]), expected)
    assert client.get("/v2/models/other")[0] == 404
    assert (
        client.post(f"/v2/models/{name}/infer", {"inputs": [{"name": "item_id", "shape": [3], "data": [1]}]})[0] == 400
    )


def test_fifty_models_under_load_and_every_answer_is_wholly_of_one(versions):
    opened = [open_checked(version, hashes=False) for version in versions]
    scores = {each.artifact.version: np.sort(each.scorer.score(CONTEXT, CANDIDATES))[::-1] for each in opened}
    assert not np.array_equal(*scores.values())
    with serving(versions[0]) as server:
        stop, found = threading.Event(), []

        def ask():
            client = Client(server.port)
            while not stop.is_set():
                found.append(client.post("/v1/score", BODY))

        clients = [threading.Thread(target=ask) for _ in range(3)]
        for client in clients:
            client.start()
        for number in range(50):
            asked = len(found)
            next_one = opened[(number + 1) % 2]
            server.swap(next_one.artifact, next_one.scorer)
            while len(found) < asked + 2:  # at least one is answered by it
                stop.wait(0.001)
        stop.set()
        for client in clients:
            client.join()
    assert len(found) >= 100 and {status for status, _ in found} == {200}
    for _, answer in found:
        version = answer["model"].split("/")[1]
        np.testing.assert_allclose(answer["score"], scores[version], rtol=0, atol=1e-6)
    assert len({answer["model"] for _, answer in found}) == 2
