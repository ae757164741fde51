"""The Open Inference Protocol, version 2 (KServe, Triton): one input a column, one row a candidate, one output ``score``.

Its arrays cannot say null, nor lists of different lengths: ``/v1/score`` is the way for those.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Any

import pyarrow as pa

from data_loaders.arrow import is_list, is_text, value_type
from trainer.serve.requests import RequestError, table_of
from trainer.serve.scorer import Request

_NAMES = {
    pa.bool_(): "BOOL",
    pa.uint8(): "UINT8",
    pa.uint16(): "UINT16",
    pa.uint32(): "UINT32",
    pa.uint64(): "UINT64",
    pa.int8(): "INT8",
    pa.int16(): "INT16",
    pa.int32(): "INT32",
    pa.int64(): "INT64",
    pa.float16(): "FP16",
    pa.float32(): "FP32",
    pa.float64(): "FP64",
}


def metadata(name: str, version: str, types: Mapping[str, pa.DataType]) -> dict[str, Any]:
    inputs = [
        {"name": column, "datatype": datatype(kind), "shape": [-1, -1] if is_list(value_type(kind)) else [-1]}
        for column, kind in types.items()
    ]
    outputs = [{"name": "score", "datatype": "FP32", "shape": [-1]}]
    return {"name": name, "versions": [version], "platform": "clicktrainer", "inputs": inputs, "outputs": outputs}


def datatype(kind: pa.DataType) -> str:
    kind = value_type(kind)
    if is_list(kind):
        return datatype(kind.value_type)
    return "BYTES" if is_text(kind) or pa.types.is_temporal(kind) else _NAMES.get(kind, "FP64")


def request(body: Mapping[str, Any], types: Mapping[str, pa.DataType]) -> Request:
    """Raises ``RequestError``."""
    inputs = body.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise RequestError("inputs: give one for each column, {name, shape, datatype, data}")
    return Request(pa.table({}), table_of(dict(map(_column, inputs)), types, "inputs"))


def response(body: Mapping[str, Any], name: str, version: str, scores: Any) -> dict[str, Any]:
    output = {"name": "score", "datatype": "FP32", "shape": [len(scores)], "data": scores}
    given = {"id": body["id"]} if isinstance(body.get("id"), str) else {}
    return {"model_name": name, "model_version": version, **given, "outputs": [output]}


def _column(given: Any) -> tuple[str, list[Any]]:
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise RequestError(f"inputs has {given!r:.100}: give {{name, shape, datatype, data}}")
    name, shape, data = given["name"], given.get("shape"), given.get("data")
    sound = isinstance(shape, list) and len(shape) in (1, 2) and all(type(n) is int and n >= 0 for n in shape)
    if not sound or not isinstance(data, list):
        raise RequestError(f"inputs.{name}: give a shape [rows] or [rows, length], and data")
    return name, _shaped(data, shape, name)


def _shaped(data: list[Any], shape: list[int], name: str) -> list[Any]:
    """Data flat or nested, as the protocol allows both."""
    if len(shape) == 2 and len(data) == shape[0] and all(isinstance(row, list) for row in data):
        return data
    if len(data) != shape[0] * (shape[1] if len(shape) == 2 else 1):
        raise RequestError(f"inputs.{name} has {len(data)} values in data, but its shape is {shape}")
    if len(shape) == 1:
        return data
    values = iter(data)
    return [list(islice(values, shape[1])) for _ in range(shape[0])]
