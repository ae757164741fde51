"""What a whole job on two ranks lets one see: progress in a log, TensorBoard, warnings told once, resumed or not."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import tiny

SMALL = ("model=deepfm", "model.hidden_units=[8]", "data.test=[]", "data.probability=null", "log_every_steps=4")


def without_tags(root):
    for path in (root / "train").glob("*.parquet"):
        table = pq.read_table(path)
        field = table.schema.field("tags")
        nothing = pa.nulls(len(table), field.type)  # empty lists: the column is written as never null
        pq.write_table(table.set_column(table.column_names.index("tags"), field, nothing), path)
    return root


def test_a_job_tells_its_progress_and_warns_once_even_where_it_goes_on(tmp_path):
    root, run = without_tags(tiny.write_log(tmp_path / "log")), tmp_path / "run"
    warning = "warning: feature 'tags' was missing in all of"
    ended = []
    for epochs in (1, 2):
        ended.append(tiny.train(2, root, run, *SMALL, f"epochs={epochs}", "alerts.after_rows=400"))
        assert ended[-1].returncode == 0, ended[-1].stderr
    assert [done.stderr.count(warning) for done in ended] == [1, 0]
    assert "column 'tags' holds nothing but empty lists" in ended[0].stderr
    for done, steps in zip(ended, (13, 26)):
        (line,) = re.findall(rf"step \d+ of {steps} .*", done.stderr)
        assert re.search(
            r"rows [\d,]+, samples/s [\d,]+, loss 0\.\d{4}, auc \S+, input wait \d+%, \d\d:\d\d left$", line
        )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (told,) = (line for line in lines if any(a["name"] == "always_missing:tags" for a in line.get("alerts", ())))
    assert told["split"] == "train" and told["step"] == 8, "720 rows in steps 4 and 8"
    final = json.loads((run / "metrics.json").read_text())
    assert "always_missing:tags" in [alert["name"] for alert in final["alerts"]]
    found = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("train/auc")] == [4, 8, 12, 16, 20, 24]
    assert [event.step for event in found.Scalars("valid/auc")] == [13, 26]


def test_a_tracker_that_is_not_installed_ends_a_job_in_one_line(click_log, tmp_path):
    done = tiny.train(1, click_log, tmp_path / "run", *SMALL, "logging.mlflow=true")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: logging.mlflow=true, but the package 'mlflow' is not installed: pip install mlflow")
