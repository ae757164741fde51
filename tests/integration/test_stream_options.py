"""Ways of reading, through the program: rows in the order of time, rows left out by a policy, hardly any rows, and more
ranks than shards."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import tiny

ALONE = ("data.valid=[]", "data.test=[]", "data.probability=null", "model=deepfm", "model.hidden_units=[8]")
RECORDED = (*ALONE, "debug.ledger=true", "log_every_steps=1")
IN_TIME = (
    *RECORDED,
    "data.stream.shuffle=false",
    "data.stream.shards=64",
    "batch_size=192",
    "data.stream.shuffle_rows=400",
)
DROP = ("data.schema.on_bad_label=drop", "data.schema.features.item_id.on_out_of_range=drop")
JOBS = {
    "in time, 1 rank": (1, *IN_TIME, "epochs=2"),
    "in time, 3 ranks": (3, *IN_TIME, "epochs=2", "data.stream.threads=2"),
    "policies": (2, *RECORDED, "epochs=2", "data.train=[bad]", *DROP),
    "2 rows": (3, *RECORDED, "epochs=2", "data.train=[two]"),
    "too many ranks": (3, *ALONE, "data.stream.shards=2"),
}


def write_bad(root):
    """``bad/``: the training files, every 17th label null and every 23rd item out of range; the places of those rows."""
    places = set()
    for path in sorted((root / "train").glob("*.parquet")):
        table = pq.read_table(path)
        rows = range(len(table))
        labels = [None if row % 17 == 0 else value for row, value in enumerate(table["label"].to_pylist())]
        items = [10**9 if row % 23 == 0 else value for row, value in enumerate(table["item_id"].to_pylist())]
        for name, values in (("label", labels), ("item_id", items)):
            column = table.schema.names.index(name)
            table = table.set_column(column, name, pa.array(values, table.schema.field(name).type))
        (root / "bad").mkdir(exist_ok=True)
        pq.write_table(table, root / "bad" / path.name, row_group_size=250)
        places |= {(f"bad/{path.name}", row) for row in rows if row % 17 == 0 or row % 23 == 0}
    return places


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    root = tiny.write_log(tmp_path_factory.mktemp("log"))
    (root / "two").mkdir()
    pq.write_table(pq.read_table(root / "valid").slice(0, 2), root / "two" / "part.parquet")
    return root, write_bad(root)


@pytest.fixture(scope="module")
def done(log, tmp_path_factory):
    """Of each job its run folder and how it ended. Two run at a time."""
    folder = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: (folder / str(number), pool.submit(tiny.train, ranks, log[0], folder / str(number), *overrides))
            for number, (name, (ranks, *overrides)) in enumerate(JOBS.items())
        }
        return {name: (run, future.result()) for name, (run, future) in started.items()}


def run_of(done, name):
    run, ended = done[name]
    assert ended.returncode == 0, ended.stderr
    return run


def ledger(run):
    table = pq.read_table(run / "ledger")
    return list(zip(*(table[name].to_pylist() for name in ("step", "epoch", "file", "row", "dropped"))))


def train_lines(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {split: [line for line in lines if line["split"] == split] for split in ("train", "final")}


@pytest.mark.parametrize("name", ["in time, 1 rank", "in time, 3 ranks"])
def test_without_shuffling_steps_take_the_rows_as_they_lie(done, log, name):
    """3000 rows by 192: 16 steps an epoch, on three ranks that share 64 shards unequally."""
    places = [
        (f"train/{path.name}", row)
        for path in sorted((log[0] / "train").glob("*.parquet"))
        for row in range(pq.read_metadata(path).num_rows)
    ]
    found: dict[int, Counter] = {}
    for step, epoch, file, row, dropped in ledger(run_of(done, name)):
        assert epoch == (step - 1) // 16 and not dropped
        found.setdefault(step, Counter())[file, row] += 1
    assert sorted(found) == list(range(1, 33))
    for step, rows in found.items():
        first = (step - 1) % 16 * 192
        assert rows == Counter(places[first : first + 192])


def test_rows_left_out_are_counted_and_named_on_all_ranks(done, log):
    run, (_, bad) = run_of(done, "policies"), log
    entries = ledger(run)
    assert len(entries) == 2 * tiny.ROWS["train"] and len(bad) > 100
    for epoch in (0, 1):
        assert {(file, row) for _, when, file, row, dropped in entries if when == epoch and dropped} == bad
    train = json.loads((run / "metrics.json").read_text())["train"]
    assert train["step"] == 26 and max(step for step, *_ in entries) == 26
    assert train["data"]["rows.dropped"] == 2 * len(bad)
    assert train["data"]["item_id.out_of_range"] == 2 * sum(-(-rows // 23) for rows in (1100, 1100, 800))
    assert train["rows"] == tiny.ROWS["train"] - len(bad)  # of the last epoch, those that were scored


def test_metrics_always_say_how_long_training_waited_for_input(done):
    for name in ("policies", "in time, 1 rank"):
        run = run_of(done, name)
        lines = train_lines(run)
        assert lines["train"] and all(0 <= line["input_wait_fraction"] <= 1 for line in lines["train"])
        (final,) = lines["final"]
        train = json.loads((run / "metrics.json").read_text())["train"]
        assert 0 <= train["input_wait_fraction"] <= 1
        assert {key: final[key] for key in train} == train


def test_fewer_rows_than_ranks(done):
    entries = ledger(run_of(done, "2 rows"))
    assert sorted(entries) == [(1 + epoch, epoch, "two/part.parquet", row, False) for epoch in (0, 1) for row in (0, 1)]


def test_more_ranks_than_shards_is_one_line_that_names_values_that_work(done):
    _, ended = done["too many ranks"]
    assert ended.returncode != 0
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("error: "))
    assert "at most 2 ranks" in line and "data.stream.shards=3 or 4 or 5" in line and "batch_size=240" in line
