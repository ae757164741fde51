"""``clicktrainer export RUN --output EXPORT``: writes a version of ``EXPORT`` and makes it the one to serve, unless it scores
worse than it may. One process; memory: one slab of a table."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_loaders.errors import UserError
from trainer.checkpoint import verify
from trainer.config import arguments
from trainer.config.compose import from_yaml
from trainer.export.export import Exported, export
from trainer.run.load import find_checkpoint
from trainer.runtime import run_folder
from trainer.runtime.process import guarded
from trainer.serve.versions import publish


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments.export().parse_intermixed_args(argv)
    guarded(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    composed = from_yaml(options.run / run_folder.CONFIG, options.overrides)
    checkpoint = find_checkpoint(options.run, options.checkpoint, prefer_best=composed.config.checkpoint.restore_best)
    if problem := verify(checkpoint):
        raise UserError(f"checkpoint {checkpoint}: {problem}: choose another with --checkpoint")
    exported = export(composed, options.run, checkpoint, options.output)
    if options.publish:
        publish(options.output, exported.path.name)
    show(exported, options.output, published=options.publish)


def show(exported: Exported, output: Path, *, published: bool) -> None:
    parity, console = exported.parity, Console()
    table = Table(title=f"{exported.path}: {parity.rows:,} rows of {exported.split}", title_justify="left")
    for column in ("tables", "bytes", "AUC", "log loss", "largest difference of a logit"):
        table.add_column(column, justify="left" if column == "tables" else "right")
    for form, size, auc, loss, largest in exported.lines():
        table.add_row(form, f"{size:,}", _shown(auc), _shown(loss), f"{largest:.2g}")
    console.print(table)
    if isinstance(exported.onnx, str):
        console.print(f"No head.onnx: {exported.onnx}", soft_wrap=True)
    if published:
        console.print(f"Serve it: clicktrainer serve {output}", soft_wrap=True)
    else:
        console.print(f"Not published: {output}/current.json names what it named before", soft_wrap=True)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.6f}"


if __name__ == "__main__":
    main()
