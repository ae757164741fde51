"""TensorBoard by itself, MLflow and Weights & Biases in their stead: what each is told, and that none harms a run."""

import json
import sys
import threading
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.config.monitoring import LoggingConfig
from trainer.monitoring import trackers
from trainer.monitoring.trackers import Trackers, check_installed, make_trackers, numbers

TREE = {"model": {"name": "deepfm"}, "seed": 3, "data": {"name": "tiny", "schema": {"features": {"x": {"table": "t"}}}}}
LINE = {
    "auc": 0.7,
    "logloss": None,
    "rows": 500,
    "data": {"user@x.null": 3},
    "slices": {"device": {"1": {"auc": 0.6}}},
    "alerts": [{"name": "a", "step": 10, "message": "labels all 0"}],
}


class Module:
    """A package of a tracker: notes every call."""

    def __init__(self, name):
        self.calls, self.name, self.failing = [], name, set()
        self.thread = None

    def __getattr__(self, called):
        def call(*arguments, **options):
            self.thread = threading.current_thread()
            if called in self.failing:
                raise ConnectionError(f"{self.name} does not answer\nmore")
            self.calls.append((called, arguments, options))
            if called in ("start_run", "init"):
                run_id = options.get("run_id") or options.get("id") or "new-id"
                self.id = run_id
                return SimpleNamespace(info=SimpleNamespace(run_id=run_id)) if called == "start_run" else self
            return None

        return call


@pytest.fixture
def fakes(monkeypatch):
    found = {name: Module(name) for name in ("mlflow", "wandb")}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def run(folder, step=0, failure=None, here=True, **which):
    folder.mkdir(parents=True, exist_ok=True)
    with make_trackers(LoggingConfig(**which), folder, TREE, step, here=here) as told:
        told.log("train", LINE, step + 10)
        if failure is not None:
            raise failure


def test_mlflow_is_told_all_numbers_and_a_resumed_run_goes_on_in_the_same_one(fakes, tmp_path):
    folder, mlflow = tmp_path / "deepfm-tiny" / "2026-11-21", fakes["mlflow"]
    run(folder, tensorboard=False, mlflow=True)
    (start, config, parameters, metrics, tag, end) = mlflow.calls
    assert start == ("start_run", (), {"run_name": "deepfm-tiny/2026-11-21"})
    assert config == ("log_dict", (TREE, "config.yaml"), {})
    assert parameters == ("log_params", ({"model.name": "deepfm", "seed": "3", "data.name": "tiny"},), {})
    figures = {"train/auc": 0.7, "train/rows": 500, "train/data/user_x.null": 3}
    assert metrics == ("log_metrics", (figures,), {"step": 10, "run_id": "new-id"})
    assert tag == ("set_tag", ("alert.step-10", "labels all 0"), {}) and end == ("end_run", ("FINISHED",), {})
    assert json.loads((folder / "trackers.json").read_text()) == {"mlflow": "new-id"}
    assert mlflow.thread is not threading.current_thread(), "training waits for no server"
    mlflow.calls.clear()
    with pytest.raises(RuntimeError):
        run(folder, 20, RuntimeError("a bug"), tensorboard=False, mlflow=True)
    assert mlflow.calls[0] == ("start_run", (), {"run_id": "new-id"}) and mlflow.calls[-1][1] == ("FAILED",)
    assert "log_params" not in [name for name, *_ in mlflow.calls], "parameters are for good"


def test_weights_and_biases_are_told_the_same(fakes, tmp_path):
    folder, wandb = tmp_path / "deepfm-tiny" / "2026-11-21", fakes["wandb"]
    run(folder, tensorboard=False, wandb=True)
    (start, metrics, alert, end) = wandb.calls
    assert start == ("init", (), {"dir": str(folder), "config": TREE, "name": "deepfm-tiny/2026-11-21"})
    assert metrics == ("log", ({"train/auc": 0.7, "train/rows": 500, "train/data/user_x.null": 3},), {"step": 10})
    assert alert[0] == "alert" and alert[2]["text"] == "labels all 0" and end == ("finish", (), {"exit_code": 0})
    wandb.calls.clear()
    run(folder, 20, tensorboard=False, wandb=True)
    assert wandb.calls[0][2] == {"dir": str(folder), "config": TREE, "id": "new-id", "resume": "allow"}


def test_tensorboard_is_told_by_default_and_a_resumed_run_replaces_what_it_trains_again(tmp_path):
    run(tmp_path, 0)
    run(tmp_path, 10)
    run(tmp_path, 5)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {"train/auc", "train/rows", "train/data/user_x.null"}
    assert [event.step for event in found.Scalars("train/auc")] == [15], "20 and 10 are behind the restart at 5"
    (text,) = (event for event in found.Tensors("alerts/text_summary") if event.step == 15)
    assert text.tensor_proto.string_val == [b"labels all 0"]


def test_a_tracker_that_fails_is_given_up_with_one_warning_and_the_others_go_on(fakes, tmp_path, capsys):
    fakes["mlflow"].failing.add("log_metrics")
    fakes["wandb"].failing.add("init")
    run(tmp_path, tensorboard=True, mlflow=True, wandb=True)
    told = capsys.readouterr().err
    assert told.count("warning: mlflow gets nothing more of this run (ConnectionError: mlflow does not answer)") == 1
    assert told.count("warning: wandb gets nothing more") == 1 and told.count("warning") == 2
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/auc")[0].step == 10


def test_a_tracker_that_hangs_holds_a_run_up_for_a_bounded_time(monkeypatch, capsys):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    answered = threading.Event()
    told = Trackers({"slow": answered.wait})
    with told:
        told.log("train", LINE, 1)
    assert not answered.is_set() and "slow did not take everything" in capsys.readouterr().err
    answered.set()


def test_other_ranks_and_a_run_without_trackers_tell_nobody(fakes, tmp_path):
    run(tmp_path, here=False, mlflow=True)
    run(tmp_path, tensorboard=False)
    assert fakes["mlflow"].calls == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_line(name, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None if package == name else object())
    check_installed(LoggingConfig())
    with pytest.raises(ValueError, match=rf"logging\.{name}=true, but the package '{name}' .*pip install {name}"):
        check_installed(LoggingConfig(**{name: True}))


def test_names_of_numbers_are_paths():
    found = dict(numbers({"a": 1, "b": {"c": 2.5, "d": None, "e": "text", "f": True}, "slices": {"g": {"auc": 1}}}))
    assert found == {"a": 1, "b/c": 2.5}
