"""Metrics by group as a user gets them: a job that groups by columns which are no features, and evaluations of it on
other numbers of ranks, against scikit-learn on its written predictions."""

import json
import shutil
from collections import Counter
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, log_loss, ndcg_score, roc_auc_score

from tests.helpers import tiny, warm

QUALITIES = [
    f"evaluation.qualities.{each}" for each in ("item=item_id", "category=device", "cosine=true", "novelty=true")
]
ASKED = ("evaluation.group_by=session", "evaluation.request=session", "evaluation.slices=[device,hour]")


@pytest.fixture(scope="module")
def log(click_log, tmp_path_factory):
    """The tiny log with two more columns of strings, one with nulls."""
    root = tmp_path_factory.mktemp("grouped") / "log"
    shutil.copytree(click_log, root)
    rng = np.random.default_rng(5)
    for path in sorted(root.rglob("*.parquet")):
        table = pq.read_table(path)
        sessions = [None if n == 0 else f"session {n}" for n in rng.integers(0, 90, table.num_rows)]
        devices = rng.choice(["phone", "a tablet of 10 inches", "tv"], table.num_rows)
        table = table.append_column("session", pa.array(sessions)).append_column("device", pa.array(devices))
        pq.write_table(table, path, row_group_size=250)
    return root


@pytest.fixture(scope="module")
def trained(log, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    done = tiny.train(
        2,
        log,
        run,
        "model=deepfm",
        *ASKED,
        "evaluation.base_auc=0.6",
        "evaluation.every_steps=8",
        "checkpoint.best=valid.gauc",
    )
    assert done.returncode == 0, done.stderr
    return run, done


def read(path):
    return json.loads(path.read_text())


def test_a_job_reports_what_was_asked_for(trained):
    run, done = trained
    final = read(run / "metrics.json")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for values in (final["valid"], final["test"], *(line for line in lines if line["split"] in ("valid", "test"))):
        assert {"auc_pr", "auc_pr_error_bound", "ece", "ece_equal_mass", "accuracy", "relaimpr"} <= set(values)
        assert {"gauc", "gauc_groups", "ndcg@1", "ndcg@10", "hit_rate@5", "mrr", "requests"} <= set(values)
        assert set(values["slices"]) == {"device", "hour"} and values["gauc_rows"] <= values["rows"]
        assert values["relaimpr"] == pytest.approx((values["auc"] - 0.5) / 0.1 - 1)
    assert not any({"gauc", "ece"} & set(line) for line in lines if line["split"] == "train")
    assert "test GAUC" in done.stdout and f"{final['test']['gauc']:.5f}" in done.stdout
    best = read(run / "checkpoints" / "best.json")
    values = {line["step"]: line["gauc"] for line in lines if line["split"] == "valid"}
    assert best["metric"] == "valid.gauc" and best["value"] == max(values.values()) and len(values) > 1


def test_evaluations_on_other_ranks_agree_with_scikit_learn_on_the_predictions(trained, log, tmp_path):
    run, _ = trained
    final = read(run / "metrics.json")["test"]
    output = tmp_path / "predictions.parquet"
    wanted = ("--input", log / "test", "--output", output, "--keep", "label", "session", "device", "item_id")
    done = warm.run(1, "trainer.predict", [run, *wanted])
    assert done.returncode == 0, done.stderr
    table = pq.read_table(output).to_pydict()
    expected, several = by_hand(table), (evaluated(3, run, tmp_path / "3.json"), evaluated(1, run, tmp_path / "1.json"))
    check_qualities(table, pq.read_table(log / "train")["item_id"].to_pylist(), *several)
    for values in (final, *several):
        for name, value in expected.items():
            assert values[name] == pytest.approx(value, abs=2e-4), name
        assert values["gauc_groups"] == final["gauc_groups"] and values["requests"] == final["requests"]
        devices = values["slices"]["device"]
        assert {line["value"]: line["rows"] for line in devices} == {
            line["value"]: line["rows"] for line in final["slices"]["device"]
        }
        assert {line["value"] for line in devices} == {"phone", "a tablet of 10 inches", "tv"}
        assert sum(line["rows"] for line in values["slices"]["hour"]) == tiny.ROWS["test"]


def evaluated(ranks, run, path):
    done = warm.run(ranks, "trainer.evaluate", [run, "--output", path, "evaluation.memory_mb=1", *QUALITIES])
    assert done.returncode == 0, done.stderr
    return read(path)["test"]


def check_qualities(table, trained, several, single):
    """On three ranks as on one, but for the last bits of logits; lists of 5 by hand."""
    lists, counts = {}, Counter(trained)
    for place in np.argsort(-np.array(table["prediction"], np.float64), kind="stable"):
        lists.setdefault(table["session"][place], []).append((table["item_id"][place], table["device"][place]))
    lists, offered = [rows[:5] for rows in lists.values()], set(table["item_id"])
    bits = np.log2(len(trained) + len(offered | set(trained)))
    differ = [[a != b for (_, a), (_, b) in combinations(rows, 2)] for rows in lists if len(rows) > 1]
    novelty = [np.mean([bits - np.log2(counts[item] + 1) for item, _ in rows]) for rows in lists]
    for values in (several, single):
        assert values["items_offered"] == len(offered)
        assert values["coverage@5"] == len({item for rows in lists for item, _ in rows}) / len(offered)
        assert values["diversity@5"] == pytest.approx(np.mean([np.mean(each) for each in differ]), rel=1e-9)
        assert values["novelty@5"] == pytest.approx(np.mean(novelty), rel=1e-8)
        assert values["unseen@5"] == pytest.approx(
            np.mean([np.mean([item not in counts for item, _ in rows]) for rows in lists]), rel=1e-8
        )
        assert 0 < values["gini@5"] < 1 and 0 < values["diversity_cosine@5"] < 2


def by_hand(table):
    label, prediction = np.array(table["label"]), np.array(table["prediction"], np.float64)
    groups = {}
    for row, session in enumerate(table["session"]):
        groups.setdefault(session, []).append(row)
    both = [rows for rows in groups.values() if 0 < label[rows].mean() < 1]
    clicked = [rows for rows in groups.values() if label[rows].any() and len(rows) > 1]
    aucs = [roc_auc_score(label[rows], prediction[rows]) for rows in both]
    assert None in groups and len(both) > 50 and all(len(rows) > 1 for rows in groups.values())
    ordered = [np.array(rows)[np.argsort(-prediction[rows])] for rows in clicked]
    first = [1 + int(label[rows].argmax()) for rows in ordered]
    return {
        "auc": roc_auc_score(label, prediction),
        "auc_pr": average_precision_score(label, prediction),
        "logloss": log_loss(label, prediction),
        "accuracy": ((prediction > 0.5) == label).mean(),
        "gauc": np.average(aucs, weights=[len(rows) for rows in both]),
        "ndcg@5": np.mean([ndcg_score([label[rows]], [prediction[rows]], k=5) for rows in clicked]),
        "mrr": np.mean([1 / place for place in first]),
        "hit_rate@5": np.mean([place <= 5 for place in first]),
    }


def test_a_wrong_column_is_one_line(log, tmp_path):
    done = tiny.train(1, log, tmp_path / "run", "model=deepfm", "evaluation.group_by=sesion")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1
    assert "evaluation.group_by" in lines[0] and "near: session" in lines[0] and "Traceback" not in done.stderr
