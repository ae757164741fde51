"""Test AUC and log loss of experiments over seeds: the rows of docs/results.md.

    python -m bench.quality --data-root ../shared/data [--experiments deepfm_ml1m …] [--seeds 1 2 3] [overrides]

Each run is one `python -m launch.run experiment=… seed=…` on two ranks; results go to bench/results/quality.json, a run that is
there already is not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.train import machine

PUBLISHED = (
    "wide_deep_criteo39",
    "deepfm_criteo39",
    "wide_deep_ml1m",
    "deepfm_ml1m",
    "din_ml1m",
    "wide_deep_trivago",
    "deepfm_trivago",
    "din_trivago",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--experiments", nargs="+", default=list(PUBLISHED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--nproc-per-node", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("bench/results/quality.json"))
    options = parser.parse_intermixed_args()
    results = json.loads(options.output.read_text()) if options.output.exists() else {"machine": machine(), "runs": {}}
    for experiment in options.experiments:
        for seed in options.seeds:
            name = " ".join([f"experiment={experiment}", f"seed={seed}", *options.overrides])
            if name not in results["runs"]:
                results["runs"][name] = run(name.split(), options.data_root, options.nproc_per_node)
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(results, indent=2) + "\n")
        print(
            row(experiment, [r for n, r in results["runs"].items() if n.startswith(f"experiment={experiment} ")]),
            flush=True,
        )


def run(overrides: list[str], data_root: str, num_ranks: int) -> dict[str, Any]:
    """Final metrics of one run; raises ``RuntimeError`` with the program's own words when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch.run", "--nproc-per-node", str(num_ranks), *overrides]
        done = subprocess.run(
            [*command, f"data.root={data_root}", f"run.dir={folder}/run"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        final = json.loads((Path(folder) / "run" / "metrics.json").read_text())
    test = {key: final["test"][key] for key in ("auc", "logloss", "ne", "calibration")}
    train = {
        key: final["train"][key]
        for key in ("samples_per_second", "peak_memory_mb", "input_wait_fraction", "rows_trained")
    }
    return {"valid_auc": final["valid"]["auc"], **test, **train}


def row(experiment: str, runs: list[dict[str, Any]]) -> str:
    """One line of the table: mean ± standard deviation over seeds."""

    def shown(key: str, digits: int) -> str:
        values = [r[key] for r in runs]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    speed = statistics.median(r["samples_per_second"] for r in runs)
    memory = max(r["peak_memory_mb"]["host"] for r in runs)
    quality = " | ".join((shown("auc", 4), shown("logloss", 4), shown("calibration", 3)))
    return f"| `{experiment}` | {quality} | {speed:,.0f} | {memory:,} |"


if __name__ == "__main__":
    main()
