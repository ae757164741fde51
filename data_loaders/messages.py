"""Texts of messages, and the one place that prints what is no result. Standard library only, as ``packages`` is."""

import os
import shlex
import shutil
import sys

from data_loaders.secrets import scrub

USER_ERROR = 2  # exit code after a mistake of the user's


def note(text: str) -> None:
    """A line on stderr, above the progress bar where one is drawn."""
    bars = sys.modules.get("tqdm")  # not imported: no bar
    if hasattr(bars, "tqdm"):
        bars.tqdm.write(text, file=sys.stderr, nolock=True)  # without the lock: a thread that hangs may hold it
    else:
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    note(f"warning: {text}")


def fail(error: object, code: int = USER_ERROR) -> int:
    """Prints an error, without secrets; returns the exit code."""
    note(f"error: {scrub(str(error))}")
    return code


def program() -> str:
    """``clicktrainer`` as a shell in this folder finds it: that of this environment, by name where it is on PATH."""
    ours = os.path.join(sys.prefix, "bin", "clicktrainer")
    found = shutil.which("clicktrainer")
    if found and os.path.realpath(found) == os.path.realpath(ours):
        return "clicktrainer"
    return shlex.quote(min(ours, os.path.relpath(ours), key=len))


def one_line(text: object, longest: int | None = None) -> str:
    """An error, or any other text, in one line; of a longer one the first ``longest`` characters."""
    line = " ".join(str(text).split())
    return line if longest is None or len(line) <= longest else f"{line[:longest]}…"
