"""The sweep's own part of the command line, and the check of the rest before anything starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.folder import check_settings, locked
from launch.options import split
from launch.rank import command as rank_command
from launch.sweep import command, options, shares, space
from launch.sweep.trials import Trial
from tests.helpers import tiny, warm
from trainer.config import arguments
from trainer.config.compose import compose

REPOSITORY = Path(__file__).resolve().parents[2]


def read(*arguments, config_dir=None):
    own, rest = split(arguments, "sweep")
    assert rest == []
    return options.read(own, [config_dir] if config_dir else [])


def plan(*words):
    return command.make_plan(arguments.sweep().parse_intermixed_args(words))


def test_our_keys_and_the_trials():
    own, rest = split(["sweep=optuna", "model=a,b", "--config-dir", "mine", "sweep.trials=3", "sweeper=1"], "sweep")
    assert own == {"sweep": "optuna", "sweep.trials": "3"}
    assert rest == ["model=a,b", "--config-dir", "mine", "sweeper=1"]
    config = options.read(own, [])
    assert (config.method, config.trials, config.parallel, config.metric) == ("optuna", 3, 1, "valid.auc")
    assert read().method == "grid"


def test_a_search_space_of_ones_own_in_a_file(tmp_path):
    (tmp_path / "sweep").mkdir()
    text = "method: optuna\ntrials: 7\nparams: {optim.dense.lr: 'interval(0.1, 1)'}\n"
    (tmp_path / "sweep" / "mine.yaml").write_text(text)
    config = read("sweep=mine", "sweep.parallel=2", config_dir=str(tmp_path))
    assert (config.trials, config.parallel) == (7, 2)
    assert config.params == {"optim.dense.lr": "interval(0.1, 1)"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=optima"], "no conf/sweep/optima.yaml .*grid, optuna"),
        (["sweep.trails=3"], "sweep.trails is not a known key; did you mean sweep.trials"),
        (["sweep.parallel=0"], "sweep.parallel is 0"),
        (["sweep.parallel=x"], "parallel"),
        (["sweep.metric=test.auc"], "choose from valid.auc"),
        (["sweep.trials=3"], "add sweep=optuna"),
        (["sweep.method=random"], "choose grid or optuna"),
    ],
)
def test_mistakes_in_them(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=din"], "nothing is swept"),
        (["model=din,depfm"], "did you mean deepfm"),
        (["batch_size=480,481"], "does not divide"),
        (["model=din,deepfm", "run.dir=here"], "sweep.dir=DIR"),
        (["model=din,deepfm", "data.valid=[]"], "data.valid is empty"),
        (["model=din,deepfm", "sweep.metric=valid.gauc"], "group_by"),
        (["sweep=optuna", "optim.dense.lr=interval(-1,1)"], "lr"),
        (["sweep=optuna", "optim.dense.lr=0.1,0.2", "model=din,depfm"], "did you mean deepfm"),
    ],
)
def test_mistakes_of_any_trial_are_told_before_the_first(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan(*tiny.arguments(tmp_path, *arguments))


def test_the_same_command_finds_its_folder_and_another_does_not(tmp_path):
    swept = ["model=din,deepfm", f"run.root={tmp_path}"]
    first = plan(*tiny.arguments(tmp_path, *swept))
    again = plan(*tiny.arguments(tmp_path, *swept, "sweep.parallel=2"))
    other = plan(*tiny.arguments(tmp_path, *swept, "seed=2"))
    assert first.root == again.root != other.root and first.root.parent == tmp_path
    first.root.mkdir()
    check_settings(first.root, "sweep.dir", first.settings)
    check_settings(again.root, "sweep.dir", again.settings)
    given = plan(*tiny.arguments(tmp_path, *swept, "seed=2", f"sweep.dir={first.root}"))
    with pytest.raises(ValueError, match=r"begun with other settings \(overrides was .*seed=2"):
        check_settings(given.root, "sweep.dir", given.settings)


def test_secrets_are_not_written_down():
    _, dimensions = space.parse(["model=din,deepfm"])
    settings = command.settings_of(options.SweepConfig(), ["store.secret_key=hush", "seed=2"], dimensions, [])
    assert settings["overrides"] == ["store.secret_key=<redacted>", "seed=2"] and settings["space"] == [
        "model=din,deepfm"
    ]


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    with locked(tmp_path, "sweep.dir"), pytest.raises(ValueError, match=f"^sweep.dir={tmp_path} is in use by another"):
        locked(tmp_path, "sweep.dir").__enter__()


def test_a_mistake_is_one_line():
    call = [sys.executable, "-m", "launch.run", "--multirun", "model=din,deepfm", "sweep=optima"]
    done = subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, timeout=warm.PATIENCE)
    assert done.returncode == 2
    assert done.stderr.startswith("error: sweep=optima: ") and done.stderr.count("\n") == 1


def test_shares_are_equal_and_disjoint():
    made = shares.split(3, list("abcdefgh"), range(7))
    assert [share.gpus for share in made] == [("a", "b"), ("c", "d"), ("e", "f")]
    assert [share.cores for share in made] == [(0, 1), (2, 3), (4, 5)]
    assert shares.split(1, ["0"], [0]) == [shares.Share()]
    assert [share.gpus for share in shares.split(2, [], [4, 9])] == [(), ()]
    for gpus, cores in ((["0"], [0, 1, 2]), ([], [0]), (["0", "1"], [0])):
        with pytest.raises(ValueError, match="sweep.parallel is 2: there are 1"):
            shares.split(2, gpus, cores)


def test_a_trial_is_started_through_a_command_that_finds_it_a_place(tmp_path):
    made = plan(*tiny.arguments(tmp_path, "model=din,deepfm", "sweep.parallel=3", "sweep.through=env PLACE='node 7'"))
    assert command.shares(made) == [shares.Share()] * 3
    folder = tmp_path / "it's here"
    started = command.trial_command(made)(Trial(0, {"model": "din"}, folder), shares.Share(cores=(2, 3)))
    inside = ["env", "PLACE=node 7", *rank_command("launch.run", [])]
    assert started[: len(inside)] == inside
    given = arguments.train().parse_intermixed_args(started[len(inside) :])
    words = arguments.job_words(given, given.overrides)
    assert compose(words).config.run.dir == str(folder) and "model=din" in words
    absent = [sys.executable, "-m", "launch.children", str(os.getpid()), "any", "/absent/srun"]
    done = subprocess.run(absent, cwd=REPOSITORY, capture_output=True, text=True, timeout=warm.PATIENCE)
    assert (done.returncode, done.stderr) == (2, "error: /absent/srun cannot be started: No such file or directory\n")


def test_gpus_keep_the_names_the_user_gave_them():
    assert shares.visible_gpus(2, {}) == ["0", "1"]
    assert shares.visible_gpus(2, {"CUDA_VISIBLE_DEVICES": "GPU-4f,7"}) == ["GPU-4f", "7"]
