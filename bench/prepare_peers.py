"""What ``bench.prepare`` compares with: each a command of its own, ``python -m bench.prepare_peers NAME INPUT OUTPUT``.

All but the scans do the same work on a Criteo log: numbers discretised by log², values seen at least ten times numbered by
frequency, ids written as Parquet. Each writes OUTPUT/answer.json: rows, the seconds of its work (without the start of the
process), its versions, and how many values each of C1 … C26 kept, which must be the same for all.

FuxiCTR needs a file with a header, which ``bench.prepare`` makes before the clock starts. It calls Polars as versions below
2 want to be called.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.prepare_logs import CATEGORIES, CRITEO_COLUMNS, EVENT_COLUMNS, LABEL, NUMBERS

REQUIREMENTS = ("fuxictr==2.3.10", "polars==1.44.2", "ray==2.60.0", "pandas==3.1.1")
MIN_COUNT = 10
ROW_GROUP = 131_072
MISSING, UNKNOWN, FIRST = 0, 1, 2
ANSWER = "answer.json"

Answer = dict[str, Any]

# Libraries are imported inside: each command has its own.


def scan_criteo(path: Path, _: Path) -> Answer:
    columns = ", ".join(f"'{name}': '{kind}'" for name, kind in CRITEO_COLUMNS.items())
    return scan(f"read_csv('{path}', delim = '\t', header = false, quote = '', escape = '', columns = {{{columns}}})")


def scan_events(path: Path, _: Path) -> Answer:
    columns = ", ".join(f"'{name}': '{kind}'" for name, kind in EVENT_COLUMNS.items())
    return scan(f"read_csv('{path}', header = true, columns = {{{columns}}})")


def scan(source: str) -> Answer:
    """The least that reading all of a file costs: every field parsed, its largest value kept."""
    import duckdb

    began = time.perf_counter()
    with duckdb.connect(config={"memory_limit": "4GB", "threads": 2}) as connection:
        names = [name for name, *_ in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()]
        chosen = ", ".join(f'max("{name}")' for name in names)
        rows = connection.execute(f"SELECT count(*), {chosen} FROM {source}").fetchone()[0]
    return {"rows": rows, "seconds": time.perf_counter() - began, "versions": {"duckdb": version("duckdb")}}


def with_pandas(path: Path, output: Path) -> Answer:
    """What one writes by hand: the file in memory, a column at a time counted, mapped and written."""
    import numpy as np
    import pandas

    began = time.perf_counter()
    types = dict.fromkeys(CATEGORIES, "str")
    frame = pandas.read_csv(path, sep="\t", header=None, names=list(CRITEO_COLUMNS), dtype=types)
    kept = {}
    for name in (*NUMBERS, *CATEGORIES):
        column = frame[name]
        if name in NUMBERS:
            values = column.to_numpy(dtype=np.float64)
            logs = np.floor(np.log(np.maximum(values, 1)) ** 2)
            column = pandas.Series(np.where(values > 2, 2 + logs, values))
        counts = column.value_counts()
        frequent = counts.index[counts >= MIN_COUNT]
        ids = column.map(pandas.Series(np.arange(FIRST, FIRST + len(frequent)), index=frequent))
        frame[name] = ids.mask(ids.isna() & column.notna(), UNKNOWN).fillna(MISSING).astype(np.int32)
        kept[name] = len(frequent)
    frame.to_parquet(output / "train.parquet", index=False, row_group_size=ROW_GROUP)
    return {
        "rows": len(frame),
        "seconds": time.perf_counter() - began,
        "versions": {"pandas": pandas.__version__},
        "values": {name: kept[name] for name in CATEGORIES},
    }


def fuxictr(path: Path, output: Path) -> Answer:
    """FuxiCTR's Criteo processor with the settings of its Criteo_x4 benchmark, called as its run_expid.py does. It begins
    Ray where that is not running; begun here, it has no dashboard and stays off the network."""
    import ray
    from fuxictr.datasets.criteo import CustomizedFeatureProcessor
    from fuxictr.preprocess import build_dataset

    ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="ERROR")
    began = time.perf_counter()
    numbers = {"dtype": "float", "preprocess": "convert_to_bucket", "fill_na": 0}
    columns = [{"name": list(NUMBERS), **numbers}, {"name": list(CATEGORIES), "dtype": "str", "fill_na": ""}]
    processor = CustomizedFeatureProcessor(
        feature_cols=[{"active": True, "type": "categorical", **column} for column in columns],
        label_col={"name": LABEL, "dtype": "float"},
        dataset_id="criteo",
        data_root=str(output),
    )
    build_dataset(processor, train_data=str(path), sep="\t", min_categr_count=MIN_COUNT)
    seconds = time.perf_counter() - began
    import pyarrow.parquet as pq

    reserved = 2  # the padding's id and that of values outside the vocabulary
    sizes = {name: processor.feature_map.features[name]["vocab_size"] - reserved for name in CATEGORIES}
    return {
        "rows": pq.read_metadata(output / "criteo" / "train.parquet").num_rows,
        "seconds": seconds,
        "versions": {package: version(package) for package in ("fuxictr", "polars", "ray")},
        "values": sizes,
    }


PEERS: dict[str, Callable[[Path, Path], Answer]] = {
    "scan-criteo": scan_criteo,
    "scan-events": scan_events,
    "pandas": with_pandas,
    "fuxictr": fuxictr,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(PEERS))
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    answer = PEERS[options.name](options.input.absolute(), options.output.absolute())
    (options.output / ANSWER).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
