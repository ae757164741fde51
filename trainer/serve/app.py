"""The HTTP interface: ``/v1/score``, ``/v1/model``, ``/v1/schema``, health, metrics, and the Open Inference Protocol (v2)."""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from data_loaders.errors import UserError
from data_loaders.messages import one_line
from data_loaders.schema import one_of
from trainer.config.serve import ServeConfig
from trainer.serve import metrics, open_inference, requests
from trainer.serve.artifact import Artifact
from trainer.serve.batcher import Batcher, Overloaded, Scored, TooLate
from trainer.serve.json_schema import request_schema
from trainer.serve.scorer import Request, Scorer, order, probabilities

ARROW = "application/vnd.apache.arrow.stream"
KEYS = ("context", "candidates", "top", "explain")
PAGE = Path(__file__).with_name("page.html")


class Refused(Exception):
    """An answer other than 200, in one line."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class Server:
    """Routes over a ``batcher``; ``artifact`` is the version that it serves. ``shared``: the folder of the metrics of all
    workers."""

    def __init__(self, artifact: Artifact, batcher: Batcher, config: ServeConfig, shared: Path | None = None) -> None:
        self.artifact, self.batcher, self.config, self.shared = artifact, batcher, config, shared
        self._counted: dict[str, dict[str, int]] = {}  # by version
        self.ready = True

    def swap(self, artifact: Artifact, scorer: Scorer) -> None:
        """From the next batch on."""
        metrics.serves(artifact.version, self.artifact.version, size_of(artifact))
        self.artifact = artifact
        self.batcher.swap(scorer)
        metrics.reloads.labels("ok").inc()

    @cached_property
    def app(self) -> Starlette:
        model = "/v2/models/{model}"
        routes = [
            Route("/", self.page),
            Route("/v1/score", self.answering(self.score), methods=["POST"]),
            Route("/v1/model", self.answering(self.model)),
            Route("/v1/schema", self.answering(self.schema)),
            Route("/health/live", self.live),
            Route("/health/ready", self.is_ready),
            Route("/metrics", self.metrics),
            Route("/v2", self.answering(self.open_server)),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.is_ready),
            Route(model, self.answering(self.open_model)),
            Route(f"{model}/ready", self.is_ready),
            Route(f"{model}/infer", self.answering(self.open_infer), methods=["POST"]),
        ]
        return Starlette(routes=routes)

    def answering(
        self, handle: Callable[[HttpRequest], Awaitable[Mapping[str, Any]]]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """JSON, and for what cannot be answered a status and one line."""

        async def answer(request: HttpRequest) -> Response:
            began = time.perf_counter()
            status, headers = 200, None
            try:
                content = await handle(request)
            except Refused as error:
                status, content, headers = error.status, {"error": str(error)}, error.headers
            except UserError as error:
                status, content = 400, {"error": one_line(str(error))}
            metrics.requests.labels(str(status)).inc()
            metrics.request_seconds.observe(time.perf_counter() - began)
            body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
            return Response(body, status, headers, media_type="application/json")

        return answer

    # Scores

    async def score(self, http: HttpRequest) -> dict[str, Any]:
        body = await self._body(http)
        if http.headers.get("content-type", "").partition(";")[0].strip() == ARROW:
            make, options = _arrow(body), dict(http.query_params)
        else:
            make, options = _json(body)
        top, explain = _top(options.get("top")), options.get("explain") in (True, "true", "1")
        scored = await self._scored(http, make)
        values = probabilities(scored.logits)
        best = order(values)[:top]
        answer = {
            "model": f"{scored.scorer.name}/{scored.scorer.version}",
            "index": best,
            "score": _or_null(values[best]),
        }
        return {**answer, "counts": scored.scorer.counters.snapshot()} if explain else answer

    async def _scored(self, http: HttpRequest, make: Callable[[Scorer], Request]) -> Scored:
        deadline = time.monotonic() + _timeout(http, self.config.timeout_ms) / 1000
        try:
            scored = await self.batcher.score(lambda scorer: self._limited(make(scorer)), deadline)
        except Overloaded:
            raise Refused(503, "too many requests wait: try again", {"Retry-After": "1"}) from None
        except TooLate:
            raise Refused(504, "the request's time was over before it was scored") from None
        metrics.candidates.observe(len(scored.logits))
        metrics.merged.observe(scored.merged)
        metrics.waiting.set(self.batcher.waiting)
        counted = self._counted.setdefault(scored.scorer.version, {})
        metrics.count_problems(scored.scorer.counters.snapshot(), counted)
        return scored

    def _limited(self, request: Request) -> Request:
        most = self.config.max_candidates
        if request.candidates.num_rows > most:
            raise Refused(413, f"{request.candidates.num_rows:,} candidates: at most {most:,} (serve.max_candidates)")
        return request

    async def _body(self, http: HttpRequest) -> bytes:
        most = int(self.config.max_body_mb * 2**20)
        parts, size = [], 0
        async for part in http.stream():
            size += len(part)
            if size > most:
                raise Refused(413, f"a request of more than {self.config.max_body_mb:g} MB (serve.max_body_mb)")
            parts.append(part)
        return b"".join(parts)

    # What is served

    async def model(self, _: HttpRequest) -> dict[str, Any]:
        serving, artifact = self.artifact.serving, self.artifact
        shown = {name: serving[name] for name in ("run", "step", "model", "metrics", "made_with")}
        tables = [{**asdict(table), "bytes": artifact.manifest[table.file]["bytes"]} for table in artifact.tables]
        return {"version": artifact.version, **shown, "tables": tables}

    async def schema(self, _: HttpRequest) -> dict[str, Any]:
        scorer, schema = self.batcher.scorer, self.artifact.config.data.schema
        return request_schema(schema, scorer.model.layout, scorer.types)

    async def live(self, _: HttpRequest) -> Response:
        return Response(b"{}", media_type="application/json")

    async def is_ready(self, _: HttpRequest) -> Response:
        return Response(b"{}", 200 if self.ready else 503, media_type="application/json")

    async def metrics(self, _: HttpRequest) -> Response:
        return Response(metrics.text(self.shared), media_type="text/plain; version=0.0.4")

    async def page(self, _: HttpRequest) -> Response:
        return HTMLResponse(PAGE.read_text())

    # Open Inference Protocol

    async def open_server(self, _: HttpRequest) -> dict[str, Any]:
        return {
            "name": "clicktrainer",
            "version": self.artifact.serving["made_with"].get("clicktrainer", ""),
            "extensions": [],
        }

    async def open_model(self, http: HttpRequest) -> dict[str, Any]:
        self._check_name(http)
        return open_inference.metadata(self.batcher.scorer.name, self.artifact.version, self.batcher.scorer.types)

    async def open_infer(self, http: HttpRequest) -> dict[str, Any]:
        self._check_name(http)
        body = _object(await self._body(http))
        scored = await self._scored(http, lambda scorer: open_inference.request(body, scorer.types))
        values = probabilities(scored.logits)
        return open_inference.response(body, scored.scorer.name, scored.scorer.version, _or_null(values))

    def _check_name(self, http: HttpRequest) -> None:
        served = self.batcher.scorer.name
        if http.path_params["model"] != served:
            raise Refused(404, f"there is no model {http.path_params['model']!r:.100}: this server has {served!r}")


def size_of(artifact: Artifact) -> int:
    return sum(artifact.manifest[table.file]["bytes"] for table in artifact.tables)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise requests.RequestError(f"the request is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise requests.RequestError('the request is no JSON object: give {"context": {…}, "candidates": {…}}')
    return value


def _json(body: bytes) -> tuple[Callable[[Scorer], Request], dict[str, Any]]:
    value = _object(body)
    for key in value:
        try:
            one_of(key, KEYS, "the request")
        except UserError as error:
            raise requests.RequestError(str(error)) from None
    context, candidates = value.get("context", {}), value.get("candidates")
    if not isinstance(context, dict):
        raise requests.RequestError("context is no object: give the columns that all candidates share, {column: value}")
    if not isinstance(candidates, dict) or not candidates:
        raise requests.RequestError("candidates: give their columns, {column: [a value for each candidate]}")
    return lambda scorer: scorer.request(context, candidates), value


def _arrow(body: bytes) -> Callable[[Scorer], Request]:
    """Two streams, one after the other: the context, of one row, and the candidates. Or the candidates alone."""
    source = pa.BufferReader(body)
    tables = []
    try:
        while source.tell() < len(body):
            tables.append(pa.ipc.open_stream(source).read_all())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise requests.RequestError(f"the request is no Arrow stream: {error}") from None
    if len(tables) not in (1, 2) or (len(tables) == 2 and tables[0].num_rows != 1):
        raise requests.RequestError(
            "give two Arrow streams, a context of one row and the candidates; or candidates alone"
        )
    context, candidates = tables if len(tables) == 2 else (pa.table({}), tables[0])
    return lambda scorer: scorer.request_of_tables(context, candidates)


def _top(given: Any) -> int | None:
    if given is None:
        return None
    try:
        top = int(given)
    except (TypeError, ValueError):
        top = 0
    if top < 1 or isinstance(given, (bool, float)):
        raise requests.RequestError(f"top is {given!r:.50}: give how many of the best candidates to answer, from 1")
    return top


def _timeout(http: HttpRequest, most: float) -> float:
    """Milliseconds."""
    given = http.headers.get("x-timeout-ms")
    if given is None:
        return most
    try:
        asked = float(given)
    except ValueError:
        asked = -1.0
    if not asked >= 0:
        raise requests.RequestError(f"X-Timeout-Ms is {given!r:.50}: give milliseconds")
    return min(most, asked)


def _or_null(values: NDArray[np.float32]) -> Any:
    """For JSON: NaN, a row that a policy leaves out, is null."""
    return [None if value != value else value for value in values.tolist()] if np.isnan(values).any() else values
