"""Evaluates a trained run on any data: ``clicktrainer evaluate RUN [--split test] [overrides]``.

Overrides change the recorded configuration: ``data.root=… data.test=[other.parquet] evaluation.batch_size=65536
evaluation.group_by=user_id 'evaluation.slices=[device]'`` (docs/metrics.md).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from torch.distributed.elastic.multiprocessing.errors import record

from data_loaders.output_files import check_output
from data_loaders.state_files import json_text, read_json, write_json
from trainer.config import arguments
from trainer.config.data import DataConfig
from trainer.run import build
from trainer.run.evaluator import evaluate
from trainer.run.item_facts import item_facts
from trainer.run.load import LoadedRun, open_run
from trainer.runtime.cpu import start_again_with_variables
from trainer.runtime.process import guarded, results_alone_on_stdout
from trainer.runtime.run_folder import METRICS


@record
def main(argv: Sequence[str] | None = None) -> None:
    options = arguments.evaluate_alone().parse_intermixed_args(argv)
    report = results_alone_on_stdout()
    guarded(lambda: run(options, report))


def is_result(path: Path) -> bool:
    """Whether a file is an output of this command, and not a run's own ``metrics.json``."""
    found = read_json(path, {}, quiet=True)
    return path.name != METRICS and len(found) == 1 and set(found) <= set(arguments.SPLITS)


def run(options: argparse.Namespace, report: TextIO) -> None:
    if options.output:
        check_output("--output", options.output, [".json"], is_result)
    with open_run(options.run, options.checkpoint, options.overrides) as trained:
        values = metrics_of(trained, trained.config.data, options.split)
        if trained.ranks.is_first:
            report.write(json_text({"checkpoint": str(trained.checkpoint), "split": options.split, **values}))
            report.flush()
            if options.output:
                write_json(options.output, {options.split: values})


def metrics_of(trained: LoadedRun, data: DataConfig, split: str) -> dict[str, Any]:
    """Of the rows of ``data.<split>``; the same on all ranks. Raises ``UserError``."""
    config, ranks = trained.config, trained.ranks
    manifest = build.scan(data, split, trained.layout)
    batch_size = config.evaluation.batch_size or config.batch_size
    loader = build.build_ordered_loader(
        manifest, data.schema, trained.layout, batch_size, data.stream, ranks, group_by=config.evaluation.columns
    )
    items = item_facts(config.evaluation.qualities, trained, manifest)
    return evaluate(trained.built.pipeline, loader, config.evaluation, ranks, items=items)


if __name__ == "__main__":
    start_again_with_variables()
    main()
