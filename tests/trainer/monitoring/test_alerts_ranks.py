"""Warnings of whole jobs: data and settings made ill, each on two ranks; and healthy ones, which are not warned of."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders import synthetic
from tests.helpers import tiny
from tests.helpers.jobs import built_job, ranks_of
from tests.helpers.ranks import run_distributed
from trainer.monitoring.feature_coverage import LOOK_EVERY
from trainer.monitoring.metrics_logger import MetricsLogger
from trainer.run import loop
from trainer.run.job import make_alerts
from trainer.runtime.distributed import all_reduce_sum
from trainer.runtime.progress import Progress

ROWS = 24_000
STEPS = ROWS // 240
EVERY = 25
COMMON = (
    "optim.dense.lr=0.02",
    "data.schema.tables.user.num_embeddings=20000",
    "data.schema.crosses.hour_x_category.num_buckets=20000",
    "data.schema.features.item_id.on_out_of_range=missing",
    "alerts.after_rows=1000",
    "alerts.after_steps=20",
)


def shuffled(table):
    return replaced(table, "label", np.random.default_rng(1).permutation(table["label"].to_numpy()))


def leaking(table):
    return replaced(table, "age", table["label"].to_numpy() * 10.0 + np.random.default_rng(1).random(len(table)))


def never_there(table):
    table = replaced(table, "item_id", np.full(len(table), 12345))
    for name in ("tags", "price"):
        table = replaced(table, name, pa.nulls(len(table)))
    return table


def no_clicks(table):
    return replaced(table, "label", np.zeros(len(table)))


def replaced(table, name, values):
    field = table.schema.field(name)
    return table.set_column(table.column_names.index(name), field, pa.array(values).cast(field.type))


ILL = {"shuffled": shuffled, "leaking": leaking, "never_there": never_there, "no_clicks": no_clicks}
# By case: which log, overrides, what is to be told.
CASES = {
    "healthy": ("healthy", (), set()),
    "shuffled": ("shuffled", (), {"auc_of_chance"}),
    "leaking": ("leaking", (), {"label_leaking"}),
    "never there": (
        "never_there",
        (),
        {"always_missing:item_id", "always_missing:tags", "always_missing:price"},
    ),
    "no clicks": ("no_clicks", (), {"labels_one_valued"}),
    "nothing learnt": (
        "healthy",
        ("model=lr", "optim.dense.lr=1e-12", "optim.wide.lr=1e-12"),
        {"predictions_constant"},
    ),
    "crowded": ("healthy", ("data.schema.tables.user.num_embeddings=50",), {"collisions:user"}),
    "switched off": ("never_there", ("alerts.enabled=false",), set()),
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    root = tmp_path_factory.mktemp("logs")
    config = tiny.job(root / "healthy").config
    rows = {"train": ROWS, "valid": 100, "test": 100}
    synthetic.write(config.data.schema, root / "healthy", rows=rows, seed=3, probability="click_probability")
    for name, change in ILL.items():
        shutil.copytree(root / "healthy", root / name)
        for path in (root / name / "train").glob("*.parquet"):
            pq.write_table(change(pq.read_table(path)), path)
    return root


def trained(rank, world_size, root, folder, overrides):
    """A reporter that has seen one epoch."""
    ranks = ranks_of(rank, world_size)
    config, layout, loader, built = built_job(root, rank, world_size, overrides)
    alerts = make_alerts(config, layout, ranks)
    reporter = MetricsLogger(folder, loader, STEPS, EVERY, ranks, alerts)
    progress, batches = Progress(), loop.batches_from(loader, Progress(), STEPS)
    for _ in range(STEPS):
        outputs = built.pipeline.step(batches, lambda batch, outputs: alerts.coverage.look(batch))
        progress.advance(outputs.cursor)
        reporter.update(outputs, progress)
        reporter.maybe_report(progress)
    batches.close()
    reporter.close()
    return reporter


class Pieces:
    """Reads what a snapshot holds."""

    path = "step-1"

    def __init__(self, pieces):
        self.values = {piece.name: piece.tensor for piece in pieces}

    def load(self, pieces):
        for piece in pieces:
            piece.tensor.copy_(self.values[piece.name])


def told_of_cases(rank, world_size, root, folder):
    told = {}
    for case, (log, overrides, _) in CASES.items():
        (Path(folder) / case).mkdir(exist_ok=True)
        reporter = trained(rank, world_size, Path(root) / log, Path(folder) / case, (*COMMON, *overrides))
        told[case] = reporter.alerts.raised
    sums = reporter.alerts.coverage.sums
    assert not sums.any(), "switched off, nothing is looked at"
    return told


def seen_and_restored(rank, world_size, root, folder):
    """What was seen, and what a run that goes on from there has seen."""
    reporter = trained(rank, world_size, root, Path(folder), COMMON)
    seen = reporter.alerts.coverage.compute(all_reduce_sum)
    pieces, facts = reporter.snapshot(), json.loads(json.dumps(reporter.facts()))
    config, layout, loader, _ = built_job(root, rank, world_size, COMMON)
    ranks = ranks_of(rank, world_size)
    again = MetricsLogger(Path(folder), loader, STEPS, EVERY, ranks, make_alerts(config, layout, ranks))
    again.alerts.coverage.sums.fill_(7)
    again.restore(facts, Pieces(pieces))
    assert again.alerts.coverage.compute(all_reduce_sum) == seen
    return seen


def test_every_warning_comes_where_there_is_reason_and_nowhere_else(logs, tmp_path):
    on_ranks = run_distributed(told_of_cases, 2, str(logs), str(tmp_path))
    assert on_ranks[0].keys() == on_ranks[1].keys() == CASES.keys()
    for case, (_, _, expected) in CASES.items():
        names = [alert["name"] for alert in on_ranks[0][case]]
        assert len(names) == len(set(names)) and set(names) == expected, (case, on_ranks[0][case])
        assert names == [alert["name"] for alert in on_ranks[1][case]]
        lines = [json.loads(line) for line in (tmp_path / case / "metrics.jsonl").read_text().splitlines()]
        assert [alert for line in lines for alert in line.get("alerts", ())] == on_ranks[0][case]
    (item,) = (alert for alert in on_ranks[0]["never there"] if alert["name"] == "always_missing:item_id")
    assert "raise num_embeddings" in item["message"]
    assert "values share the 49 rows" in on_ranks[0]["crowded"][0]["message"]


def test_what_was_seen_is_the_same_on_any_number_of_ranks_and_after_a_restart(logs, tmp_path):
    seen = [run_distributed(seen_and_restored, n, str(logs / "healthy"), str(tmp_path))[0] for n in (1, 2)]
    assert seen[0] == seen[1] and seen[0].rows == ROWS // LOOK_EVERY
