"""The lifetime of a worker process: from command line to exit code, with one line for a person's mistake."""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_loaders.storage import StorageError
from trainer.compose import UserError
from trainer.distributed import first_to_say, identity

ROOT = Path(__file__).resolve().parents[1]
OUR_PACKAGES = tuple(str(ROOT / name) + os.sep for name in ("trainer", "data_loaders"))
PATIENCE_SECONDS = 5.0
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout")


def guarded(job: Callable[[], Any]) -> None:
    """Runs a job and ends the process: it never returns. A mistake of its user ends in one line on stderr and exit code 2,
    storage that keeps failing in one line and exit code 1, which a launcher may answer by starting again, and a bug in its
    traceback and exit code 1; a rank that loses contact with another says only that. Nothing waits for other ranks."""
    quiet_libraries()
    try:
        job()
        _leave(0)
    except (ValueError, OSError) as error:
        if not is_user_error(error):
            raise
        message = one_line(error)
        if _claim(message):
            print(f"error: {message}", file=sys.stderr, flush=True)
        else:
            # The first rank that ends makes torchrun end the others: it must be the one that speaks.
            time.sleep(PATIENCE_SECONDS)
        _leave(1 if isinstance(error, StorageError) else 2)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST_PEER):
            raise
        print(
            f"rank {identity()[0]}: lost contact with another rank; its own message says why",
            file=sys.stderr,
            flush=True,
        )
        _leave(1)


def quiet_libraries() -> None:
    """Leaves out what libraries say to their own developers; their errors stay."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\b")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch(rec)?\b")
    for name in ("torch.fx", "torchrec", "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)


def is_user_error(error: BaseException) -> bool:
    """Our own checks are ``raise`` statements in our own code; what Python or a library raises by itself is a bug and
    keeps its traceback."""
    if isinstance(error, (UserError, OSError)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return (
        bool(frames) and frames[-1].filename.startswith(OUR_PACKAGES) and (frames[-1].line or "").startswith("raise ")
    )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _claim(message: str) -> bool:
    try:
        return first_to_say(message)
    except RuntimeError:  # the store is gone with the rank that held it: better said twice than not at all
        return True


def _leave(code: int) -> None:
    """Ends the process at once. After an error an orderly shutdown would wait for ranks that wait for us; and at any end, a
    communication thread that lets go of a Python object while the interpreter is torn down aborts the process (seen
    about once in a hundred: "terminate called without an active exception")."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
