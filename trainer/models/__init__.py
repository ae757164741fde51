"""One paper a file: ``Batch -> logits [B]``.

A file defines a module and names it at the end, ``Model = …``; ``conf/model/<file>.yaml`` holds its hyperparameters.
The constructor is ``(schema, *, <hyperparameters>, device)``, where ``device`` is that of the tables ("meta" before
sharding). The dense part, a ``trainer.modules.Head``, is always built on the CPU and before the tables, so that its
initial values depend on the seed alone. ``layout`` says which features the model reads from which part of the batch.

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

import importlib
import re
from collections.abc import Sequence

FeatureAxes = dict[str, tuple[int | tuple[int, ...], Sequence[tuple[str | tuple[str, ...], int]]]]


def load_model_class(name: str) -> type:
    """``deepfm`` -> ``trainer.models.deepfm.Model``; a dotted name is a module of the user's own that
    defines ``Model``. Raises ``ValueError`` where there is no such module."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise ValueError(f"model.name is {name!r}: give a module's name, such as deepfm or my_package.my_model")
    module_name = name if "." in name else f"trainer.models.{name}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise ValueError(
                f"model.name is {name!r}, but there is no module {module_name}: see trainer/models/"
            ) from None
        raise
    if not hasattr(module, "Model"):
        raise ValueError(f"model.name is {name!r}, but {module_name} defines no 'Model': add `Model = YourClass` to it")
    return module.Model
