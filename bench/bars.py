"""Published results of the BARS benchmark, and whether a run reproduced one: `list`, or `check RUN [data=DIR]`.

``check`` compares the run folder's metrics on test with what is published for its model and data set, and whether its data are
those: rows, values with an embedding and, with ``data=`` (the folder of the raw files), their md5. What is published:
``conf/bars.yaml``. Exit code: 0 reproduced, 1 not, 2 a mistake in the command.
"""

import argparse
import hashlib
import importlib.resources
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_loaders import safe_yaml
from trainer.report.run_record import RunRecord
from trainer.runtime.run_folder import METRICS as METRICS_FILE

METRICS = ("gauc", "auc", "logloss")
SPLITS = ("valid", "test")  # of train metrics.json has the rows trained in all epochs, not how many there are
# The difference that papers of the field call one; runs that differ by seed alone may differ by more.
LEAST_TOLERANCE = 0.001
DEVIATIONS = 3
SCALE = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
RESERVED_ROWS = 2  # of a prepared table, for missing and for unknown values
CHUNK = 1 << 22


@dataclass(frozen=True)
class Published:
    """A metric on test: one value a run."""

    runs: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.runs)

    @property
    def deviation(self) -> float | None:
        """As BARS gives it: of the runs themselves, not an estimate for more of them. None for a single run."""
        return statistics.pstdev(self.runs) if len(self.runs) > 1 else None

    @property
    def tolerance(self) -> float:
        return max(LEAST_TOLERANCE, DEVIATIONS * (self.deviation or 0.0))

    def __str__(self) -> str:
        return f"{self.mean:.6f}" + (f" ± {self.deviation:.6f}" if self.deviation is not None else "")


@dataclass(frozen=True)
class Line:
    """One comparison: what, published, the run's, and what follows."""

    columns: tuple[str, str, str, str]
    agrees: bool


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bars", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what is published")
    check_parser = commands.add_parser("check", help="whether a run reproduced it")
    check_parser.add_argument("run", help="the folder of a finished run")
    check_parser.add_argument("data", nargs="?", help="data=DIR: the raw files' folder, to compare their md5")
    options = parser.parse_args(argv)
    try:
        if options.command == "list":
            return show_list(known())
        return check(Path(options.run).expanduser(), _data_folder(options.data))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def known() -> dict[str, Any]:
    """``conf/bars.yaml``."""
    return safe_yaml.parse((importlib.resources.files("conf") / "bars.yaml").read_text(), "conf/bars.yaml")


def metrics_of(result: Mapping[str, Any]) -> dict[str, Published]:
    return {name: Published(tuple(result[name])) for name in METRICS if name in result}


def show_list(bars: Mapping[str, Any]) -> int:
    rows = [("experiment", *METRICS, "runs")]
    for name, result in bars["results"].items():
        metrics = metrics_of(result)
        runs = str(len(next(iter(metrics.values())).runs))
        rows.append((f"bars/{name}", *(str(metrics.get(metric, "")) for metric in METRICS), runs))
    print("\n".join(aligned(rows)))
    return 0


def check(run: Path, raw: Path | None) -> int:
    """Prints the comparison. Raises ``ValueError`` for a folder that is no finished run of a published experiment, and for a
    metric it lacks; ``OSError`` for a raw file that cannot be read."""
    record = RunRecord(run)
    config, metrics = record.config, record.final
    bars = known()
    name = f"{config['model']['name']}_{config['data']['name']}"
    if name not in bars["results"]:
        raise ValueError(f"{run} is a run of {name}, for which nothing is published: {', '.join(bars['results'])}")
    result, data = bars["results"][name], bars["data"][config["data"]["name"]]
    lines = [*compare_metrics(metrics_of(result), metrics, run), *compare_data(data, config, metrics)]
    if raw is not None:
        lines += compare_files(data["md5"], raw)
    print(f"{name}: {result['source']}")
    print("\n".join(aligned([("", "published", "this run", ""), *(line.columns for line in lines)])))
    if result.get("note"):
        print(f"note: {result['note']}")
    reproduced = all(line.agrees for line in lines)
    print("reproduced" if reproduced else "not reproduced")
    return 0 if reproduced else 1


def compare_metrics(published: Mapping[str, Published], metrics: Mapping[str, Any], run: Path) -> Iterator[Line]:
    for name, expected in published.items():
        found = metrics.get("test", {}).get(name)
        if found is None:
            remedy = "set evaluation.group_by" if name == "gauc" else "evaluate it on data.test"
            raise ValueError(f"{run / METRICS_FILE} has no {name} of test: {remedy}")
        difference = found - expected.mean
        agrees = abs(difference) <= expected.tolerance
        within = f"within {expected.tolerance:.4f}" if agrees else f"NOT within {expected.tolerance:.4f}"
        text = f"{difference:+.6f}: {within} ({smallest(abs(difference))})"
        yield Line((name, str(expected), f"{found:.6f}", text), agrees)


def smallest(difference: float) -> str:
    """The finest tolerance of ``SCALE`` that would do."""
    found = next((step for step in SCALE if difference <= step), None)
    return f"the smallest: {found:g}" if found else f"more than {SCALE[-1]:g} off"


def compare_data(data: Mapping[str, Any], config: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[Line]:
    """Rows of each split, and values with an embedding: more or fewer mean other files, or another recipe."""
    for split in SPLITS:
        if split in data["rows"] and split in metrics:
            yield _equal(f"rows of {split}", data["rows"][split], metrics[split]["rows"])
    tables = config["data"]["schema"]["tables"]
    found = {name: table["num_embeddings"] - RESERVED_ROWS for name, table in tables.items()}
    found["all"] = sum(found.values())
    for name, expected in data["values"].items():
        if name not in found:
            raise ValueError(f"the run's data have no table {name}: prepare them with recipe {config['data']['name']}")
        yield _equal(f"values of {name}", expected, found[name])


def compare_files(md5: Mapping[str, str], folder: Path) -> Iterator[Line]:
    for name, expected in md5.items():
        found = md5_of(folder / name)
        yield Line(
            (f"md5 of {name}", expected, found, "as published" if found == expected else "NOT as published"),
            found == expected,
        )


def md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _equal(what: str, expected: int, found: int) -> Line:
    verdict = "as published" if found == expected else "NOT as published"
    return Line((what, f"{expected:,}", f"{found:,}", verdict), found == expected)


def _data_folder(argument: str | None) -> Path | None:
    if argument is None:
        return None
    key, _, value = argument.partition("=")
    if key != "data" or not value:
        raise ValueError(f"{argument!r} is not known: give the raw files' folder as data=DIR")
    return Path(value).expanduser()


if __name__ == "__main__":
    sys.exit(main())
