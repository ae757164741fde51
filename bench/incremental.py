"""Incremental training against training from scratch: slices of time, each scored before it is trained.

    python -m bench.incremental [--data drifting|ml1m] [--data-root DIR] [--slices 10] [--model deepfm] [overrides]

Three models score each slice: one trained from slice to slice (``clicktrainer incremental``), one trained from
scratch on all slices before it, and one trained from scratch on the last slice alone. All of it goes through
``clicktrainer incremental``: a model from scratch is one whose first day is what it is trained on, its second day the slice.
The cost of a side is in rows trained and in seconds (preparing included).

``ml1m`` is MovieLens-1M. Its ratings have no time of their own, only the last time of each user, so a user's ratings lie in
that user's slice or its neighbour: nearly all users of a slice are new. ``drifting`` is ``bench.drifting``.
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

from bench import harness
from bench.drifting import RECIPE, make_days

SIDES = ("daily", "all so far", "last only")


def main() -> None:
    parser = harness.parser(__doc__, "incremental_<data>.json", overrides=True)
    parser.add_argument("--data", choices=("ml1m", "drifting"), default="drifting")
    parser.add_argument(
        "--data-root", help="of ml1m: the folder with ml1m.parquet and ml1m_user_last_timestamp.parquet"
    )
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--model", default="deepfm")
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-incremental-", dir=options.folder) as folder:
        result = measure(options, Path(folder))
    harness.record(Path(str(options.output).replace("<data>", options.data)), result)
    print(json.dumps(result["mean"], indent=2))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    best = None
    if options.data == "ml1m":
        raw = harness.data_root(options.data_root, "ml1m.parquet and ml1m_user_last_timestamp.parquet")
        slices = cut(Path(raw), folder / "slices", options.slices)
    else:
        slices, best = make_days(folder / "slices", options.slices)
        (folder / "drifting.yaml").write_text(RECIPE)
    daily = days(options, folder, "daily", slices)
    rows = []
    for number in range(1, len(slices)):
        together = gathered(slices[:number], folder / "together" / f"to-{number:02}")
        found = {
            "daily": found_by(daily[number - 1], daily[number]),
            "all so far": found_by(*days(options, folder, f"all-{number}", [together, slices[number]])),
            "last only": found_by(*days(options, folder, f"last-{number}", [slices[number - 1], slices[number]])),
        }
        rows.append({"slice": slices[number].name, **({"best": round(best[number], 4)} if best else {}), **found})
        print(rows[-1], flush=True)
    keys = ("auc", "trained_rows", "seconds")
    mean = {side: {key: round(statistics.mean(row[side][key] for row in rows), 4) for key in keys} for side in SIDES}
    return {"mean": mean, "slices": rows, "model": options.model}


def found_by(trained: dict[str, Any], asked: dict[str, Any]) -> dict[str, float]:
    """AUC on the slice ``asked`` before it is trained, and what it took to train what went before."""
    cost = {key: trained[key] for key in ("trained_rows", "seconds")}
    return {"auc": round(asked["before_auc"], 4), **cost}


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
        for file in path.glob("*.parquet"):
            os.link(file, folder / f"{path.name}-{file.name}")
    return folder


def days(options: argparse.Namespace, folder: Path, name: str, paths: list[Path]) -> list[dict[str, Any]]:
    output = folder / "outputs" / name
    listed = ",".join(str(path.relative_to(folder)) for path in paths)
    own = [f"output={output}", f"data.root={folder}", f"data.days=[{listed}]", f"model={options.model}"]
    if options.data == "ml1m":
        settings = ["recipe=ml1m_raw", "prepare.sources.ratings.files=['*.parquet']", *options.overrides]
    else:
        settings = [f"recipe={folder / 'drifting.yaml'}", *options.overrides]
    with open(folder / "log", "a") as log:
        command = [sys.executable, "-m", "launch.incremental", *own, *settings]
        subprocess.run(command, stdout=log, stderr=log, check=True)
    rows = json.loads((output / "report.json").read_text())
    shutil.rmtree(output)
    return rows


if __name__ == "__main__":
    main()
