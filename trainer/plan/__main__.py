"""``clicktrainer plan model=… data=… topology=8xH100``: the job of ``clicktrainer train``'s arguments, on a cluster that need
not be here. Exit code 0 where it fits, 1 where it does not, 2 for a mistake."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TextIO

import torch
from rich.console import Console

from data_loaders.errors import UserError
from trainer.config import arguments
from trainer.config.compose import compose
from trainer.plan.advice import advice
from trainer.plan.estimate import Planned
from trainer.plan.picture import draw
from trainer.plan.report import as_data, show
from trainer.plan.smallest import check_holdable, smallest_cluster
from trainer.report.drawing import check_page
from trainer.runtime.distributed import make_deterministic
from trainer.runtime.process import guarded, results_alone_on_stdout
from trainer.sharding import planner
from trainer.sharding.hardware import Cluster, parse_cluster

KEY = "topology="


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    results = results_alone_on_stdout() if "--json" in argv else sys.stdout
    guarded(lambda: start(argv, results))


def start(argv: Sequence[str], results: TextIO) -> None:
    """Raises ``UserError`` for mistakes, ``SystemExit`` with 1 where the job does not fit."""
    options, overrides, topology = parse(argv)
    config = compose(overrides).config
    if config.deterministic:
        make_deterministic()  # it leaves out sharding types
    cluster = parse_cluster(topology, planner.measured(torch.device("cpu"), 1))
    cluster = sharing_this_machine(cluster)
    config.check_world_size(cluster.ranks)
    if options.picture is not None:
        check_page("--picture", options.picture)
    job = Planned.of(config, cluster)
    check_holdable(job, cluster)
    estimate = job.estimate(cluster)
    try:
        smallest = smallest_cluster(job, cluster)
    except UserError:
        if estimate.fits:
            raise
        smallest = None
    data = as_data(estimate, smallest, advice(job, estimate, smallest))
    if options.json:
        print(json.dumps(data, indent=1), file=results, flush=True)
    else:
        show(data, Console())
    if options.picture is not None:
        draw(data, options.picture)
    if not estimate.fits:
        raise SystemExit(1)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], str]:
    """Our options, the overrides of the configuration, and the topology. ``data.root`` may be left out: no row is read.
    Raises ``UserError`` without a topology."""
    options = arguments.plan().parse_intermixed_args(list(argv))
    given = [argument.removeprefix(KEY) for argument in options.overrides if argument.startswith(KEY)]
    if not given or not given[-1]:
        raise UserError(
            "topology is missing: give the cluster, such as topology=8xH100, 2x8xH200, 2xCPU or a file .yaml"
        )
    overrides = [argument for argument in options.overrides if not argument.startswith(KEY)]
    if not any(argument.startswith("data.root=") for argument in overrides):
        overrides.append("data.root=.")
    return options, arguments.job_words(options, overrides), given[-1]


def sharing_this_machine(cluster: Cluster) -> Cluster:
    """Ranks on a CPU share what this machine has."""
    if cluster.hardware.device != "cpu":
        return cluster
    here = planner.measured(torch.device("cpu"), cluster.local)
    return Cluster(here, cluster.machines, cluster.local)


if __name__ == "__main__":
    main()
