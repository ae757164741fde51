"""From raw files to predictions, as a user goes: prepare, train, score raw rows; and the next day's."""

import json
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml

from data_loaders.prepare import compose, owned
from data_loaders.prepare.__main__ import main
from data_loaders.prepare.outputs import Folder
from data_loaders.prepare.pipeline import Options, prepare, transform
from data_loaders.prepare.prepared import Prepared
from data_loaders.prepare.progress import Progress

USERS, ITEMS, EVENTS = 40, 60, 3000
RECIPE = {
    "name": "shop",
    "sources": {
        "log": {
            "files": ["log*.csv"],
            "format": "csv",
            "columns": {"user": "string", "item": "int64", "price": "float64", "time": "int64", "rating": "int8"},
        }
    },
    "examples": {"start": "log", "steps": [{"select": {"label": "CAST(rating >= 4 AS TINYINT)"}}]},
    "split": {"hash": {"by": ["user"], "valid": 0.15, "test": 0.15}},
    "keep": ["time"],
    "schema": {
        "label": "label",
        "embedding_dim": 8,
        "tables": {"user": {}, "item": {"vocabulary": {"min_count": 30}}, "price_bucket": {}, "user_x_item": {}},
        "features": {
            "user": {"kind": "sparse", "table": "user"},
            "item": {"kind": "sparse", "table": "item"},
            "bucket": {
                "kind": "sparse",
                "table": "price_bucket",
                "make": {"column": "price", "numbers": [{"buckets": 8}]},
            },
            "user_x_item": {"kind": "sparse", "table": "user_x_item", "make": {"cross": ["user", "item"]}},
            "price": {"kind": "dense", "fill": 0.0, "make": {"numbers": [{"quantiles": 20}]}},
            "level": {"kind": "dense", "fill": 0.0, "make": {"column": "price", "numbers": ["log1p", "standardize"]}},
            "history": {
                "kind": "sequence",
                "table": "item",
                "max_length": 5,
                "target": "item",
                "make": {"history": {"events": "log", "by": ["user"], "time": "time", "value": "item"}},
            },
        },
    },
}


def write_log(folder, *, rows=EVENTS, seed=0, first_item=0, rating=True):
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.csv", "w") as file:
        file.write("user,item,price,time" + (",rating\n" if rating else "\n"))
        for number in range(rows):
            item = first_item + int(ITEMS * draw.random() ** 2)
            price = "" if draw.random() < 0.1 else f"{draw.lognormal():.3f}"
            user, stars = draw.integers(USERS), draw.integers(1, 6)
            file.write(f"u{user},{item},{price},{number // 3}" + (f",{stars}\n" if rating else "\n"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop.yaml").write_text(yaml.safe_dump(RECIPE))
    write_log(folder / "raw")
    assert main([f"recipe={folder}/shop.yaml", f"input={folder}/raw", f"output={folder}/day1"]) == 0
    return folder


def rows(folder, *splits):
    files = [str(file) for split in splits for file in sorted((folder / split).glob("*.parquet"))]
    return ds.dataset(files).to_table()


def test_training_and_scoring_give_bitwise_the_same_features(shop, tmp_path):
    write_log(tmp_path / "raw", rating=False)
    options = Options(str(tmp_path / "raw"), tmp_path / "scored")
    assert transform(Prepared.open(shop / "day1"), options, Progress(quiet=True)) == EVENTS
    scored = rows(tmp_path, "scored")
    assert "label" not in scored.column_names
    trained = rows(shop / "day1", "train", "valid", "test")
    by = [("time", "ascending"), ("user", "ascending"), ("item", "ascending"), ("user_x_item", "ascending")]
    by += [("price", "ascending")]
    names = ["user", "item", "bucket", "user_x_item", "price", "level", "history", "time"]
    assert trained.select(names).sort_by(by).equals(scored.select(names).sort_by(by))
    assert len(set(scored["bucket"].to_pylist())) == 9 and max(map(len, scored["history"].to_pylist())) == 5


def test_what_is_written_is_what_was_asked_for(shop):
    table = rows(shop / "day1", "train")
    for name in ("label", "user", "item", "bucket", "price", "level", "history"):
        assert not table.schema.field(name).nullable, name
    assert table.schema.field("item").type == pa.int32() and table.schema.field("price").type == pa.float32()
    vocabulary = pq.read_table(shop / "day1" / "vocabulary" / "item.parquet")
    counts = vocabulary["count"].to_pylist()
    assert vocabulary["id"].to_pylist() == list(range(2, 2 + len(counts)))
    assert counts == sorted(counts, reverse=True) and min(counts) >= 30
    data = yaml.safe_load((shop / "day1" / "data" / "shop.yaml").read_text())
    assert data["schema"]["tables"]["item"]["num_embeddings"] == 2 + len(counts)


def test_the_next_day_keeps_ids_and_statistics(shop, tmp_path):
    write_log(tmp_path / "raw", seed=1, first_item=20)
    declaration = compose.load(str(shop / "shop.yaml"))
    options = Options(str(tmp_path / "raw"), tmp_path / "day2", extend=shop / "day1")
    report = prepare(declaration, options, Progress(quiet=True))["vocabularies"]["item"]
    old, new = (
        pq.read_table(day / "vocabulary" / "item.parquet").to_pylist() for day in (shop / "day1", tmp_path / "day2")
    )
    assert [row["value"] for row in new][: len(old)] == [row["value"] for row in old]
    assert report["added"] == len(new) - len(old) > 0 and report["aged"] > 0
    assert all(now["count"] >= before["count"] for now, before in zip(new, old))
    statistics = [json.loads((day / "statistics.json").read_text()) for day in (shop / "day1", tmp_path / "day2")]
    assert statistics[0] == statistics[1]


def test_a_prepared_set_trains_and_scores_raw_rows(shop, tmp_path):
    write_log(tmp_path / "raw", rows=300, seed=2, rating=False)
    train = [
        sys.executable,
        "-m",
        "launch.run",
        "--nproc-per-node",
        "2",
        "--config-dir",
        str(shop / "day1"),
        "data=shop",
    ]
    train += ["model=din", "batch_size=256", "epochs=1", f"run.dir={tmp_path}/run"]
    found = subprocess.run(train, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    predict = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "trainer.predict",
    ]
    predict += [f"{tmp_path}/run", "--raw", "--input", str(tmp_path / "raw"), "--output", f"{tmp_path}/p.parquet"]
    found = subprocess.run([*predict, "--keep", "time", "user"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    table = pq.read_table(tmp_path / "p.parquet")
    assert table["time"].to_pylist() == [number // 3 for number in range(300)]
    assert table["prediction"].null_count == 0 and len(set(table["prediction"].to_pylist())) > 50
    assert not list(tmp_path.glob(".p.parquet*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=shopp"], "recipe=shopp is not known"),
        (["input=/nowhere"], "/nowhere"),
        (["schema.features.item.make.column=itme"], "'itme'"),
        (["schema.features.item.knid=sparse"], "did you mean schema.features.item.kind"),
        (["sources.log.columns.user=int32"], "column 'user' holds 'u"),
        (["split.hash.by=[nobody]"], "'nobody'"),
        (["examples.steps=[{where: 'item < 0'}]", "schema.label=rating"], "no row is left to train on"),
        (["memory_limit=much"], "memory_limit=much"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(shop, tmp_path, capfd, arguments, message):
    given = [f"recipe={shop}/shop.yaml", f"input={shop}/raw", f"output={tmp_path}/out"]
    given = [text for text in given if text.split("=")[0] not in {a.split("=")[0] for a in arguments}]
    assert main([*given, *arguments]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_killed_run_leaves_nothing_half_and_the_same_command_finishes(shop, tmp_path):
    arguments = [f"recipe={shop}/shop.yaml", f"input={shop}/raw", f"output={tmp_path}/out"]
    command = [sys.executable, "-m", "data_loaders.prepare", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "vocabulary user" in line:
                process.kill()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    stored = tmp_path / ".out.unfinished" / "tables" / "raw" / "log" / "00000.parquet"
    before = stored.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(
            Folder, "commit", lambda self, commit=Folder.commit: (seen.append(stored.stat().st_mtime_ns), commit(self))
        )
        assert main(arguments) == 0
    assert seen == [before], "what was stored is used again"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for split in ("train", "valid", "test"):
        assert rows(tmp_path / "out", split).equals(rows(shop / "day1", split))


def test_a_full_disk_is_one_line_and_the_old_output_stays(shop, tmp_path, capfd):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        (small / "out").mkdir()
        (small / "out" / "report.json").write_text("yesterday")
        (small / "out" / owned.MARKER).write_text(owned.record(small / "out"))
        write_log(tmp_path / "raw", rows=200_000)
        arguments = [f"recipe={shop}/shop.yaml", f"input={tmp_path}/raw", f"output={small}/out", "overwrite=true"]
        assert main(arguments) == 1
        assert "error: the disk is full" in capfd.readouterr().err
        assert (small / "out" / "report.json").read_text() == "yesterday"
    finally:
        subprocess.run(["umount", small], check=True)
