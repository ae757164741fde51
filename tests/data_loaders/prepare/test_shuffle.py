"""``order.shuffle``: each split's rows in a random order that depends on data and seed alone, and files that say so."""

import random
from collections import Counter

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders.manifest import Manifest
from data_loaders.prepare import compose, number_hash, writer
from data_loaders.prepare.pipeline import Options, prepare
from data_loaders.prepare.progress import Progress
from tests.data_loaders.prepare.conftest import MISSING

ROWS = 3000
RECIPE = """
name: shuffled
sources:
  log: {files: ["*.csv"], format: csv, columns: {number: int64, user: string, tags: string, label: int8}}
examples: {start: log, steps: [{select: {tags: "string_split(tags, '|')"}}]}
split: {time: {column: number, valid: 2000, test: 2500}}
order: {shuffle: true}
keep: [number]
schema:
  label: label
  embedding_dim: 4
  tables: {user: {vocabulary: {}}, tag: {vocabulary: {}}}
  features:
    user: {kind: sparse, table: user}
    tags: {kind: sparse, table: tag, max_length: 3}
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    for part in range(2):
        lines = (f"{i},u{i % 17},{'|'.join(f't{t}' for t in range(i % 3))},{i % 2}" for i in range(part, ROWS, 2))
        (folder / f"{part}.csv").write_text("\n".join(["number,user,tags,label", *lines, ""]))
    (folder / "shuffled.yaml").write_text(RECIPE)
    return folder


SPLITS = ("train", "valid", "test")


def made(raw, output, *overrides, **options):
    prepare(
        compose.load(str(raw / "shuffled.yaml"), overrides), Options(str(raw), output, **options), Progress(quiet=True)
    )
    return {split: pa.concat_tables(map(pq.read_table, sorted((output / split).iterdir()))) for split in SPLITS}


def scan(output):
    return Manifest.scan(list(SPLITS), str(output), ["label"])


def test_rows_are_shuffled_within_their_split_and_whole(raw, tmp_path):
    found, plain = made(raw, tmp_path / "a"), made(raw, tmp_path / "b", "order.shuffle=false")
    for (first, stop), split in zip(((0, 2000), (2000, 2500), (2500, ROWS)), SPLITS):
        numbers = found[split]["number"].to_pylist()
        assert sorted(numbers) == list(range(first, stop)) != numbers
        assert sum(abs(a - b) == 2 for a, b in zip(numbers, numbers[1:])) < 0.02 * len(numbers)
        assert found[split].sort_by("number").equals(plain[split].sort_by("number"))
    assert scan(tmp_path / "a").is_shuffled and not scan(tmp_path / "b").is_shuffled


def test_the_order_depends_on_data_and_seed_alone(raw, tmp_path, monkeypatch):
    found = made(raw, tmp_path / "a")
    monkeypatch.setattr("data_loaders.prepare.duckdb_engine._CHUNK_SHARE", 1e-5)  # many chunks, many parts
    assert made(raw, tmp_path / "b", threads=1) == found
    other = made(raw, tmp_path / "c", "order.seed=7")
    assert other["train"]["number"].to_pylist() != found["train"]["number"].to_pylist()


def test_spark_writes_the_same_rows(raw, tmp_path, request):
    for reason, missing in MISSING.items():
        if missing():
            pytest.skip(f"engine=spark: {reason}")
    request.getfixturevalue("spark_session")
    found = made(raw, tmp_path / "a", engine="spark")
    assert found == made(raw, tmp_path / "b")
    assert scan(tmp_path / "a").is_shuffled


def test_rows_are_sorted_out_of_core(tmp_path):
    draw = random.Random(0)
    rows = [(draw.randrange(100), draw.randrange(3), number) for number in range(2000)]
    columns = dict(zip(("key", "tie", "value"), map(list, zip(*rows))))
    batches = pa.table(columns).to_batches(max_chunksize=130)
    for parts in (1, 7, 150):
        found = pa.Table.from_batches(writer.sorted_apart(batches, ["key", "tie", "value"], 100, parts, tmp_path))
        assert list(zip(*found.to_pydict().values())) == sorted(rows)
        assert not list(tmp_path.iterdir())
    assert list(writer.sorted_apart([], ["key"], 100, 3, tmp_path)) == []


def test_parts_are_of_one_size():
    rows = ibis.memtable({"__row": list(range(40_000)), "__part": [0] * 40_000})
    drawn = ibis.duckdb.connect().to_pyarrow(number_hash.of_row(rows, 2024).name("x")).to_numpy()
    assert drawn.min() >= 0 and drawn.max() < number_hash.BOUND
    counts = Counter((drawn * 8 // number_hash.BOUND).tolist())
    assert len(counts) == 8 and all(abs(count - 5000) < 6 * 5000**0.5 for count in counts.values())
