"""The lifetime of a worker process: from command line to exit code, with one line for a person's mistake."""

import ctypes
import errno
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from data_loaders import secrets
from data_loaders.errors import UserError
from data_loaders.messages import note, one_line
from data_loaders.storage import StorageError
from trainer.runtime.distributed import identity, launch_id
from trainer.runtime.rendezvous import RendezvousError, first_to_say
from trainer.runtime.signals import StopSignals

PATIENCE_SECONDS = 5.0
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
LAUNCHERS = (b"torch", b"launch")
REMEDIES = {
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "your quota there is used up: make room, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that you may read and write, or change its permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
}
QUIET = ("torch.fx", "torchrec", "fbgemm_gpu")  # loggers
LOST_PEER = (
    "Connection closed by peer",  # gloo
    "Connection reset by peer",
    "Broken pipe",
    "Socket Timeout",
    "Connection was likely closed",  # the store
    "ncclRemoteError",
    "Connection closed by remote peer",  # NCCL, below an ncclSystemError
    "NCCL communicator was aborted",
    "Some NCCL operations have failed or timed out",
)


def guarded(job: Callable[[], Any]) -> None:
    """Runs a job and ends the process: it never returns. A mistake of its user ends in one line on stderr and exit code 2,
    storage that keeps failing, or ranks that do not come, in one line and exit code 1, which a launcher may answer by
    starting again, and a bug in its traceback and exit code 1; a rank that loses contact with another says only that.
    Nothing waits for other ranks."""
    quiet_libraries()
    if launch_id()[0]:
        die_with_launcher()
    with StopSignals():  # a session, which has something to tell of them, has its own
        _guarded(job)


def _guarded(job: Callable[[], Any]) -> None:
    try:
        job()
        _leave(0)
    except Exception as error:  # noqa: BLE001 - each kind has its end
        if isinstance(error, (UserError, OSError)):
            _explain(error)
        if is_lost_peer(error):
            note(f"rank {identity()[0]}: lost contact with another rank; its own message says why")
            _leave(1)
        # As it would end by itself, but without the interpreter's teardown, which may abort (see ``_leave``).
        get_error_handler().record_exception(error)
        sys.excepthook(type(error), error, error.__traceback__)
        _leave(1)


def _explain(error: UserError | OSError) -> None:
    message = explanation(error)
    if _claim(message):
        note(f"error: {message}")
    else:
        # The first rank that ends makes torchrun end the others: it must be the one that speaks.
        time.sleep(PATIENCE_SECONDS)
    _leave(1 if is_retryable(error) else 2)


def results_alone_on_stdout() -> TextIO:
    """Stdout, for what another program is to read: all else that is printed from now on, by C libraries too, goes to stderr."""
    sys.stdout.flush()
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return results


def quiet_libraries() -> None:
    """Leaves out what libraries say to their own developers; their errors stay."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\b")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch(rec)?\b")
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


def is_retryable(error: BaseException) -> bool:
    """Whether another start may help, as far as the error shows: not where a person must mend something first."""
    return isinstance(error, (StorageError, RendezvousError)) or not isinstance(error, (UserError, OSError))


def is_lost_peer(error: BaseException) -> bool:
    """Whether this rank only met the end of another one."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER)


def explanation(error: BaseException) -> str:
    """One line without secrets, for the terminal and ``status.json``; of the system's errors also where it happened, and a
    remedy."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        remedy = REMEDIES.get(error.errno, "")
        text = f"{_text(error.filename)}: {error.strerror}{remedy and f': {remedy}'}"
    return secrets.scrub(one_line(text))


def _text(name: Any) -> str:
    return os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else str(name)


def die_with_launcher() -> None:
    """Has the kernel kill this process when its launcher dies, by SIGKILL even, so that no orphan keeps the run folder and
    a GPU. Ends it here where that has happened already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # An orphan's parent is process 1, which in a container may be the launcher itself.
    if os.getppid() == 1 and not any(name in Path("/proc/1/cmdline").read_bytes() for name in LAUNCHERS):
        _leave(1)


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
