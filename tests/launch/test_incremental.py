"""Day after day: what the command line means, and three days of the program, killed in the middle and begun again."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from launch import incremental
from launch.folder import check_settings
from tests.helpers import tiny, warm
from trainer.checkpoint import Reader, newest

DAYS = ("a", "b", "c")


def test_days_come_in_order_of_names_or_as_listed(tmp_path):
    for name in ("day-2.parquet", "day-10.parquet", "day-1.parquet", "other"):
        (tmp_path / name).mkdir()
    found = incremental.find_days("day-*", str(tmp_path))
    assert [(day.name, day.path) for day in found] == [
        ("day-1", "day-1.parquet"),
        ("day-10", "day-10.parquet"),
        ("day-2", "day-2.parquet"),
    ]
    assert [day.path for day in incremental.find_days("[day-2.parquet, day-10.parquet]", "x")][1] == "day-10.parquet"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.days=x"], "output= is missing"),
        (["output=o"], "data.days= is missing"),
        (["output=o", "data.days=none-*"], "names nothing"),
        (["output=o", "data.days=[a/x,b/x]"], "two days are called x"),
        (["output=o", "data.days=[a]", "evict=3"], "evict= needs recipe="),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert incremental.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_other_settings_is_refused(tmp_path, capsys):
    plan = incremental.parse([f"output={tmp_path}", "data.days=[a]", "model=din"])
    check_settings(plan.output, "output", plan.settings)
    check_settings(plan.output, "output", plan.settings)
    assert incremental.main([f"output={tmp_path}", "data.days=[a]", "model=deepfm"]) == 2
    assert "overrides was ['model=din'], is ['model=deepfm']" in capsys.readouterr().err


def test_raw_days_are_prepared_each_on_the_one_before(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(incremental, "_call", lambda command: called.append(command) or 7)
    arguments = [
        f"output={tmp_path}",
        "data.days=[a,b]",
        "data.root=raw",
        "recipe=r.yaml",
        "evict=3",
        "prepare.threads=1",
    ]
    plan = incremental.parse([*arguments, "model=din"])
    assert incremental.train_day(plan, plan.days[1], plan.days[0]) == 7
    (command,) = called
    assert command[:2] == ["data_loaders.prepare", "recipe=r.yaml"]
    assert {"input=raw/b", f"output={tmp_path}/data/b", f"extend={tmp_path}/data/a", "evict=3", "threads=1"} <= set(
        command
    )
    assert "split.hash=null" in command and "model=din" not in command


def test_ready_days_take_what_the_day_before_has_not_trained(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(incremental, "_call", lambda command: called.append(command) or 7)
    plan = incremental.parse([f"output={tmp_path}", "data.days=[a,b]", "model=din"])
    for day, previous in ((plan.days[0], None), (plan.days[1], plan.days[0])):
        assert incremental.train_day(plan, day, previous) == 7
    first, second = ({word for word in command if "runs/a" in word} for command in called)
    before = f"{tmp_path}/runs/a"
    assert (first, second) == ({f"run.dir={before}"}, {f"warm_start.path={before}", f"data.new_since={before}"})


def command_line(root, output, days):
    own = ["--nproc-per-node", "1", f"output={output}", f"data.days=[{','.join(days)}]"]
    return [*own, *tiny.arguments(root, "model=deepfm", "model.hidden_units=[8]", "data.probability=null", "epochs=1")]


def run_days(root, output, days, faults=""):
    """The exit code and stderr. Each day's job is a rank that has PyTorch imported, in place of one of the launcher's."""

    def call(command):
        assert command[0] == "launch.run" and command[1::2][:3] == ["--nproc-per-node", "--max-restarts", "--grace"]
        return warm.run(1, "trainer.train", command[7:], {**os.environ, "TRAINER_FAULTS": faults}).returncode

    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(incremental, "_call", call)
        return incremental.main(command_line(root, output, days)), errors.getvalue()


def interrupted(root, output):
    """One day; a second one that dies while it commits its last checkpoint; then all three, by the command itself."""
    assert run_days(root, output, DAYS[:1])[0] == 0
    finished = (output / "runs" / "a" / "metrics.json").stat().st_mtime_ns
    code, errors = run_days(root, output, DAYS[:2], faults="phase=before_rename,action=kill9")
    assert code != 0 and "the same command resumes it" in errors
    assert not (output / "runs" / "b" / "metrics.json").exists()
    ended = subprocess.run(
        [sys.executable, "-m", "launch.incremental", *command_line(root, output, DAYS)],
        capture_output=True,
        text=True,
        timeout=warm.PATIENCE,
        env={**os.environ, "PYTHONPATH": str(tiny.REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stderr
    assert (output / "runs" / "a" / "metrics.json").stat().st_mtime_ns == finished
    return ended


@pytest.fixture(scope="module")
def outputs(click_log, tmp_path_factory):
    root, folder = tmp_path_factory.mktemp("days"), tmp_path_factory.mktemp("outputs")
    for number, day in enumerate(DAYS):
        shutil.copy(click_log / "train" / f"part-{number:05d}.parquet", root / f"{day}.parquet")
    for day in DAYS:
        (root / f"{day}.parquet").rename(root / day)
    code, errors = run_days(root, folder / "undisturbed", DAYS)
    assert code == 0, errors
    return folder, interrupted(root, folder / "interrupted")


def tensors(output, day):
    reader = Reader(newest(output / "runs" / day / "checkpoints"))
    return {name: reader.read(name) for name in reader.names if not name.startswith("metrics/")}


def test_a_crash_in_the_middle_changes_nothing(outputs):
    folder, _ = outputs
    for day in DAYS:
        found, expected = tensors(folder / "interrupted", day), tensors(folder / "undisturbed", day)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_each_day_is_scored_before_it_is_trained(outputs):
    folder, ended = outputs
    report = json.loads((folder / "interrupted" / "report.json").read_text())
    assert [row["day"] for row in report] == list(DAYS)
    assert (
        [row["rows"] for row in report]
        == [1100, 1100, 800]
        == [row["trained_rows"] for row in report[:1]] + [1100, 800]
    )
    assert all(0 < row["before_auc"] < 1 for row in report)
    assert "AUC before" in ended.stdout and "1,100" in ended.stdout
    other = json.loads((folder / "undisturbed" / "report.json").read_text())
    assert [row["before_auc"] for row in other] == [row["before_auc"] for row in report]


def test_each_day_begins_where_the_one_before_ended(outputs):
    folder, _ = outputs
    told = json.loads((folder / "undisturbed" / "runs" / "b" / "warm_start.json").read_text())
    assert told["source"].endswith("runs/a/checkpoints/step-5")
    assert {table["status"] for table in told["tables"]} == {"kept"}
