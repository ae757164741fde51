"""Whether an error is a mistake of its user's: found where it is raised, and carried to the other ranks with it."""

import pickle
import traceback
from pathlib import Path

from data_loaders.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
OUR_PACKAGES = tuple(f"{ROOT / name}/" for name in ("trainer", "data_loaders"))
MARK = "is_mistake_of_the_user"  # an attribute of the error: its own traceback does not travel


def is_user_error(error: BaseException) -> bool:
    """Our own checks are ``raise`` statements in our own code; what Python or a library raises by itself is a bug and
    keeps its traceback."""
    if (known := getattr(error, MARK, None)) is not None:
        return known
    if isinstance(error, (UserError, OSError)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return (
        bool(frames) and frames[-1].filename.startswith(OUR_PACKAGES) and (frames[-1].line or "").startswith("raise ")
    )


def for_all_ranks(error: Exception) -> Exception:
    """The error of one rank, as all ranks raise it: marked, and of a kind that can be sent."""
    mark = is_user_error(error)
    setattr(error, MARK, mark)
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # noqa: BLE001 - whatever an exception's own constructor or contents object to
        kind = next((kind for kind in (OSError, ValueError) if isinstance(error, kind)), RuntimeError)
        sent = kind(f"{type(error).__name__}: {' '.join(str(error).split())}")
        setattr(sent, MARK, mark)
        return sent.with_traceback(error.__traceback__)
