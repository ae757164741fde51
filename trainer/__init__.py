"""Training click-through-rate models with sharded embedding tables."""

import sys
from pathlib import Path

# Our packages are those beside this one, whatever the folder that the program is started in holds.
sys.path.insert(0, str(Path(__file__).absolute().parents[1]))
import conf  # noqa: F401
import data_loaders  # noqa: F401

del sys.path[0]

__version__ = "0.1.0"
