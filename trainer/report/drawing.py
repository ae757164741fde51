"""Draws pages; Bokeh, which takes a second to import and may be missing, only then."""

from collections.abc import Mapping
from pathlib import Path

from data_loaders import packages
from data_loaders.errors import UserError
from data_loaders.messages import one_line, program, warn
from data_loaders.output_files import check_output, head_of
from trainer.report.run_record import RunRecord
from trainer.runtime.run_folder import REPORT

GENERATOR = b'content="trainer.report"'  # in the head of a page, which may then be replaced by another one


def check_page(option: str, path: Path) -> None:
    """Raises ``UserError`` unless a page can be written to ``path``, which the user gave by ``option``."""
    check_output(option, path, [".html"], lambda found: GENERATOR in head_of(found))
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}")


def draw(folder: Path, output: Path) -> None:
    """The report of the run in ``folder``. Raises ``UserError`` for what is no run folder, and where a package is missing."""
    try:
        from trainer.report import page
    except ImportError as error:
        raise UserError(f"no report: {packages.explanation(error) or error}") from None
    page.write(folder, output)


def draw_or_warn(folder: Path) -> None:
    """At a run's end: what goes wrong here is no reason to fail it."""
    try:
        draw(folder, folder / REPORT)
    except Exception as error:  # noqa: BLE001 - whatever it is, the model is trained
        reason = f"{type(error).__name__}: {one_line(error)}"
        warn(f"{folder / REPORT} was not drawn ({reason}): {program()} report {folder}")


def draw_comparison(runs: Mapping[str, RunRecord], metric: str, output: Path) -> None:
    """The curves of ``metric`` of several runs, by their names."""
    from trainer.report import curves, template

    template.write_picture(output, f"{metric} by rows trained", curves.comparison(runs, metric))
