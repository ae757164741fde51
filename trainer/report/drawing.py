"""Draws a report; Bokeh, which takes a second to import, only then."""

import sys
from pathlib import Path

from data_loaders import packages

NAME = "report.html"
GENERATOR = b"trainer.report"  # a page says so, and is replaced by another one


def draw(folder: Path, output: Path) -> None:
    """Of the run in ``folder`` into the file ``output``. Raises ``ValueError`` for what is no run folder, and without a package
    that a report needs."""
    try:
        from trainer.report import page
    except ImportError as error:
        raise ValueError(f"no report: {packages.explanation(error) or error}") from None
    page.write(folder, output)


def draw_or_warn(folder: Path) -> None:
    """At a run's end: what goes wrong here is no reason to fail it."""
    try:
        draw(folder, folder / NAME)
    except Exception as error:  # noqa: BLE001 - whatever it is, the model is trained
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(
            f"warning: {folder / NAME} was not drawn ({reason}): python -m trainer.report {folder}",
            file=sys.stderr,
            flush=True,
        )
