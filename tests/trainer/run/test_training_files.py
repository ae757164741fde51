"""Which files a run trains on: those of its checkpoint in its order, later ones at the end of a pass, new ones alone."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders.state_files import write_json
from tests.helpers.training_files import commit, scan, write
from trainer.checkpoint import MANIFEST
from trainer.run.training_files import DATA, Saved, TrainingFiles, continued, find, incremental
from trainer.runtime.progress import Progress


def names(inputs):
    return [inputs.manifest.relative(file) for file in inputs.manifest.files]


def saved_at(tmp_path, log, *paths, **position):
    inputs = TrainingFiles(scan(log, *paths), 0, {})
    return Saved.at(commit(tmp_path / "run", inputs, **{"step": 2, "epoch_step": 2, **position}), str(log))


def test_a_checkpoint_gives_back_its_inputs_wherever_the_data_lie(tmp_path, log):
    saved = saved_at(tmp_path, log, "b.parquet", "a.parquet")
    assert names(saved.inputs) == ["b.parquet", "a.parquet"]
    assert saved.progress == Progress(2, 0, 0, 2) and saved.rows_left == 12
    log.rename(tmp_path / "moved")
    moved = Saved.at(saved.path, str(tmp_path / "moved")).inputs
    assert moved.manifest.files[0].path == str(tmp_path / "moved" / "b.parquet")
    assert moved.manifest.fingerprint == saved.inputs.manifest.fingerprint


def test_the_same_data_go_on_in_the_checkpoints_order(tmp_path, log):
    saved = saved_at(tmp_path, log, "b.parquet", "a.parquet")
    os.utime(log / "a.parquet")  # a copy put back is as good
    shutil.copy(log / "b.parquet", log / "copy.parquet")
    (log / "copy.parquet").replace(log / "b.parquet")
    for paths in (["."], ["a.parquet", "b.parquet"]):
        inputs, notes = continued(scan(log, *paths), saved, may_begin_epoch=True)
        assert names(inputs) == ["b.parquet", "a.parquet"] and notes == []
        assert inputs.manifest.fingerprint == saved.inputs.manifest.fingerprint


def test_missing_and_changed_files_are_one_error(tmp_path, log):
    for index in range(5):
        write(log, f"more-{index}.parquet", 100 * index)
    saved = saved_at(tmp_path, log)
    for index in range(5):
        (log / f"more-{index}.parquet").unlink()
    write(log, "a.parquet", 11)  # as many rows, other values
    with pytest.raises(ValueError) as error:
        continued(scan(log), saved, may_begin_epoch=True)
    message = str(error.value)
    for part in (
        "5 missing",
        "'more-0.parquet'",
        ", …",
        "1 changed: 'a.parquet'",
        str(log),
        "step-2",
        "another run.dir",
    ):
        assert part in message, message
    assert "more-4" not in message


def test_files_added_wait_for_the_end_of_the_pass(tmp_path, log):
    saved = saved_at(tmp_path, log)
    pq.write_table(pa.table({"x": pa.array([50, 51, 52], "int32"), "more": [1, 2, 3]}), log / "0-first.parquet")
    inputs, notes = continued(scan(log), saved, may_begin_epoch=False)
    assert inputs.manifest.fingerprint == saved.inputs.manifest.fingerprint and inputs.first_epoch == 0
    assert [found["x"] for _, found in inputs.manifest.types(["x"])] == [pa.int64()]  # no trace of the other's schema
    assert (
        len(notes) == 1
        and "1 file(s)" in notes[0]
        and "'0-first.parquet'" in notes[0]
        and "does not include" in notes[0]
    )
    at_the_end = Saved(saved.path, saved.identity, Progress(5, 20, 0, 5), saved.inputs)
    assert at_the_end.rows_left == 0
    inputs, notes = continued(scan(log), at_the_end, may_begin_epoch=True)
    assert names(inputs) == ["0-first.parquet", "a.parquet", "b.parquet"] and inputs.first_epoch == 1
    assert len(notes) == 1 and "includes them" in notes[0]


def test_new_files_alone_over_a_chain_of_three_days(tmp_path, log):
    first = saved_at(tmp_path, log, step=5, epoch_step=5)
    write(log, "day-2.parquet", 20)
    second, notes = incremental(scan(log), first)
    assert names(second) == ["day-2.parquet"] and second.first_epoch == 0
    assert len(notes) == 1 and "1 file(s) are new" in notes[0] and "2 file(s) seen before" in notes[0]
    path = commit(tmp_path / "second", second, step=3, epoch_step=3)
    (log / "a.parquet").unlink()  # retention
    write(log, "day-3.parquet", 30)
    third, _ = incremental(scan(log), Saved.at(path, str(log)))
    assert names(third) == ["day-3.parquet"]
    assert set(third.before) == {"a.parquet", "b.parquet", "day-2.parquet"}
    # The third day's own checkpoint knows what came before it, whatever becomes of the earlier runs.
    third_saved = Saved.at(commit(tmp_path / "third", third, step=1, epoch_step=1), str(log))
    write(log, "day-4.parquet", 40)
    inputs, notes = continued(scan(log), third_saved, may_begin_epoch=False)
    assert names(inputs) == ["day-3.parquet"] and "'day-4.parquet'" in notes[0]
    inputs, _ = continued(scan(log), third_saved, may_begin_epoch=True)
    assert names(inputs) == ["day-3.parquet", "day-4.parquet"] and inputs.before == third.before


def test_a_chain_refuses_changed_files_and_nothing_new(tmp_path, log):
    saved = saved_at(tmp_path, log, step=5, epoch_step=5)
    with pytest.raises(ValueError, match=r"new_since=.*all 2 file.*add new ones"):
        incremental(scan(log), saved)
    write(log, "b.parquet", 99)
    write(log, "day-2.parquet", 20)
    with pytest.raises(ValueError, match=r"1 file\(s\) that an earlier run has seen.*'b.parquet'.*restore"):
        incremental(scan(log), saved)


def test_rows_that_a_predecessor_left_untrained_are_told(tmp_path, log):
    write(log, "day-2.parquet", 20)
    middle = saved_at(tmp_path, log, "a.parquet", "b.parquet")
    _, notes = incremental(scan(log), middle)
    assert "12 of their rows" in notes[1]
    later = Saved(middle.path, middle.identity, Progress(7, 28, 1, 2), middle.inputs)
    assert len(incremental(scan(log), later)[1]) == 1


def test_a_run_a_checkpoint_or_neither(tmp_path, log):
    old = commit(tmp_path / "run", TrainingFiles(scan(log), 0, {}), step=2)
    new = commit(tmp_path / "run", TrainingFiles(scan(log), 0, {}), step=10)
    assert find(str(tmp_path / "run")) == new and find(str(old)) == old
    with pytest.raises(ValueError, match="neither a checkpoint nor the folder of a run"):
        find(str(log))
    (new / DATA).write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"step-10: data.json differs"):
        Saved.at(new, str(log))
    manifest = json.loads((old / MANIFEST).read_text())
    write_json(old / MANIFEST, {name: value for name, value in manifest.items() if name != DATA})
    with pytest.raises(ValueError, match=r"step-2 has no data.json.*another run.dir"):
        Saved.at(old, str(log))
