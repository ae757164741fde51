"""``head.onnx``: the dense part of an exported model for other engines, from the vectors of the lookups to a logit.

Inputs: ``dense`` float32 [rows, numbers], in the order of the schema, and ``pooled`` float32 [rows, width], the vectors of
``columns`` beside each other; output: ``logit`` float32 [rows], with the correction for sampled negatives. One file, of standard
operators only. Tables stay outside. A model whose head reads histories event by event has no such form.
"""

import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from data_loaders.errors import UserError
from data_loaders.messages import one_line

HEAD = "head.onnx"
OPSET = 20
ROWS = 4  # of the example that is traced
INPUTS = 3  # of a head that has such a form: numbers, pooled vectors, weights
LONGEST = 200  # characters of another program's error


class PooledHead(nn.Module):
    """``head`` over plain tensors. ``names``, ``widths``: of the vectors in ``pooled``."""

    def __init__(self, head: nn.Module, names: list[str], widths: list[int], correction: float) -> None:
        super().__init__()
        self.head, self.names, self.widths, self.correction = head, names, widths, correction

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        vectors = KeyedTensor(self.names, self.widths, pooled)
        return self.head(dense, vectors, torch.ones_like(pooled[:, 0])) + self.correction


class SeenInputs(nn.Module):
    """``head``, and the ``inputs`` of its last call."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.inputs: tuple[object, ...] = ()

    def forward(self, *inputs: object) -> Tensor:
        self.inputs = inputs
        return self.head(*inputs)


class OnnxHead(nn.Module):
    """In place of a model's head: computes by ONNX Runtime, on one thread."""

    def __init__(self, path: Path, correction: float) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._correction = correction

    def forward(self, dense: Tensor, pooled: KeyedTensor, weights: Tensor) -> Tensor:
        named = {"dense": dense.numpy(), "pooled": pooled.values().numpy()}
        wanted = {each.name: named[each.name] for each in self._session.get_inputs()}
        return torch.from_numpy(self._session.run(None, wanted)[0]) - self._correction


def write_onnx(path: Path, head: nn.Module, inputs: Sequence[object], correction: float) -> None:
    """``inputs`` are those of one call of the head, one row or more. Raises ``UserError`` where it has no such form."""
    dense, pooled = inputs[0], inputs[1] if len(inputs) > 1 else None
    if len(inputs) > INPUTS or not isinstance(dense, Tensor) or not isinstance(pooled, KeyedTensor):
        raise UserError("its head takes more than numbers and pooled vectors")
    try:
        import onnx
    except ImportError:
        raise UserError("the package onnx is missing: pip install 'clicktrainer[onnx]'") from None
    plain = PooledHead(head, pooled.keys(), pooled.length_per_key(), correction).eval()
    # One row would be traced as a fixed number.
    _trace(plain, tuple(torch.cat((part, part))[:ROWS] for part in (dense, pooled.values())), path)
    made = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(made)
    further = {each.domain for each in made.opset_import} - {""}
    outside = [each.name for each in made.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]
    if further or outside:
        path.unlink()
        raise UserError(f"it would need operators of {sorted(further)} and data in other files {outside[:3]}")


def _trace(head: nn.Module, example: tuple[Tensor, ...], path: Path) -> None:
    rows = torch.export.Dim("rows", min=1)
    logging.disable(logging.WARNING)  # it names operators of packages that are not installed
    try:
        with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                head,
                example,
                path,
                input_names=["dense", "pooled"],
                output_names=["logit"],
                opset_version=OPSET,
                dynamic_shapes=({0: rows}, {0: rows}),
                dynamo=True,
                external_data=False,
            )
    except Exception as error:  # noqa: BLE001 - whatever it was that could not be traced
        raise UserError(f"its head cannot be traced ({one_line(str(error).strip(), LONGEST)})") from None
    finally:
        logging.disable(logging.NOTSET)
