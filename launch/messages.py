"""Where launch/ prints: results on stdout, all else on stderr."""

import sys

from rich.console import Console
from rich.table import Table

from data_loaders.secrets import scrub

USER_ERROR = 2
WIDTH = 160  # of a table that is not written to a terminal


def result(text: str) -> int:
    """Returns the exit code 0."""
    print(text, flush=True)
    return 0


def show(table: Table) -> None:
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def explain(error: object) -> int:
    """One line on a mistake of the user's; returns its exit code."""
    say(f"error: {scrub(str(error))}")
    return USER_ERROR
