"""Texts of messages, and the one place that prints what is no result. Standard library only, as ``packages`` is."""

import sys


def note(text: str) -> None:
    """A line on stderr, above the progress bar where one is drawn."""
    bars = sys.modules.get("tqdm")  # not imported: no bar
    if hasattr(bars, "tqdm"):
        bars.tqdm.write(text, file=sys.stderr, nolock=True)  # without the lock: a thread that hangs may hold it
    else:
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    note(f"warning: {text}")


def one_line(text: object, longest: int | None = None) -> str:
    """An error, or any other text, in one line; of a longer one the first ``longest`` characters."""
    line = " ".join(str(text).split())
    return line if longest is None or len(line) <= longest else f"{line[:longest]}…"
