"""Day by day against beginning anew: MovieLens-1M in slices of time, each slice scored before anything has seen it.

    python -m bench.incremental [--data ../shared/data/raw] [--slices 10] [--model deepfm] [overrides]

Three models are asked for each slice's AUC: one that has gone on from slice to slice (``launch.incremental``), one trained from
scratch on all slices before it, and one trained from scratch on the last slice alone. All of it goes through
``launch.incremental``: a model from scratch is one whose first day is what it is trained on, its second day the slice.
The ratings have no time of their own, only the last time of each user, so a user's ratings lie in that user's slices.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import duckdb

from bench.train import machine
from trainer.run_folder import write_json

SIDES = ("daily", "all so far", "last only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/raw"))
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--model", default="deepfm")
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary folder")
    parser.add_argument("--output", type=Path, default=Path("bench/results/incremental.json"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-incremental-", dir=options.folder))
    try:
        result = measure(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result |= {"command": " ".join(["python -m bench.incremental", *sys.argv[1:]]), "machine": machine()}
    write_json(options.output, result)
    print(json.dumps(result["mean"], indent=2))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    slices = cut(options.data, folder / "slices", options.slices)
    daily = days(options, folder, "daily", slices)
    rows = []
    for number in range(1, len(slices)):
        together = gathered(slices[:number], folder / "together" / f"to-{number:02}")
        found = {
            "daily": (daily[number]["before_auc"], daily[number - 1]["seconds"]),
            "all so far": scratch(options, folder, together, slices[number]),
            "last only": scratch(options, folder, slices[number - 1], slices[number]),
        }
        rows.append(
            {"slice": slices[number].name, **{side: {"auc": a, "seconds": s} for side, (a, s) in found.items()}}
        )
        print(rows[-1], flush=True)
    mean = {
        side: {key: round(statistics.mean(row[side][key] for row in rows), 4) for key in ("auc", "seconds")}
        for side in SIDES
    }
    return {"mean": mean, "slices": rows, "model": options.model}


def cut(data: Path, folder: Path, slices: int) -> list[Path]:
    """Ratings in order of time, in folders of equal size."""
    connection = duckdb.connect()
    connection.execute(
        f"CREATE TABLE ratings AS SELECT r.*, ntile({slices}) OVER (ORDER BY last_timestamp, user_id, seq_pos) AS slice "
        f"FROM '{data}/ml1m.parquet' r JOIN '{data}/ml1m_user_last_timestamp.parquet' USING (user_id)"
    )
    paths = [folder / f"slice-{number:02}" for number in range(1, slices + 1)]
    for number, path in enumerate(paths, 1):
        path.mkdir(parents=True)
        chosen = f"SELECT * EXCLUDE (slice) FROM ratings WHERE slice = {number} ORDER BY user_id, seq_pos"
        connection.execute(f"COPY ({chosen}) TO '{path}/{path.name}.parquet'")
    return paths


def gathered(slices: list[Path], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path in slices:
        os.link(path / f"{path.name}.parquet", folder / f"{path.name}.parquet")
    return folder


def scratch(options: argparse.Namespace, folder: Path, seen: Path, asked: Path) -> tuple[float, float]:
    """AUC on ``asked`` of a model trained on ``seen`` alone, and the seconds that preparing and training ``seen`` took."""
    first, second = days(options, folder, f"{seen.name}-then-{asked.name}", [seen, asked])
    return second["before_auc"], first["seconds"]


def days(options: argparse.Namespace, folder: Path, name: str, paths: list[Path]) -> list[dict[str, Any]]:
    output = folder / "outputs" / name
    listed = ",".join(str(path.relative_to(folder)) for path in paths)
    own = [f"output={output}", f"data.root={folder}", f"data.days=[{listed}]", "recipe=ml1m_raw"]
    settings = ["prepare.sources.ratings.files=['*.parquet']", f"model={options.model}", *options.overrides]
    with open(folder / "log", "a") as log:
        command = [sys.executable, "-m", "launch.incremental", *own, *settings]
        subprocess.run(command, stdout=log, stderr=log, check=True)
    rows = json.loads((output / "report.json").read_text())
    shutil.rmtree(output)
    return rows


if __name__ == "__main__":
    main()
