"""Runs a recipe and reads back what it made, ids turned into raw values again."""

from collections import Counter
from functools import cached_property
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from data_loaders.prepare import compose
from data_loaders.prepare.declaration import FIRST_ID, MISSING_ID, UNKNOWN_ID, Declaration
from data_loaders.prepare.pipeline import Options, prepare
from data_loaders.prepare.progress import Progress

MISSING, UNKNOWN = None, "<unknown>"


class Made:
    """An output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.declaration = compose.check(yaml.safe_load((folder / "preparation.yaml").read_text()), str(folder))
        self.schema = self.declaration.schema

    def rows(self, split: str, columns: list[str] | None = None) -> list[dict]:
        """Rows with ids, in order."""
        files = sorted((self.folder / split).glob("*.parquet"))
        return [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]

    @cached_property
    def vocabularies(self) -> dict[str, dict]:
        """table -> {id: raw value}"""
        found = {}
        for path in (self.folder / "vocabulary").glob("*.parquet"):
            table = pq.read_table(path).to_pydict()
            found[path.stem] = dict(zip(table["id"], table["value"])) | {MISSING_ID: MISSING, UNKNOWN_ID: UNKNOWN}
        return found

    def counts(self, table: str) -> dict:
        found = pq.read_table(self.folder / "vocabulary" / f"{table}.parquet").to_pydict()
        return dict(zip(found["value"], found["count"]))

    def raw(self, split: str, columns: list[str] | None = None) -> list[dict]:
        """Rows with raw values in the place of ids."""
        return [{name: self._raw(name, value) for name, value in row.items()} for row in self.rows(split, columns)]

    def all_raw(self) -> dict[str, list[dict]]:
        return {split: self.raw(split) for split in ("train", "valid", "test") if (self.folder / split).exists()}

    def _raw(self, name: str, value: object) -> object:
        feature = self.schema.features.get(name)
        if feature is None or not feature.table or feature.table not in self.vocabularies:
            return value
        values = self.vocabularies[feature.table]
        return [values[one] for one in value] if isinstance(value, list) else values[value]


def run(recipe: str | Declaration, input: Path, output: Path, *overrides: str, engine: str = "duckdb") -> Made:
    if output.is_relative_to(input):  # which prepare refuses
        output = input.with_name(f"{input.name}-{output.name}")
    declaration = compose.load(recipe, overrides) if isinstance(recipe, str) else recipe
    options = {"spark.sql.shuffle.partitions": "2"} if engine == "spark" else {}
    prepare(
        declaration,
        Options(str(input), output, engine=engine, memory_limit="1GB", threads=2, engine_options=options),
        Progress(quiet=True),
    )
    return Made(output)


def vocabulary(values: list, min_count: int = 1) -> dict:
    """id -> value as the rule says: most frequent first, ties ascending."""
    counts = Counter(value for value in values if value is not None)
    kept = sorted((value for value in counts if counts[value] >= min_count), key=lambda value: (-counts[value], value))
    return dict(enumerate(kept, FIRST_ID))


def last_split(rows: list[dict], by: str, order: str, valid: float, test: float) -> list[str]:
    """The split of each row, naively. Shares are rounded down."""
    found = [""] * len(rows)
    for key in {row[by] for row in rows}:
        places = sorted((i for i, row in enumerate(rows) if row[by] == key), key=lambda i: (rows[i][order], i))
        sizes = [int(part * len(places)) if 0 < part < 1 else int(part) for part in (valid, test)]
        for place, i in enumerate(reversed(places)):
            found[i] = "test" if place < sizes[1] else "valid" if place < sum(sizes) else "train"
    return found


def history(events: list[dict], by: str, time: str, value: str, key: object, before: object, length: int = 50) -> list:
    """Values of earlier events, oldest first, naively."""
    earlier = [event for event in events if event[by] == key and event[time] < before]
    return [event[value] for event in sorted(earlier, key=lambda event: event[time])][-length:]


def known(values: list, vocabulary_values: set) -> list:
    """Raw values as a decoded row shows them."""
    return [value if value is None or value in vocabulary_values else UNKNOWN for value in values]
