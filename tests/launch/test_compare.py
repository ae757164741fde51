"""Runs side by side: what differs, what they ended with, and their curves, from run folders written by hand."""

import json

import pytest
import yaml

from trainer.report import compare


def write(folder, config, lines=(), metrics=None, state="finished"):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "status.json").write_text(json.dumps({"state": state}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if metrics:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def valid(rows, auc):
    return {"step": rows // 10, "rows_trained": rows, "split": "valid", "auc": auc}


@pytest.fixture
def runs(tmp_path):
    """One at its end, which trained a step twice, and one that is being written."""
    common = {"seed": 1, "run": {"dir": "one"}, "data": {"train": ["a"], "schema": {"tables": {}}}}
    one = {**common, "optim": {"dense": {"lr": 0.1}}, "model": {"name": "din", "position": "none"}}
    two = {**common, "run": {"dir": "two"}, "optim": {"dense": {"lr": 0.2}}, "model": {"name": "deepfm"}}
    train = {"step": 1, "rows_trained": 10, "split": "train", "auc": 0.1}
    ended = {"valid": {"auc": 0.7, "logloss": 0.5, "auc_pr": None}, "train": {"rows_trained": 12345, "seconds": 2.5}}
    first = write(tmp_path / "a", one, [train, valid(100, 0.5), valid(200, 0.6), valid(200, 0.65)], ended)
    second = write(tmp_path / "b", two, [valid(100, 0.55), valid(150, None)], state="running")
    with open(second / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "rows_tr')
    return [first, second]


def test_differences_of_the_configurations(runs):
    assert compare.differences(compare.read_all(runs)) == {
        "model.name": ["din", "deepfm"],
        "model.position": ["none", "–"],
        "optim.dense.lr": [0.1, 0.2],
    }


def test_metrics_at_the_end(runs):
    assert compare.final_metrics(compare.read_all(runs)) == {
        "valid.auc": [0.7, None],
        "valid.logloss": [0.5, None],
        "train.rows_trained": [12345, None],
        "train.seconds": [2.5, None],
    }


def test_curves_by_rows_trained(runs):
    found = compare.read_all(runs)
    assert [run.curve("valid.auc") for run in found.values()] == [[(100, 0.5), (200, 0.65)], [(100, 0.55)]]
    assert compare.curves(found, "valid.auc") == {"100": ["0.50000", "0.55000"], "200": ["0.65000", "–"]}


def test_a_long_curve_is_thinned_to_its_ends_and_points_between(tmp_path):
    lines = [valid(10 * number, number / 1000) for number in range(1, 101)]
    table = compare.curves(compare.read_all([write(tmp_path / "run", {}, lines)]), "valid.auc")
    assert len(table) == compare.POINTS and list(table)[0] == "10" and list(table)[-1] == "1,000"


def test_runs_of_one_name_are_distinguished(tmp_path):
    folders = [write(tmp_path / name / "same", {}) for name in ("x", "y")]
    assert list(compare.read_all(folders)) == ["x/same", "y/same"]


def test_the_command_prints_and_draws(runs, tmp_path, capsys):
    assert compare.main([*map(str, runs), "--picture", str(tmp_path / "curves.html")]) == 0
    shown = capsys.readouterr().out
    for text in ("optim.dense.lr", "0.70000", "12,345", "running", "0.65000"):
        assert text in shown
    page = (tmp_path / "curves.html").read_text()
    assert page.count("<figure") == 1 and "valid.auc by rows trained" in page
    assert compare.main([str(runs[0])]) == 0
    assert "The configurations are the same." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent has no config.yaml: give the folder of a run"),
        (["a", "a"], "is given twice"),
        (["a", "--metric", "valid.ac"], "--metric valid.ac: no run has it (valid: train.auc, valid.auc)"),
        (["a", "--picture", "x.png"], "--picture x.png: only .html can be written"),
        (["a", "--picture", "absent/x.html"], "there is no folder absent"),
    ],
)
def test_mistakes_are_one_line(arguments, message, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compare.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
