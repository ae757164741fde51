"""Tries settings of an experiment and ranks them by what they reach on valid; test is never read.

    python -m bench.search --data-root ../shared/data --experiment deepfm_trivago optim.tables.lr=0.02,0.05 batch_size=512,1024

Values separated by commas are tried in all combinations, each once for every ``--seeds``. What was tried, and what came of
it, is kept in bench/results/search.json; a run that is there already is not repeated.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METRICS = ("auc", "gauc", "logloss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", nargs="*", help="key=value,value …")
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("bench/results/search.json"))
    options = parser.parse_intermixed_args()
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    known = results.setdefault(options.experiment, {})
    names = []
    for overrides in combinations(options.grid):
        for seed in options.seeds:
            name = " ".join([*overrides, f"seed={seed}"])
            if name not in known:
                known[name] = run(options, [*overrides, f"seed={seed}"])
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(results, indent=1) + "\n")
        names.append([" ".join([*overrides, f"seed={seed}"]) for seed in options.seeds])
    for line in ranked(known, names):
        print(line, flush=True)


def combinations(grid: list[str]) -> list[tuple[str, ...]]:
    choices = []
    for item in grid:
        key, _, values = item.partition("=")
        listed = [values] if values[:1] in "[{'\"" else values.split(",")
        choices.append([f"{key}={value}" for value in listed])
    return list(itertools.product(*choices))


def run(options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Metrics of valid; raises ``RuntimeError`` with the program's own words when the run fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch.run", "--nproc-per-node", str(options.nproc_per_node)]
        command += [f"experiment={options.experiment}", *overrides, "data.test=[]"]
        command += [f"data.root={options.data_root}", f"run.dir={folder}/run", "checkpoint.every_minutes=null"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        valid = json.loads((Path(folder) / "run" / "metrics.json").read_text())["valid"]
        evaluations = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    courses = [line for line in map(json.loads, evaluations) if line.get("split") == "valid"]
    course = [round(line["auc"], 4) for line in courses]
    return {**{key: valid[key] for key in METRICS if valid.get(key) is not None}, "course": course}


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
