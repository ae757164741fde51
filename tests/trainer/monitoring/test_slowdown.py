"""Where throughput fell within a run and stayed down."""

import json

import numpy as np
import pytest

from trainer.monitoring.slowdown import Collapse, find_collapse
from trainer.report import texts
from trainer.report.run_record import RunRecord


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([20.0] * 6 + [2.0] * 4, Collapse(6, 20.0, 2.0)),
        ([20.0] * 6 + [11.0] * 4, None),  # less than half would be a collapse
        ([20.0] * 5 + [1.0] + [20.0] * 5, None),  # one slow window
        ([2.0] * 4 + [20.0] * 6, None),  # it became faster
        ([20.0, 2.0], None),
        ([], None),
    ],
)
def test_a_fall_that_lasts_is_found(rates, expected):
    assert find_collapse(rates) == expected


def test_a_long_run_is_looked_at_in_parts():
    rates = np.concatenate((np.full(70_000, 30.0), np.full(30_000, 3.0)))
    found = find_collapse(rates)
    assert found is not None and abs(found.place - 70_000) <= 1000 and (found.before, found.after) == (30.0, 3.0)


def test_the_report_names_the_fall_by_its_step(tmp_path):
    rates = [500.0, *[19_800.0] * 5, *[1_400.0] * 5]  # the first line fills caches
    lines = [
        {"split": "train", "step": 10 * number, "epoch": 0, "rows_trained": 100 * number, "samples_per_second": rate}
        for number, rate in enumerate(rates, 1)
    ]
    (tmp_path / "config.yaml").write_text("model: {name: lr}\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (said,) = texts.slowdown(RunRecord(tmp_path))
    assert said.startswith("Throughput fell from 19,800 to 1,400 samples/s after step 60: other work")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:6]))
    assert texts.slowdown(RunRecord(tmp_path)) == []
