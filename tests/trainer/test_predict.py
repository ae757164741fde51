"""Predictions of several ranks and kept columns of several files become one file, row by row."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_loaders.batch import Cursor
from data_loaders.manifest import Manifest
from trainer import predict
from trainer.config.data import DataConfig
from trainer.run import load


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=3)


def write_parts(folder, monkeypatch, *, logits, dropped):
    """As two ranks write them, in batches of 4 rows, the last one padded."""
    halves = np.array_split(np.arange(len(logits)), 2)
    paths = []
    for rank, rows in enumerate(halves):
        outputs = []
        for start in range(0, len(rows), 4):
            part = rows[start : start + 4]
            found = torch.zeros(4)
            found[: len(part)] = logits[part]
            mask = dropped[part] if dropped[part].any() else None
            outputs.append(SimpleNamespace(logits=found, cursor=Cursor(0, 1, 8, len(part), mask)))
        monkeypatch.setattr(predict, "score", lambda *_: iter(outputs))
        monkeypatch.setattr(predict.build, "build_ordered_loader", lambda *_, **__: None)
        evaluation, data = SimpleNamespace(batch_size=4), SimpleNamespace(schema=None, stream=None)
        config = SimpleNamespace(evaluation=evaluation, batch_size=4, data=data)
        load = SimpleNamespace(config=config, built=SimpleNamespace(pipeline=None), layout=None, ranks=None)
        paths.append(folder / f"part-{rank}")
        predict.write_part(load, None, paths[-1])
    return paths


@pytest.mark.parametrize("keep", [[], ["when.day", "id", "name", "hour"]])
def test_rows_keep_their_order_and_dropped_ones_are_null(tmp_path, monkeypatch, keep):
    days = pa.array([None, *({"day": i} for i in range(6))], pa.struct([("day", pa.int64())]))
    ids, names = pa.array(range(7), "int32"), pa.array(list("abcdefg"))
    write(tmp_path / "in" / "hour=1" / "a.parquet", id=ids, name=names.dictionary_encode(), when=days)
    write(tmp_path / "in" / "hour=2" / "b.parquet", id=pa.array(range(7, 11)), name=names[:4], when=days[:4])
    manifest = Manifest.scan(["in"], str(tmp_path), keep)
    logits = torch.linspace(-3, 3, 11)
    dropped = np.arange(11) % 4 == 2
    parts = write_parts(tmp_path, monkeypatch, logits=logits, dropped=dropped)
    assert predict.merge(parts, manifest, keep, tmp_path / "out.parquet") == 11
    assert not any(part.exists() for part in parts)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == [*keep, "prediction"]
    expected = [None if left else p for left, p in zip(dropped, logits.sigmoid().tolist())]
    assert table["prediction"].to_pylist() == expected
    if keep:
        assert table["id"].to_pylist() == list(range(11)) and table.schema.field("id").type == pa.int64()
        assert table["name"].to_pylist() == list("abcdefgabcd")
        assert table["hour"].to_pylist() == [1] * 7 + [2] * 4
        assert table["when.day"].to_pylist() == [None, 0, 1, 2, 3, 4, 5, None, 0, 1, 2]


def test_the_output_s_own_column_cannot_be_kept(capsys):
    with pytest.raises(SystemExit):
        predict.main(["run", "--input", "x", "--output", "y", "--keep", "prediction"])
    assert "--keep prediction: the output's own column has that name" in capsys.readouterr().err


INPUT = "in/a.parquet"


def reads_everything(tmp_path, monkeypatch):
    """A folder with input, training data, a run and an earlier output; what the command would do is only noted."""
    for name in (INPUT, "data/train/b.parquet", "data/valid/c.parquet", "prepared/test/d.parquet"):
        write(tmp_path / name, id=[1, 2])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("model: {name: din}")
    earlier = pa.table({"prediction": [0.5]}).replace_schema_metadata(dict([predict.MADE_BY]))
    pq.write_table(earlier, tmp_path / "earlier.parquet")
    pq.write_table(earlier, tmp_path / "in" / "earlier.parquet")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "link.parquet").symlink_to(INPUT)
    (tmp_path / "hard.parquet").hardlink_to(tmp_path / INPUT)
    (tmp_path / "folder_link").symlink_to("in")
    data = DataConfig(root=str(tmp_path / "data"), train=["train"], valid=["v*/**/*.parquet"], test=["gone"])
    data.prepared = str(tmp_path / "prepared")
    config = SimpleNamespace(data=data)

    @contextlib.contextmanager
    def open_run(*_):
        yield SimpleNamespace(config=config, layout=None, ranks=SimpleNamespace(rank=0, world_size=1, is_first=True))

    monkeypatch.setattr(predict, "open_run", open_run)
    monkeypatch.setattr(predict, "from_first", lambda work: work())
    monkeypatch.setattr(predict.Manifest, "scan", lambda *_: pytest.fail("it would have begun"))
    monkeypatch.chdir(tmp_path)


def listing(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (INPUT, "among the files of --input"),
        ("./in/../in/a.parquet", "among the files of --input"),
        ("folder_link/a.parquet", "among the files of --input"),
        ("in/earlier.parquet", "among the files of --input"),
        ("in/new.parquet", "among the files of --input"),
        ("folder_link/deep/new.parquet", "among the files of --input"),
        ("link.parquet", "among the files of --input"),
        ("hard.parquet", "among the files of --input"),
        ("data/train/b.parquet", "is not what this command writes"),
        ("data/train/new.parquet", "among the files of data.train"),
        ("data/valid/x/new.parquet", "among the files of data.valid"),
        ("run/checkpoints/new.parquet", "the run's checkpoints"),
        ("prepared/test/new.parquet", "data.prepared"),
        ("run/config.yaml", "only .parquet can be written"),
        ("y.csv", "only .parquet can be written"),
        ("y", "only .parquet can be written"),
        ("y.parquet.gz", "only .parquet can be written"),
        ("folder.parquet", "is a folder"),
        ("s3://bucket/y.parquet", "is an address"),
    ],
)
def test_an_output_that_would_harm_a_file_is_refused_and_nothing_is_written(tmp_path, monkeypatch, output, says):
    reads_everything(tmp_path, monkeypatch)
    before = listing(tmp_path)
    options = predict.argparse.Namespace(
        run=Path("run"), checkpoint=None, overrides=[], raw=False, keep=[], input=["in"], root=".", output=Path(output)
    )
    with pytest.raises(ValueError, match=f"^--output .*{says}"):
        predict.run(options)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("where", ["prepare_raw", "predict"])
def test_rows_prepared_from_raw_ones_go_whatever_happens(tmp_path, monkeypatch, where):
    reads_everything(tmp_path, monkeypatch)

    def fail(*_):
        write(tmp_path / ".y.parquet.prepared" / "a.parquet", id=[1])
        raise OSError("no space")

    monkeypatch.setattr(predict, "prepare_raw", lambda *_: tmp_path / ".y.parquet.prepared")
    monkeypatch.setattr(predict, where, fail)
    before = listing(tmp_path)
    options = predict.argparse.Namespace(
        run=Path("run"),
        checkpoint=None,
        overrides=[],
        raw=True,
        keep=[],
        input=["in"],
        root=".",
        output=Path("y.parquet"),
    )
    with pytest.raises(OSError, match="no space"):
        predict.run(options)
    assert listing(tmp_path) == before and not (tmp_path / ".y.parquet.prepared").exists()


def test_an_earlier_output_is_replaced(tmp_path, monkeypatch):
    reads_everything(tmp_path, monkeypatch)
    assert predict.is_predictions(Path("earlier.parquet")) and not predict.is_predictions(Path(INPUT))
    for output in ("earlier.parquet", "run/predictions.parquet", "in2/new.parquet", "new.parquet"):
        predict.check_output("--output", Path(output), [".parquet"], predict.is_predictions)
        for paths in (["in"], ["in/*"], ["./**/a.parquet"], [INPUT]):
            predict.check_apart(Path(output), "--input", paths, ".")


@pytest.mark.parametrize("wanted", [False, True])
def test_a_trained_run_is_scored_in_one_order_where_it_was_trained_so(tmp_path, monkeypatch, wanted):
    """Asked for before the device is chosen, and so before a GPU is used."""
    checkpoint, data = SimpleNamespace(restore_best=False), SimpleNamespace(schema=None)
    config = SimpleNamespace(deterministic=wanted, checkpoint=checkpoint, model={}, data=data, seed=1, device="cpu")
    config.timeout_seconds = config.rendezvous_timeout_seconds = 1.0
    called = []

    def process_group(*_):
        raise OSError("enough")

    monkeypatch.setattr(load, "from_yaml", lambda *_: SimpleNamespace(config=config))
    monkeypatch.setattr(load, "find_checkpoint", lambda *_, **__: tmp_path)
    monkeypatch.setattr(load, "build_model", lambda *_: None)
    monkeypatch.setattr(load.build, "execution", lambda *_: None)
    monkeypatch.setattr(load, "make_deterministic", lambda: called.append("one order"))
    monkeypatch.setattr(load, "choose_device", lambda _: called.append("device"))
    monkeypatch.setattr(load, "process_group", process_group)
    with pytest.raises(OSError, match="enough"), load.open_run(tmp_path, None, []):
        pass
    assert called == (["one order"] if wanted else []) + ["device"]
