"""The Optuna search, over a program that trains nothing: what is drawn, pruned, counted, and gone on with."""

import math
import os
import signal
import threading
import time

import pytest

from launch.sweep import space
from launch.sweep.options import SweepConfig
from launch.sweep.shares import Share
from tests.helpers import sweep_fakes as fakes

pytest.importorskip("optuna")
study = pytest.importorskip("launch.sweep.study")

RATE = "lr=tag(log,interval(1e-6,1))"


def search(root, *, dimensions=(RATE,), **config):
    return study.Search(SweepConfig(method="optuna", **config), space.parse(dimensions)[1], root)


def drawn(made):
    return [trial.values["lr"] for trial in made.trials()]


def test_it_comes_closer_than_chance_does_and_a_failed_trial_ends_nothing(tmp_path):
    made = search(tmp_path, trials=30, startup_trials=8)
    fakes.sweep(made, [Share()], fakes.command({3: "mistake"}))
    ended = made.trials()
    assert [trial.number for trial in ended if trial.state != "complete"] == [3]
    assert ended[3].reason == "batch_size is 7: no"
    assert all(trial.value == pytest.approx(fakes.auc(trial.values["lr"])) for trial in ended if trial.number != 3)
    off = [abs(math.log10(float(trial.values["lr"])) + 3) for trial in ended]
    assert sum(off[8:]) / 22 < 1.2 and min(off) < 0.1, "chance is 1.5 off"
    assert search(tmp_path, trials=30).next() is None


def test_a_search_in_parts_draws_what_an_undisturbed_one_does(tmp_path):
    for part in ("whole", "parts"):
        (tmp_path / part).mkdir()
    whole = search(tmp_path / "whole", trials=12, startup_trials=5)
    fakes.sweep(whole, [Share()])
    for trials in (2, 7, 12):
        parts = search(tmp_path / "parts", trials=trials, startup_trials=5)
        fakes.sweep(parts, [Share()])
    assert drawn(parts) == drawn(whole) and len(set(drawn(parts))) == 12


def test_a_trial_that_was_running_goes_on_in_its_folder_and_counts_once(tmp_path):
    made = search(tmp_path, trials=3)
    begun = tmp_path / f"{tmp_path.name}-0001" / "metrics.jsonl"

    def stop():
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    runner = fakes.sweep(made, [Share(), Share()], fakes.command(evaluations=2, seconds=5))
    thread.join()
    assert runner.stopped == signal.SIGINT
    values = drawn(made)
    assert [trial.state for trial in made.trials()] == ["open", "open"]
    again = search(tmp_path, trials=3)
    fakes.sweep(again, [Share()])
    assert drawn(again)[:2] == values and [trial.state for trial in again.trials()] == ["complete"] * 3
    assert (begun.parent / "notes.jsonl").read_text().count("started") == 2


def test_a_killed_sweep_leaves_trials_that_the_next_one_takes_up_whether_recorded_or_not(tmp_path):
    killed = search(tmp_path, trials=2)
    recorded, bare = killed.next(), killed.next()
    (bare.folder / "trial.json").unlink()
    again = search(tmp_path, trials=2)
    assert [again.next(), again.next(), again.next()] == [recorded, bare, None]


def test_on_a_shared_database_only_ones_own_trials_are_taken_up(tmp_path):
    shared = {"storage": f"sqlite:///{tmp_path / 'shared.db'}", "study": "clicks", "trials": 3}
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    mine, other = search(here, **shared).next(), search(there, **shared).next()
    assert (mine.number, other.number) == (0, 1)
    again = search(here, **shared)
    assert again.next() == mine
    assert again.next().number == 2 and again.next() is None, "three trials, on however many machines"


def test_hopeless_trials_are_stopped_and_told_as_pruned(tmp_path):
    # Two good trials end first; then the median of the others is above what a bad one reaches.
    made = search(tmp_path, dimensions=("lr=interval(1e-3,1.001e-3)",), trials=2, startup_trials=2)
    fakes.sweep(made, [Share()], fakes.command(evaluations=3))
    bad = search(tmp_path, dimensions=("lr=interval(0.9,1.0)",), trials=3, startup_trials=2, prune_after=2)
    fakes.sweep(bad, [Share()], fakes.command(evaluations=3, seconds=1.5))
    last = bad.trials()[2]
    assert (last.state, last.reason) == ("pruned", "stopped after 2 evaluations")
    assert last.value == pytest.approx(fakes.auc(last.values["lr"]) * 2 / 3, abs=1e-4)
    kept = search(tmp_path, dimensions=("lr=interval(0.9,1.0)",), trials=4, startup_trials=2, prune=False)
    fakes.sweep(kept, [Share()], fakes.command(evaluations=3, seconds=0.1))
    assert kept.trials()[3].state == "complete"


def test_values_that_were_tried_are_not_tried_again(tmp_path):
    made = search(tmp_path, dimensions=("lr=1e-4,1e-3,1e-2",), trials=12, startup_trials=3)
    fakes.sweep(made, [Share()])
    ended = made.trials()
    assert len(ended) == 12 and len(list(tmp_path.glob("*/notes.jsonl"))) == len({t.values["lr"] for t in ended}) == 3
    assert all(trial.value == pytest.approx(fakes.auc(trial.values["lr"])) for trial in ended)
    copy = next(trial for trial in ended if trial.reason)
    assert copy.reason.startswith("as trial ") and copy.folder == ended[int(copy.reason.split()[-1])].folder


def test_a_loss_is_made_small(tmp_path):
    made = search(tmp_path, trials=3, metric="valid.logloss")
    fakes.sweep(made, [Share()], metric="valid.logloss")
    assert made._study.best_value == pytest.approx(min(trial.value for trial in made.trials()))
    with pytest.raises(ValueError, match="begun to minimize, not by valid.auc"):
        search(tmp_path, trials=3)


@pytest.mark.parametrize("url", ["sqlite:////absent/folder/study.db", "nonsense", "nodatabase://host/study"])
def test_a_database_that_is_not_there_is_one_line(url, tmp_path):
    with pytest.raises(ValueError, match="database cannot be opened.*sweep.storage") as caught:
        search(tmp_path, storage=url)
    assert "\n" not in str(caught.value)
