"""Data that come, change and go between the launches of a run, and between runs, through the program on one rank."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from tests.helpers import tiny

COMMON = (
    "data.train=['day=*/*.parquet']",
    "data.valid=[]",
    "data.test=[]",
    "data.probability=null",
    "model=deepfm",
    "model.hidden_units=[8]",
    "debug.ledger=true",
    "checkpoint.every_steps=2",
)
DAYS = {"day=1": 1100, "day=2": 1100, "day=3": 800}  # 5, 5 and 4 steps of 240


def log_of_days(click_log, folder, *days):
    for day in days:
        (folder / day).mkdir(parents=True)
        source = click_log / "train" / f"part-{list(DAYS).index(day):05d}.parquet"
        assert pq.read_metadata(source).num_rows == DAYS[day]
        shutil.copy(source, folder / day / "clicks.parquet")
    return folder


def places(days):
    return sorted((f"{day}/clicks.parquet", row) for day in days for row in range(DAYS[day]))


def trained(run):
    """By epoch, the rows trained, sorted; and the steps."""
    table = pq.read_table(run / "ledger")
    entries = list(zip(*(table[name].to_pylist() for name in ("epoch", "file", "row"))))
    assert sorted(set(table["step"].to_pylist())) == list(range(1, max(table["step"].to_pylist()) + 1))
    return {epoch: sorted(e[1:] for e in entries if e[0] == epoch) for epoch in sorted({e[0] for e in entries})}


def succeeds(root, run, *overrides):
    ended = tiny.train(1, root, run, *COMMON, *overrides)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def fails(root, run, *overrides):
    ended = tiny.train(1, root, run, *COMMON, *overrides)
    assert ended.returncode == 2, ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("error: "))
    return line


def one_run_over_changing_data(click_log, folder):
    """Two epochs in four launches; what each said."""
    root, run = log_of_days(click_log, folder / "log", "day=1", "day=3"), folder / "run"
    said = {"start": succeeds(root, run, "epochs=2", "steps=3")}
    log_of_days(click_log, root, "day=2")
    (root / "day=3").rename(folder / "away")
    said["missing"] = fails(root, run, "epochs=2")
    shutil.copytree(folder / "away", root / "day=3")  # restored, with another date
    said["waits"] = succeeds(root, run, "epochs=2", "steps=8")
    said["takes"] = succeeds(root, run, "epochs=2")
    return said, run


def three_days(click_log, folder):
    """A run a day, each on what is new, the last one stopped and continued; what each said."""
    root = log_of_days(click_log, folder / "log", "day=1")
    first, second, third = (folder / name for name in ("first", "second", "third"))
    said = {"first": succeeds(root, first)}
    log_of_days(click_log, root, "day=2")
    said["second"] = succeeds(root, second, f"data.new_since={first}")
    shutil.rmtree(root / "day=1")  # kept no longer
    log_of_days(click_log, root, "day=3")
    checkpoint = max((second / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    succeeds(root, third, f"data.new_since={checkpoint}", "steps=2")
    rows = {"first": trained(first), "second": trained(second)}
    shutil.rmtree(second)
    said["third"] = succeeds(root, third, f"data.new_since={checkpoint}")
    said["other"] = fails(root, third)
    return said, {**rows, "third": trained(third)}, third


@pytest.fixture(scope="module")
def told(click_log, tmp_path_factory):
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(one_run_over_changing_data, click_log, tmp_path_factory.mktemp("one"))
        chain = pool.submit(three_days, click_log, tmp_path_factory.mktemp("chain"))
        return one.result(), chain.result()


def test_files_added_wait_for_the_next_pass_and_a_missing_one_is_an_error(told):
    (said, run), _ = told
    assert "checkpoint" not in said["start"]
    for part in ("1 missing", "'day=3/clicks.parquet'", "step-3", "restore them", "another run.dir"):
        assert part in said["missing"]
    assert "1 file(s) were added" in said["waits"] and "'day=2/clicks.parquet'" in said["waits"]
    assert "does not include them" in said["waits"] and "step 3" in said["waits"]
    assert "includes them" in said["takes"]
    assert trained(run) == {0: places(["day=1", "day=3"]), 1: places(DAYS)}
    assert json.loads((run / "metrics.json").read_text())["train"]["step"] == 8 + 13
    newest = json.loads((run / "checkpoints" / "step-21" / "data.json").read_text())
    assert newest["first_epoch"] == 1 and len(newest["manifest"]["files"]) == 3
    listed = json.loads((run / "checkpoints" / "step-21" / "MANIFEST.json").read_text())
    assert "data.json" in listed


def test_a_run_a_day_trains_each_file_once(told):
    _, (said, rows, third) = told
    assert rows == {
        "first": {0: places(["day=1"])},
        "second": {0: places(["day=2"])},
        "third": {0: places(["day=3"])},  # stopped on the way, and the run that it follows is gone by then
    }
    assert "1 file(s) are new" in said["second"] and "1 file(s) seen before are left out" in said["second"]
    newest = max((third / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    before = json.loads((newest / "data.json").read_text())["before"]
    assert sorted(before) == ["day=1/clicks.parquet", "day=2/clicks.parquet"]
    assert "new_since" in said["other"] and "restore these settings" in said["other"]
