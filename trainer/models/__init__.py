"""One paper a file: ``Batch -> logits [B]``.

A file defines a module and names it at the end, ``Model = …``; ``conf/model/<file>.yaml`` holds its hyperparameters.
The constructor is ``(schema, *, <hyperparameters>, device)``, where ``device`` is that of the tables ("meta" before
sharding). The dense part, a ``trainer.modules.head.Head``, is always built on the CPU and before the tables, so that its
initial values depend on the seed alone; the model composes its modules, the head receives them. ``layout`` says which features
the model reads from which part of the batch. ``pooled`` has what all models but DIN have in common.

The training pipeline traces ``forward`` down to the tables: it calls them with attributes of the batch and leaves all
else to the head, which it does not look into.

``feature_axes(schema)`` says which part of a dense parameter belongs to which feature: ``{parameter: (axis, [(feature,
width), …])}``, in the order along that axis. A warm start moves these parts by name when features are added or removed.
Parameters that the model has for some hyperparameters only are among them, too. What belongs to several features together,
in any order, names a tuple of them, ``(("a", "b"), 1)`` for their product, and what belongs to none, as a hidden layer's
units do, ``()``. Where several axes are made of the same parts, as those of a matrix from features to features, ``axis`` is
a tuple of them.
A model that keeps modules by position for features names those features in ``feature_modules(schema)``. A model that has
layers of other models, by the same names, names these models in ``initialised_by``: a warm start from them moves these
layers, too.
"""

import ast
import difflib
import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

from torch import nn

from data_loaders.errors import UserError

FeatureAxes = dict[str, tuple[int | tuple[int, ...], Sequence[tuple[str | tuple[str, ...], int]]]]
OURS = "trainer.models."
_NAMED = (ast.Import, ast.ImportFrom)
_BLOCKS = (ast.If, ast.Try, ast.With)


def load_model_class(name: str) -> type:
    """``deepfm`` -> ``trainer.models.deepfm.Model``; a dotted name is a module of the user's own that defines ``Model``. The
    module is found and its source is read before any of it, or of its packages, is executed. Raises ``UserError`` where there
    is no such module, or none with a ``Model``."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise UserError(f"model.name is {name!r}: give a module's name, such as deepfm or my_package.my_model")
    module_name = name if "." in name else f"{OURS}{name}"
    _check_source(name, module_name)
    try:
        model = getattr(importlib.import_module(module_name), "Model", None)
    except SystemExit as ended:  # it would look like a run that has finished
        raise UserError(
            f"model.name is {name!r}, and {module_name} ends the process while it is imported (exit code {ended.code}): leave "
            "sys.exit to what runs it as a program"
        ) from None
    if not (isinstance(model, type) and issubclass(model, nn.Module)):
        raise UserError(
            f"model.name is {name!r}, but 'Model' of {module_name} is no class of torch.nn.Module: see docs/add-a-model.md"
        )
    return model


def is_ours(name: str) -> bool:
    """Whether a model's name is one of this package, and no module of a user's own."""
    return "." not in name or name.startswith(OURS)


def _check_source(name: str, module_name: str) -> None:
    """Raises ``UserError`` unless the module's source defines a ``Model``."""
    spec = _find(module_name)
    if spec is None:
        raise UserError(f"model.name is {name!r}, but there is no module {module_name}: {_where_to_look(name)}")
    source = Path(spec.origin or "")
    if source.suffix != ".py" or not source.is_file():
        raise UserError(
            f"model.name is {name!r}, but {module_name} is no Python file: name the module that defines 'Model'"
        )
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        place = f"{source}, line {line}" if line else str(source)
        raise UserError(
            f"model.name is {name!r}, and {place} is no valid Python ({getattr(error, 'msg', error)})"
        ) from None
    if "Model" not in _names(tree.body):
        raise UserError(
            f"model.name is {name!r}, but {module_name} defines no 'Model': add `Model = YourClass` to {source}"
        )


def _find(module_name: str) -> ModuleSpec | None:
    """As an import would find it, but without an import of the packages it lies in."""
    spec, path, parts = None, None, module_name.split(".")
    for number in range(1, len(parts) + 1):
        if number > 1 and path is None:
            return None
        full = ".".join(parts[:number])
        # A package that is imported already is the one, whatever lies under its name in the current folder.
        spec = getattr(sys.modules.get(full), "__spec__", None)
        if spec is None:
            found = (finder.find_spec(full, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
            spec = next((each for each in found if each is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _names(statements: Iterable[ast.stmt]) -> Iterator[str]:
    """What a module's own statements give names to."""
    for statement in statements:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
            yield statement.name
        elif isinstance(statement, _NAMED):
            yield from (alias.asname or alias.name for alias in statement.names)
        elif isinstance(statement, ast.Assign):
            yield from (
                node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)
            )
        elif (
            isinstance(statement, ast.AnnAssign)
            and statement.value is not None
            and isinstance(statement.target, ast.Name)
        ):
            yield statement.target.id
        elif isinstance(statement, _BLOCKS):
            inner = [*statement.body, *getattr(statement, "orelse", ()), *getattr(statement, "finalbody", ())]
            yield from _names(
                [*inner, *(each for handler in getattr(statement, "handlers", ()) for each in handler.body)]
            )


def _where_to_look(name: str) -> str:
    if is_ours(name):
        valid = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
        near = difflib.get_close_matches(name.removeprefix(OURS), valid, n=3, cutoff=0.5)
        own = "; a module of your own is named with its package (my_package.my_model)" if "." not in name else ""
        return (f"did you mean {' or '.join(near)}? " if near else "") + f"see trainer/models/{own}"
    file = Path(*name.split(".")).with_suffix(".py")
    beside = next((path.relative_to(Path.cwd()) for path in sorted(Path.cwd().glob(f"*/{file}"))), None)
    if beside is not None:
        return f"it lies in {beside}, so set PYTHONPATH={beside.parts[0]}"
    return f"set PYTHONPATH to the folder that holds {file}, or install its package"
