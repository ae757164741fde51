"""Test metrics of experiments over seeds beside the best of other libraries: the rows of docs/results.md.

    python -m bench.quality --data-root DIR [--experiments deepfm_ml1m …] [--seeds 1 2 3] [--nproc-per-node 1] […]

Each run is one `clicktrainer train experiment=… seed=…`, on two ranks by default; results go to
bench/results/quality.json, a run that is there already is not repeated.
"""

import statistics
from functools import partial
from typing import Any

from bench import harness

# The best mean of the libraries compared on the same splits: AUC, gAUC by user, log loss. Without: for the order of models.
PEERS: dict[str, tuple[float, float | None, float] | None] = {
    "wide_deep_criteo39": (0.7400, None, 0.4996),
    "deepfm_criteo39": (0.7382, None, 0.4908),
    "wide_deep_ml1m": (0.8110, 0.7353, 0.5318),
    "deepfm_ml1m": (0.8115, 0.7356, 0.5310),
    "din_ml1m": (0.7984, 0.7120, 0.5449),
    "wide_deep_trivago": (0.7570, 0.7519, 0.1568),
    "deepfm_trivago": (0.7581, 0.7521, 0.1557),
    "din_trivago": (0.7667, 0.7584, 0.1557),
    "lr_criteo39": None,
    "fm_criteo39": None,
    "lr_ml1m": None,
    "fm_ml1m": None,
    "embedding_mlp_ml1m": None,
    "lr_trivago": None,
    "fm_trivago": None,
    "embedding_mlp_trivago": None,
}


def main() -> None:
    parser = harness.parser(__doc__, "quality.json", overrides=True)
    parser.add_argument("--data-root", help="the folder of the experiments' data")
    parser.add_argument("--config-dir", help="a folder with configuration of one's own, such as prepared data")
    parser.add_argument("--experiments", nargs="+", default=list(PEERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--nproc-per-node", type=int, default=2)
    options = parser.parse_intermixed_args()
    root = harness.data_root(options.data_root, "the experiments' data")
    places = [*(["--config-dir", options.config_dir] if options.config_dir else []), f"data.root={root}"]
    for experiment in options.experiments:
        runs = []
        for seed in options.seeds:
            overrides = [f"experiment={experiment}", f"seed={seed}", *options.overrides]
            make = partial(run, [*places, *overrides], options.nproc_per_node)
            runs.append(harness.once(options.output, "runs", named(overrides, options.nproc_per_node), make))
        print(row(experiment, runs), flush=True)


def named(overrides: list[str], num_ranks: int) -> str:
    """The key of a run in the results."""
    return " ".join(overrides if num_ranks == 2 else [*overrides, f"on {num_ranks} rank{'s' * (num_ranks != 1)}"])


def run(arguments: list[str], num_ranks: int) -> dict[str, Any]:
    final = harness.trained(arguments, num_ranks)
    test = {key: final["test"].get(key) for key in ("auc", "gauc", "logloss", "ne", "calibration", "ece")}
    valid = {"valid_auc": final["valid"]["auc"], "valid_gauc": final["valid"].get("gauc")}
    return {**valid, **test, "rows_trained": final["train"]["rows_trained"]}


def row(experiment: str, runs: list[dict[str, Any]]) -> str:
    """One line of the table: mean ± standard deviation over seeds, and the peers' best mean."""

    def shown(key: str, digits: int) -> str:
        values = [r[key] for r in runs]
        if None in values:
            return "–"
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    peers = PEERS.get(experiment)
    best = "" if peers is None else ", ".join("–" if value is None else f"{value:.4f}" for value in peers)
    quality = " | ".join((shown("auc", 4), shown("gauc", 4), shown("logloss", 4), shown("calibration", 3)))
    return f"| `{experiment}` | {quality} | {best} |"


if __name__ == "__main__":
    main()
