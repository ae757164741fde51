"""What a configuration and a run folder cannot do (failure matrix, rows S4 to S7, S9; S1, S2, S3 and S8 are checkpoints':
tests/trainer/checkpoint/test_security.py)."""

import json
import re

import pytest
import yaml

from data_loaders.errors import UserError
from data_loaders.prepare import compose as recipes
from tests.helpers import tiny
from trainer.config.compose import compose, from_yaml
from trainer.models import load_model_class
from trainer.runtime import process, run_folder


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


def test_no_module_runs_before_its_source_defines_a_model(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    for name, text in {
        "__init__": "raise SystemExit('run')",
        "tool": "x = 1",
        "wrong": "def Model(:",
        "fake": "Model = 1",
        "function": "def Model(schema, *, device): ...",
        "other": "class Model: ...",
    }.items():
        (tmp_path / "theirs" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, expected in {
        "unittest.__main__": "defines no 'Model'",
        "theirs.tool": f"defines no 'Model': add `Model = YourClass` to {tmp_path}/theirs/tool.py",
        "theirs.wrong": "theirs/wrong.py, line 1 is no valid Python",
        "theirs.absent": "there is no module theirs.absent: set PYTHONPATH to the folder that holds theirs/absent.py",
        "math.x": "there is no module math.x",
        "depfm": "did you mean deepfm",
        "mine": "a module of your own is named with its package (my_package.my_model)",
    }.items():
        with pytest.raises(ValueError, match=re.escape(expected)):
            load_model_class(name)
    (tmp_path / "theirs" / "__init__.py").write_text("")
    (tmp_path / "theirs" / "leaves.py").write_text("import sys\nsys.exit(0)\nclass Model: ...")
    with pytest.raises(ValueError, match="theirs.leaves ends the process while it is imported"):
        load_model_class("theirs.leaves")
    for name in ("fake", "function", "other"):
        with pytest.raises(ValueError, match="is no class of torch.nn.Module"):
            load_model_class(f"theirs.{name}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "models").mkdir(parents=True)
    (tmp_path / "mine" / "models" / "nfm.py").write_text("")
    with pytest.raises(ValueError, match="it lies in mine/models/nfm.py, so set PYTHONPATH=mine"):
        load_model_class("models.nfm")


def test_a_run_folder_does_not_choose_the_code_that_is_run(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text("")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "model.py").write_text("from trainer.models.lr import Model\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = tiny.job(tmp_path).tree
    tree["model"] = {"name": "package.model"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="if it is your model, say so by adding model.name=package.model"):
        from_yaml(tmp_path / "config.yaml")
    assert from_yaml(tmp_path / "config.yaml", ["model.name=package.model"]).config.model == {"name": "package.model"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.root=${oc.env:OUR_SECRET}", "data.test=['${data.root}/a']"],
        ["data.root=${oc.env:OUR_SECRET}", "run.root=${data.root}/runs", "data.name=${run.root}"],
        ["data.root='${oc.env:NOT_SET_HERE,${oc.env:OUR_SECRET}}'"],
        ["data.valid=['a/${oc.env:OUR_SECRET}/b']", "data.test=${data.valid}"],
        ["run.name=${hydra:runtime.choices.model}-${oc.env:OUR_SECRET}"],
        ["+optim.dense.options={a: 'OUR', b: '${oc.env:${.a}_SECRET}'}"],
        ["+optim.dense.options={nested: {access_key: hunter2, Password: [hunter2]}}"],
        ["data.root='abfs://c@acct.dfs.core.windows.net/p?sv=2024&sig=hunter2'"],
        ["data.root='abfs://c/p?connection_string=AccountKey=hunter2'"],
        ["data.prepared='s3://AKIA:hunter2@bucket/p'", "warm_start.path='s3://AKIA:hunter2@bucket/p'"],
        ["data.new_since='s3://b?X-Amz-Signature=hunter2'", "run.root='s3://K:hunter2@b'"],
    ],
)
def test_no_secret_is_recorded(overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("OUR_SECRET", "hunter2")
    composed = tiny.job(tmp_path, *overrides)
    assert "hunter2" not in yaml.safe_dump(composed.tree)
    if "oc.env" in "".join(overrides):  # what was asked for is what is recorded, and can be asked again
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(composed.tree))
        assert from_yaml(tmp_path / "config.yaml").config == composed.config


@pytest.mark.parametrize(
    "key", ["data.root", "data.prepared", "data.new_since", "warm_start.path", "run.root", "data.train"]
)
def test_credentials_in_an_address_are_refused_by_its_key(key, tmp_path):
    value = "['s3://AKIA:hunter2@b/p']" if key == "data.train" else "'s3://AKIA:hunter2@b/p'"
    with pytest.raises(ValueError, match=f"^{key} holds credentials") as caught:
        tiny.job(tmp_path, f"{key}={value}").config.check_addresses()
    assert "hunter2" not in str(caught.value)


def test_no_secret_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("OUR_SECRET", "hunter2")
    for override in (
        "optim.dense.lr=${oc.env:OUR_SECRET}",
        "device=${oc.env:OUR_SECRET}",
        "+nope.token=hunter2",
        "data.train='s3://AKIA:hunter2@b/p'",
        "+model.password=hunter2",
    ):
        with pytest.raises(UserError) as caught:
            tiny.job(tmp_path, override)
        assert "hunter2" not in str(caught.value)
    assert process.explanation(OSError("s3://K:hunter2@b/p is not there")) == "s3://<redacted>@b/p is not there"


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
