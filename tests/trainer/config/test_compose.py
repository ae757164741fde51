"""Every shipped configuration composes and instantiates; every mistake is one clear line with the nearest valid names."""

from pathlib import Path

import pytest
import torch

import conf
from data_loaders.errors import UserError
from trainer.config.compose import compose, from_yaml, parse
from trainer.config.job import RunConfig
from trainer.models.construct import build_model

CONF = Path(conf.__file__).parent
ROOT = "data.root=somewhere"


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_composes_and_builds(experiment):
    config = compose([f"experiment={experiment}", ROOT]).config
    model = build_model(config.model, config.data.schema, config.seed)
    assert isinstance(model, torch.nn.Module)
    assert config.model["name"] in experiment and config.data.name in experiment


@pytest.mark.parametrize("data", names("data"))
@pytest.mark.parametrize("model", names("model"))
def test_every_model_composes_with_every_data_set(model, data):
    config = compose([f"model={model}", f"data={data}", ROOT]).config
    assert config.run.name == f"{model}-{data}"
    assert (config.optim.wide.name == "ftrl") == (model in ("wide_deep", "lr"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data=ml1m"], ["data.root has no value"]),
        (["model=depfm"], ["model=depfm", "did you mean deepfm"]),
        (["data=tirvago"], ["did you mean trivago", "criteo39"]),
        (["optim.dence.lr=1"], ["optim.dence", "did you mean optim.dense?"]),
        (["+colour=red"], ["colour is not a known key"]),
        (["optim.dense.lr=fast"], ["optim.dense.lr is 'fast': expected a number"]),
        (["optim.dense.lr=-1"], ["optim.dense.lr is -1"]),
        (["optim.dense.lr=nan"], ["optim.dense.lr is nan"]),
        (["optim.tables.name=ftrl"], ["optim.tables.name is 'ftrl'", "optim.wide.name=ftrl"]),
        (["optim.tables.name=adagrat"], ["did you mean 'adagrad'"]),
        (["sharding.types=[row]"], ["'row'", "row_wise"]),
        (["+sharding.by_table.itm=row_wise"], ["'itm'", "did you mean 'item'"]),
        (["batch_size=0"], ["batch_size is 0"]),
        (["batch_size=1000000000000"], ["batch_size is 1000000000000", "at most 2147483647"]),
        (["seed=18446744073709551616"], ["seed is 18446744073709551616", "from 0 to 2^63 - 1"]),
        (["seed=-1"], ["seed is -1"]),
        (["data.synthetic.seed=-1"], ["data.synthetic.seed is -1"]),
        (["epochs=1000000000000000000000"], ["epochs is 1000000000000000000000", "below 2^63"]),
        (["timeout_seconds=1e10"], ["timeout_seconds is 10000000000.0", "at most 1000000000 seconds"]),
        (["run.dir="], ["run.dir is empty", "or null"]),
        (["run.root="], ["run.root is empty"]),
        (["batch_size=1000"], ["batch_size is 1000", "batch_size=1024", "50"]),
        (["batch_size=1000000000000001"], ["batch_size is 1000000000000001", "at most 2147483647"]),
        (["checkpoint.keep=1"], ["checkpoint.keep is 1"]),
        (["run.name=../../x"], ["run.name"]),
        (["model.hidden_units=wide"], ["model.hidden_units"]),
        (["+model.hiden_units=[8]"], ["model.hiden_units", "did you mean hidden_units"]),
        (["data.schema.features.item_id.kind=dens"], ["schema.features.item_id.kind", "did you mean 'dense'"]),
        (["data.schema.features.item_id.table=itme"], ["did you mean 'item'"]),
        (["data.schema.embedding_dim=10"], ["embedding_dim is 10", "multiple of 4"]),
        (["just words"], ["'just words' is not an override"]),
        (["model.name=unittest.__main__"], ["unittest.__main__ defines no 'Model'"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_remedy(overrides, expected):
    with pytest.raises(UserError) as caught:
        compose(overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_a_folder_of_ones_own_adds_data_sets_and_experiments(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(
        "name: mine\nroot: logs\ntrain: [train]\nschema:\n  label: clicked\n  tables: {ad: {num_embeddings: 100}}\n"
        "  features: {ad: {kind: sparse, table: ad}}\n"
    )
    (tmp_path / "experiment" / "first.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /data: mine\n  - override /model: wide_deep\n  - _self_\nbatch_size: 128\n"
    )
    config = compose(["--config-dir", str(tmp_path), "experiment=first"]).config
    assert (config.data.name, config.model["name"], config.batch_size) == ("mine", "wide_deep", 128)
    with pytest.raises(UserError, match="not a folder"):
        compose(["--config-dir", str(tmp_path / "absent")])


def test_several_folders_of_ones_own_add_up_and_do_not_hide_each_other(tmp_path):
    for name, batch_size in (("a", 192), ("b", 384)):
        (tmp_path / name / "experiment").mkdir(parents=True)
        (tmp_path / name / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\nbatch_size: {batch_size}\n")
    both = ["--config-dir", str(tmp_path / "a"), "model=din", "--config-dir", str(tmp_path / "b")]
    assert [compose([*both, f"experiment={name}"]).config.batch_size for name in "ab"] == [192, 384]
    (tmp_path / "b" / "experiment" / "a.yaml").write_text("# @package _global_\nbatch_size: 96\n")
    with pytest.raises(ValueError, match="b/experiment/a.yaml: .*a/experiment/a.yaml has the same name"):
        compose([*both, "experiment=a"])


@pytest.mark.parametrize("name", ["day=2026-11-01", "two words", "it's", "a,b", "[c]"])
def test_a_folder_of_configuration_may_have_any_name(tmp_path, name):
    (tmp_path / name / "experiment").mkdir(parents=True)
    (tmp_path / name / "experiment" / "first.yaml").write_text("# @package _global_\nbatch_size: 192\n")
    assert compose(["--config-dir", str(tmp_path / name), "experiment=first"]).config.batch_size == 192


def test_the_recorded_configuration_composes_to_the_same(tmp_path):
    import yaml

    composed = compose(["model=din", "data=trivago", ROOT, "model.dropout=0.25"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(composed.tree))
    again = from_yaml(tmp_path / "config.yaml")
    assert again.config == composed.config and again.tree == composed.tree
    assert from_yaml(tmp_path / "config.yaml", ["batch_size=128"]).config.batch_size == 128
    with pytest.raises(UserError, match="does not exist"):
        from_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize("place", range(4))
def test_options_may_stand_between_overrides(tmp_path, place):
    words = ["model=din", "data=synthetic", "seed=3"]
    words[place:place] = ["--config-dir", str(tmp_path)]
    words.insert(place, "--print-config")
    options, overrides = parse(words)
    assert (options.config_dir, options.print_config) == ([str(tmp_path)], True)
    assert overrides == ["model=din", "data=synthetic", "seed=3"]


def test_a_null_byte_in_a_path_is_a_line():
    with pytest.raises(ValueError, match="run.dir is 'a.x00b', with a null byte: give the path of a folder, or null"):
        RunConfig(dir="a\0b")
