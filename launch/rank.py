"""What a rank is started by: `python …/launch/rank.py MODULE argument …` is `python -m MODULE argument …`, but for our own
packages, which come from beside this file: a folder `trainer`, `conf` or `data_loaders` where a run is started, or on
PYTHONPATH, does not take their place. A model of a user's own is found as ever. (Python 3.10 has no `-P`.)"""

import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]


def command(module: str, arguments: Sequence[str]) -> list[str]:
    """The words that start ``module``."""
    return [sys.executable, str(Path(__file__).absolute()), module, *arguments]


def main() -> None:
    # Until the module listens to it (trainer.runtime.process), Ctrl-C while it is imported is an end without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    is_safe = getattr(
        sys.flags, "safe_path", False
    )  # then neither the script's folder nor the current one is looked in
    if not is_safe:
        sys.path[0] = os.getcwd()
    sys.path.insert(0, str(ROOT))
    import launch.rank  # noqa: F401 - and with it our other packages
    from data_loaders import packages

    del sys.path[0]
    packages.explain_missing()
    module, sys.argv = sys.argv[1], sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
