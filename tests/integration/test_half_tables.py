"""Tables of fp16 in the whole program: trained on two ranks, saved as they are, scored by one."""

import json

import pytest
import torch

from tests.helpers import tiny
from trainer.checkpoint import Reader, newest

TABLES = ("user", "item", "category", "hour", "tag")
HALF = [f"data.schema.tables.{table}.dtype=fp16" for table in TABLES]


def test_a_model_of_half_tables_scores_as_one_of_whole_tables_but_for_rounding(click_log, tmp_path):
    found = {}
    for name, ranks, overrides in (("fp32", 1, []), ("fp16", 2, HALF)):
        done = tiny.train(ranks, click_log, tmp_path / name, "model=din", *overrides)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((tmp_path / name / "metrics.json").read_text())
    assert found["fp16"]["test"]["logloss"] == pytest.approx(found["fp32"]["test"]["logloss"], rel=2e-3)
    assert found["fp16"]["test"]["logloss"] != found["fp32"]["test"]["logloss"]
    reader = Reader(newest(tmp_path / "fp16" / "checkpoints", "error"))
    for table in TABLES:
        assert reader.dtype(f"tables/{table}/weight") == torch.float16
        assert reader.dtype(f"tables/{table}/sum") == torch.float32

    done = tiny.train(
        1, click_log, tmp_path / "fp16", "model=din", *HALF
    )  # it is finished: one rank scores what two left
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "fp16" / "metrics.json").read_text())
    assert again["test"]["logloss"] == pytest.approx(found["fp16"]["test"]["logloss"], rel=1e-6)
