"""What a model must be to be trained (docs/add-a-model.md), checked before the first step and at it: a mistake in a model of a
user's own is one line that says what, where and how to mend it.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from data_loaders.errors import UserError
from data_loaders.messages import one_line
from data_loaders.schema import Layout, Schema

TRACED = "The training pipeline reads forward before there is a batch: branches and arithmetic belong into the Head"
SIGNATURE = "def __init__(self, schema, *, <hyperparameter>: <type> = <default>, …, device)"
TABLES = (EmbeddingBagCollection, EmbeddingCollection)


def check_class(name: str, model_class: type[nn.Module]) -> type[nn.Module]:
    """Whether the constructor of ``Model`` of the module ``name`` can be called. Raises ``UserError``."""
    parameters = inspect.signature(model_class.__init__).parameters
    for needed in ("schema", "device"):
        if needed not in parameters:
            raise UserError(f"{place(name, model_class)}: its constructor takes no '{needed}': write {SIGNATURE}")
    for parameter in [it for key, it in parameters.items() if key not in ("self", "schema", "device")]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UserError(
                f"{place(name, model_class)}: its constructor takes '{parameter}', so that nobody knows its hyperparameters: "
                f"name each, {SIGNATURE}"
            )
        if parameter.annotation is parameter.empty:
            raise UserError(
                f"{place(name, model_class)}: its hyperparameter '{parameter.name}' has no type: write {SIGNATURE}"
            )
    return model_class


def check_built(name: str, model: nn.Module, schema: Schema) -> None:
    """Whether a model says which features it reads, has tables for them and a forward. Raises ``UserError``."""
    where = place(name, type(model))
    if problem := next(_problems(model, schema), None):
        raise UserError(f"{where}: {problem}")


def check_logits(model_class: type, logits: object, labels: Tensor, *, training: bool) -> None:
    """Whether ``forward`` has returned a logit for each row of ``labels`` [B]. Raises ``UserError``."""
    expected = f"expected one floating-point logit per row, shape [{len(labels)}]"
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{_forward(model_class)} returns {'' if logits is None else 'something '}{_kind(logits)}: {expected}"
        )
    if logits.shape != labels.shape:
        squeeze = ": end it with .squeeze(1)" if logits.shape == (len(labels), 1) else ""
        raise UserError(f"{_forward(model_class)} returns the shape {list(logits.shape)}: {expected}{squeeze}")
    if not logits.is_floating_point():
        raise UserError(f"{_forward(model_class)} returns {logits.dtype}: {expected} (logits, no classes)")
    if logits.device != labels.device:
        raise UserError(f"{_forward(model_class)} returns a tensor on {logits.device}, its batch is on {labels.device}")
    if training and torch.is_grad_enabled() and not logits.requires_grad:
        raise UserError(
            f"{_forward(model_class)} returns logits that no parameter can learn from: leave out detach() and no_grad()"
        )


@contextmanager
def explained(
    name: str, model_class: type, passes: Callable[[Exception], bool] = lambda error: False
) -> Iterator[None]:
    """Within, an error in the code of a user's own model becomes a ``UserError`` that names file, line and cause: a
    traceback of each rank through the training pipeline would hide them. ``passes``: errors that only came by there."""
    try:
        yield
    except (UserError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == _source(model_class)]
        if "." not in name or not own or passes(error):
            raise
        text = one_line(error)
        hint = f" {TRACED}" if isinstance(error, TraceError) or "symbolic" in text else ""
        raise UserError(
            f"{place(name, model_class)}, line {own[-1].lineno}, in {own[-1].name}: {type(error).__name__}: {text:.500}.{hint}"
        ) from None


def place(name: str, model_class: type) -> str:
    """Where a model's code is."""
    return f"model '{name}' ({_source(model_class)}, class {model_class.__name__})"


def _problems(model: nn.Module, schema: Schema) -> Iterator[str]:
    layout = getattr(model, "layout", None)
    if not isinstance(layout, Layout):
        has = "has no 'layout'" if layout is None else f"has a 'layout' that is {_kind(layout)}"
        yield f"it {has}: set self.layout = schema.layout() in its constructor"
        return
    known = {*schema.sparse, *schema.sequences, *schema.crosses}
    weighs = [
        module for module in model.modules() if isinstance(module, EmbeddingBagCollection) and module.is_weighted()
    ]
    if layout.weighted and not weighs:
        yield (
            f"it reads '{layout.weighted[0]}' with others' weights or its own, but weighs nothing: build its tables by "
            "trainer.models.pooled, or leave weights out of data.schema.features"
        )
    unknown = [key for key in (*layout.pooled, *layout.unpooled) if key not in known]
    if unknown:
        yield f"its layout names '{unknown[0]}', which data.schema does not declare as sparse, sequence or cross"
    tables = [module for module in model.modules() if isinstance(module, TABLES)]
    if not tables:
        yield "it has no embedding tables: build them by trainer.modules.embeddings.build_embedding_bags, or use model=lr"
    if type(model).forward is nn.Module.forward:
        yield "it has no forward: define forward(self, batch) -> logits [B]"
    rows = {id(parameter) for module in tables for parameter in module.parameters()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in rows and tensor.is_meta:
            yield f"'{name}' lies on device 'meta', which is for tables alone: build all else without device="


def _forward(model_class: type) -> str:
    return f"the forward of class {model_class.__name__} ({_source(model_class)})"


def _source(model_class: type) -> str:
    try:
        return inspect.getsourcefile(model_class) or model_class.__module__
    except TypeError:
        return model_class.__module__


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
