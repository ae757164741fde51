"""Starting: ranks on this machine, and the check that an installation can train."""

import sys
from pathlib import Path

# Our packages are those beside this one, whatever the folder that the program is started in holds.
sys.path.insert(0, str(Path(__file__).absolute().parents[1]))
import trainer.runtime.gpus  # noqa: F401 - and with it trainer, conf and data_loaders

del sys.path[0]
