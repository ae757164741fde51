"""Training click-through-rate models with sharded embedding tables.

``from trainer import compose, train, Run, Scorer`` is the library; nothing else here is public."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Our packages are those beside this one, whatever the folder that the program is started in holds.
sys.path.insert(0, str(Path(__file__).absolute().parents[1]))
import conf  # noqa: F401
import data_loaders  # noqa: F401

del sys.path[0]

if TYPE_CHECKING:
    from trainer.api import Run, Scorer, compose, train

__all__ = ["Run", "Scorer", "compose", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What notebooks import (docs/python.md), when they ask for it: PyTorch takes seconds to load."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("trainer.api"), name)
