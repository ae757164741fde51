"""Results, on stdout."""

from rich.console import Console
from rich.table import Table

WIDTH = 160  # of a table that is not written to a terminal


def result(text: str) -> int:
    """Returns the exit code 0."""
    print(text, flush=True)
    return 0


def show(table: Table) -> None:
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)
