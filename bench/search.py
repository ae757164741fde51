"""Tries settings of an experiment and ranks them by what they reach on valid; test is never read.

    python -m bench.search --data-root DIR --experiment deepfm_trivago optim.tables.lr=0.02,0.05 batch_size=512,1024

Values separated by commas are tried in all combinations, each once for every ``--seeds``. What was tried, and what came of
it, is kept in bench/results/search.json; a run that is there already is not repeated.
"""

import itertools
import statistics
from functools import partial
from typing import Any

from bench import harness

METRICS = ("auc", "gauc", "logloss")


def main() -> None:
    parser = harness.parser(__doc__, "search.json")
    parser.add_argument("grid", nargs="*", help="key=value,value …")
    parser.add_argument("--data-root", help="the folder of the experiment's data")
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--nproc-per-node", type=int, default=1)
    options = parser.parse_intermixed_args()
    root = harness.data_root(options.data_root, "the experiment's data")
    own = [f"experiment={options.experiment}", f"data.root={root}", "data.test=[]", "checkpoint.every_minutes=null"]
    found, names = {}, []
    for overrides in combinations(options.grid):
        names.append([" ".join([*overrides, f"seed={seed}"]) for seed in options.seeds])
        for seed, name in zip(options.seeds, names[-1]):
            make = partial(run, [*own, *overrides, f"seed={seed}"], options.nproc_per_node)
            found[name] = harness.once(options.output, options.experiment, name, make)
    for line in ranked(found, names):
        print(line, flush=True)


def combinations(grid: list[str]) -> list[tuple[str, ...]]:
    choices = []
    for item in grid:
        key, _, values = item.partition("=")
        listed = [values] if values[:1] in "[{'\"" else values.split(",")
        choices.append([f"{key}={value}" for value in listed])
    return list(itertools.product(*choices))


def run(arguments: list[str], num_ranks: int) -> dict[str, Any]:
    """Metrics of valid, and its AUC from evaluation to evaluation."""
    metrics, curve = harness.trained(arguments, num_ranks)
    found = {key: metrics["valid"][key] for key in METRICS if metrics["valid"].get(key) is not None}
    return {**found, "course": [round(auc, 4) for auc in curve]}


def ranked(known: dict[str, Any], names: list[list[str]]) -> list[str]:
    """A line for each combination, the best mean AUC first."""
    means = [(statistics.mean(known[name]["auc"] for name in group), group) for group in names]
    return [
        f"{mean:.4f} ± {statistics.pstdev(known[n]['auc'] for n in group):.4f}  {group[0].rpartition(' ')[0]}  "
        f"{known[group[0]]}"
        for mean, group in sorted(means, reverse=True)
    ]


if __name__ == "__main__":
    main()
