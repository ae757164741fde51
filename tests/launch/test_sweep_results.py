"""What a sweep leaves: the best trial as an experiment that composes to the same job, a picture, a table."""

import json
from dataclasses import replace

import pytest

from launch.sweep import experiment, picture, results, space
from launch.sweep.trials import Trial
from tests.helpers import tiny
from trainer.config.compose import compose

SWEPT = ["optim.dense.lr=tag(log,interval(1e-4,1e-2))", "model=deepfm,din", "k=range(1,4)"]


def some(values):
    """Trials of (learning rate, model, k, valid.auc)."""
    keys = ("optim.dense.lr", "model", "k")
    return [
        Trial(
            n,
            dict(zip(keys, row[:3])),
            folder=None,
            state="complete" if row[3] else "failed",
            value=row[3],
            reason="why",
        )
        for n, row in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("config_dir", "overrides"),
    [
        (True, ["data=tiny", "data.root=/x", "batch_size=240", "model=din", "optim.dense.lr=0.002"]),
        (
            False,
            ["model=deepfm", "model.hidden_units=[64,32]", "+optim.by_table={user: {name: sgd, lr: 0.5}}", "seed=3"],
        ),
        (False, ["data.root='/a b'", "model=din", "optim=deepfm", "epochs=3", "experiment=deepfm_trivago"]),
        (False, ["optim.dense.lr=0.002", "optim.dense={name: adamw}"]),
        (
            False,
            [
                "experiment=din_ml1m",
                "data.root=/x",
                "optim.dense.schedule={decay: linear}",
                "+sharding.by_table.user=row_wise",
            ],
        ),
        (True, ["data=tiny", "data.root=/x", "batch_size=240", "~data.schema.crosses.hour_x_category"]),
        (False, ["evaluation=trivago", "data=trivago", "data.root=/x", "data.stream.shards=32"]),
        (False, ["checkpoint.best=null", "run.name=mine", "warm_start.path=/old"]),
    ],
)
def test_the_best_trial_is_an_experiment_that_composes_to_the_same_job(config_dir, overrides, tmp_path):
    folders = [str(tiny.CONF)] if config_dir else []
    first = [word for folder in folders for word in ("--config-dir", folder)]
    arguments = experiment.write(tmp_path, [*overrides, "run.dir=/there"], folders, "valid.auc 0.7")
    composed = compose(arguments).tree
    assert composed == compose([*first, *overrides]).tree
    assert (tmp_path / "experiment" / "best.yaml").read_text().startswith("# @package _global_\n# valid.auc 0.7\n")


def test_lines_of_the_picture_are_where_the_values_are():
    dimensions = space.parse(SWEPT)[1]
    trials = some([("0.0001", "deepfm", "1", 0.5), ("0.001", "din", "3", 0.7), ("0.01", "din", "2", 0.6)])
    rate, model, k = (picture.axis_of(dimension, trials) for dimension in dimensions)
    assert rate.heights == pytest.approx([0, 0.5, 1]) and rate.ticks[2] == (0.5, "0.001")
    assert model.heights == [0, 1, 1] and model.ticks == [(0, "deepfm"), (1, "din")]
    assert k.heights == [0, 1, 0.5]
    assert picture.metric_axis(trials, "valid.auc").heights == pytest.approx([0, 1, 0.5])
    assert picture.metric_axis(trials[:1], "valid.auc").heights == [0], "a single trial has a height, too"


def test_a_sweep_leaves_a_table_a_picture_and_an_experiment(tmp_path, capsys):
    dimensions = space.parse(SWEPT)[1]
    trials = some([("0.0001234567", "deepfm", "1", 0.5), ("0.001", "din", "3", 0.7), ("0.01", "din", "2", None)])
    trials.append(replace(trials[0], number=3, state="pruned", value=0.9))
    results.leave(tmp_path, trials, dimensions, ["seed=4"], [], "valid.auc")
    shown = capsys.readouterr().out
    order = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert order == ["1", "0", "3", "2"], "the best of those that came to their end, then the others"
    assert "0.000123457" in shown and "failed: why" in shown
    assert f"clicktrainer train --config-dir {tmp_path} experiment=best" in shown
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("<figure") == 1 and "3 trials by valid.auc" in page
    assert [trial["number"] for trial in json.loads((tmp_path / "results.json").read_text())] == [1, 0, 3, 2]


def test_where_all_failed_there_is_a_table_and_no_best(tmp_path, capsys):
    results.leave(tmp_path, some([("0.01", "din", "2", None)]), space.parse(SWEPT)[1], [], [], "valid.auc")
    assert "failed: why" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
