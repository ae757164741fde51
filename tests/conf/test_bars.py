"""BARS: what is published has its recipe and its experiment, and they compose with what ``prepare`` writes."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

import conf
from bench import bars
from data_loaders.prepare import compose as recipes
from trainer.config.compose import compose
from trainer.models.construct import build_model

CONF = Path(conf.__file__).parent
BARS = bars.known()
GUIDE = (CONF.parent / "docs" / "bars.md").read_text()
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment" / "bars").glob("*.yaml"))


def prepared(folder, name):
    """``data/<name>.yaml`` as ``prepare`` writes it, every table of 64 rows. Returns ``folder``."""
    schema = recipes.load(name).schema
    filled = schema.filled(dict.fromkeys(schema.tables, 64))
    splits = {split: [split] if split in BARS["data"][name]["rows"] else [] for split in ("train", "valid", "test")}
    (folder / "data").mkdir()
    tree = {"name": name, "root": str(folder), **splits, "schema": dataclasses.asdict(filled)}
    (folder / "data" / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return str(folder)


def test_every_published_result_has_an_experiment_and_data_with_a_recipe():
    assert sorted(BARS["results"]) == EXPERIMENTS
    assert {name for result in EXPERIMENTS for name in BARS["data"] if result.endswith(name)} == set(BARS["data"])
    for name, facts in BARS["data"].items():
        assert recipes.load(name).sources["log"].files == list(facts["md5"])
        assert all(len(digest) == 32 and int(digest, 16) for digest in facts["md5"].values())
        assert set(facts["values"]) <= {"all", *recipes.load(name).schema.tables}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_with_its_prepared_data_and_builds(tmp_path, name):
    data = next(data for data in BARS["data"] if name.endswith(data))
    config = compose(["--config-dir", prepared(tmp_path, data), f"experiment=bars/{name}"]).config
    assert f"{config.model['name']}_{config.data.name}" == name
    assert isinstance(build_model(config.model, config.data.schema, config.seed), torch.nn.Module)
    # As FuxiCTR trains: dense Adam on all rows, the best epoch on valid (or test, where there is no valid).
    for table in (config.optim.tables, *([config.optim.wide] if config.model["name"] != "din" else [])):
        assert (table.name, table.lr) == ("adam", config.optim.dense.lr) == (config.optim.dense.name, table.lr)
        assert not table.weight_decay or table.weight_decay_rows == "all"
    assert config.sharding.types == ["data_parallel"]
    assert config.optim.plateau.patience == 1 and config.early_stopping.patience in (1, 2)
    assert config.optim.dense.lr * config.optim.plateau.min_factor == pytest.approx(1e-6)
    assert config.checkpoint.restore_best and config.data.valid == (
        ["test"] if "gauc" in BARS["results"][name] else ["valid"]
    )
    assert config.evaluation.group_by in (None, *recipes.load(data).keep)
    assert all(table.init_std == 1e-4 for table in config.data.schema.tables.values())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_names_its_source_and_what_it_cannot_do(name):
    text = (CONF / "experiment" / "bars" / f"{name}.yaml").read_text()
    assert f"# Source: {BARS['results'][name]['source']}\n" in text
    assert "No exact counterpart here:" in text


def test_the_guide_names_every_experiment_and_data_set():
    for name in (*EXPERIMENTS, *BARS["data"]):
        assert f"`{name}`" in GUIDE, name
