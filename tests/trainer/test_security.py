"""What a configuration and a run folder cannot do (failure matrix, rows S4 to S7, S9; S1, S2, S3 and S8 are checkpoints':
tests/trainer/checkpoint/test_security.py)."""

import json

import pytest
import yaml

from data_loaders.prepare import compose as recipes
from tests import tiny
from trainer import run_folder
from trainer.compose import UserError, compose, from_yaml


@pytest.mark.parametrize(
    "override",
    [
        "+model._target_=builtins.open",
        "+data._target_=os.system",
        "+data.schema._target_=torch.load",
        "+optim.dense._target_=torch.load",
        "+_target_=os.system",
    ],
)
def test_a_configuration_names_no_code_to_run(override, tmp_path):
    with pytest.raises(UserError, match="_target_"):
        tiny.job(tmp_path, override)


@pytest.mark.parametrize("name", ["os", "builtins", "subprocess"])
def test_a_model_is_a_module_with_a_model(name, tmp_path):
    with pytest.raises(ValueError, match=name):
        tiny.job(tmp_path, f"model.name={name}")


def test_a_warm_start_stays_under_its_trust_root(tmp_path):
    trusted, elsewhere = tmp_path / "models", tmp_path / "models-of-others"
    trusted.mkdir()
    elsewhere.mkdir()
    (trusted / "link").symlink_to(elsewhere)
    for path in (trusted, trusted / "run", f"{trusted}/a/../run"):
        tiny.job(tmp_path, f"warm_start.path={path}", f"warm_start.trust_root={trusted}")
    for path in (elsewhere, trusted / "link" / "run", f"{trusted}/../run", "s3://models/run"):
        with pytest.raises(ValueError, match="outside warm_start.trust_root"):
            tiny.job(tmp_path, f"warm_start.path={path}", f"warm_start.trust_root={trusted}")
    tiny.job(tmp_path, "warm_start.path=s3://models/run", "warm_start.trust_root=s3://models")
    with pytest.raises(ValueError, match="outside warm_start.trust_root"):
        tiny.job(tmp_path, "warm_start.path=s3://models/../other", "warm_start.trust_root=s3://models")


def test_what_the_environment_says_is_not_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("OUR_SECRET", "hunter2")
    composed = tiny.job(tmp_path, "run.name=${oc.env:OUR_SECRET}", "data.valid=['${oc.env:OUR_SECRET}/x']")
    assert composed.config.run.name == "hunter2" and composed.config.data.valid == ["hunter2/x"]
    assert "hunter2" not in json.dumps(composed.tree)
    assert composed.tree["run"]["name"] == "${oc.env:OUR_SECRET}"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(composed.tree))
    again = from_yaml(tmp_path / "config.yaml")
    assert again.config.run.name == "hunter2" and "hunter2" not in json.dumps(again.tree)


def test_an_unknown_secret_is_not_repeated(tmp_path):
    with pytest.raises(UserError) as told:
        tiny.job(tmp_path, "+api_token=hunter2")
    assert "api_token" in str(told.value) and "hunter2" not in str(told.value)


def test_yaml_makes_no_objects(tmp_path):
    evil = f"!!python/object/apply:os.system ['touch {tmp_path}/made']"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "evil.yaml").write_text(f"name: evil\nroot: {evil}\n")
    with pytest.raises(UserError):
        compose(["--config-dir", str(tmp_path), "data=evil"])
    (tmp_path / "recipe.yaml").write_text(f"name: {evil}\n")
    with pytest.raises(ValueError, match="recipe.yaml"):
        recipes.load(str(tmp_path / "recipe.yaml"), [])
    (tmp_path / "config.yaml").write_text(f"run: {evil}\n")
    with pytest.raises(UserError):
        from_yaml(tmp_path / "config.yaml")
    assert not (tmp_path / "made").exists()


def test_a_folder_that_anyone_can_write_is_warned_of(tmp_path, capsys):
    run_folder.lock(tmp_path).close()
    assert capsys.readouterr().err == ""
    tmp_path.chmod(0o777)
    run_folder.lock(tmp_path).close()
    assert "can be written by every user" in capsys.readouterr().err
