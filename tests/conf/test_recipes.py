"""Every recipe is whole: it composes, says what it needs, and is in the guide."""

import functools
import re
from pathlib import Path

import pytest
import sqlglot
import yaml
from omegaconf import OmegaConf

from data_loaders.prepare import compose

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "prepare.md").read_text()
RECIPES = compose.names()


load = functools.cache(compose.load)


OWN = ("_raw", "_vocabulary")  # of the project's own samples


def comment(name):
    lines = (ROOT / "conf" / "recipe" / f"{name}.yaml").read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.lstrip("# ") for line in head)


def steps(declaration):
    for where, view in (*declaration.views.items(), ("examples", declaration.examples)):
        yield from view.parsed(where)


def expressions(declaration):
    for step in steps(declaration):
        if step.name == "where":
            yield step.argument
        if step.name == "select":
            yield from step.argument.values()
    for feature in declaration.schema.features.values():
        if feature.make.history and feature.make.history.where:
            yield feature.make.history.where


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_valid_declaration_of_its_own_name(name):
    assert load(name).name == name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recorded_recipe_is_read_back_the_same(name):
    declaration = load(name)
    recorded = yaml.safe_load(yaml.safe_dump(compose.to_plain(declaration)))
    assert compose.check(recorded, "recorded") == declaration


@pytest.mark.parametrize("name", RECIPES)
def test_the_comment_says_what_input_holds_and_what_to_run(name):
    said = comment(name)
    assert "input= holds" in said or "From and input=: see recipe" in said
    assert f"clicktrainer prepare recipe={name} input=" in said
    assert f"clicktrainer train --config-dir data/{name} data={name} model=" in said
    assert not name.endswith(OWN) or "If you have these files" in said
    assert name.endswith(OWN) or "From: https://" in said or "see recipe" in said


@pytest.mark.parametrize("name", [name for name in RECIPES if "see recipe" not in comment(name)])
def test_the_comment_names_the_files_of_all_sources(name):
    for source in load(name).sources.values():
        for file in source.files:
            stem = re.split(r"[*]", file.replace("[A-Z]*", "<Category>"))[0]
            assert stem in comment(name), file


@pytest.mark.parametrize("name", RECIPES)
def test_expressions_translate_to_spark(name):
    for expression in expressions(load(name)):
        select = f"SELECT {expression} FROM rows"
        sqlglot.transpile(select, read="duckdb", write="spark", unsupported_level=sqlglot.ErrorLevel.RAISE)


@pytest.mark.parametrize("name", RECIPES)
def test_every_dense_feature_says_what_a_missing_value_becomes(name):
    complete = {"census_raw"}  # the set has all its numbers
    for feature, spec in load(name).schema.features.items():
        assert spec.kind != "dense" or spec.fill is not None or name in complete, feature


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_splits_off_valid_and_test(name):
    split = load(name).split
    kinds = [kind for kind in (split.time, split.hash, split.last) if kind]
    assert split.column or (kinds[0].valid and kinds[0].test)


@pytest.mark.parametrize("name", RECIPES)
def test_the_guide_names_every_recipe(name):
    assert f"`{name}`" in GUIDE


@pytest.mark.parametrize("name", ["ml1m", "trivago"])
def test_a_raw_recipe_has_the_features_of_the_ready_data_set(name):
    ready = OmegaConf.load(ROOT / "conf" / "data" / f"{name}.yaml").schema
    made = load(f"{name}_raw").schema
    assert list(made.features) == list(ready.features)
    for feature, spec in ready.features.items():
        for key in ("kind", "table", "max_length", "target", "history"):
            assert getattr(made.features[feature], key) == spec.get(key), (feature, key)
    assert {n: (list(c.columns), c.num_buckets) for n, c in made.crosses.items()} == {
        n: (list(c.columns), c.num_buckets) for n, c in ready.crosses.items()
    }


def test_the_example_of_the_guide_is_a_valid_declaration(tmp_path):
    example = re.search(r"```yaml\n(name: shop.*?)```", GUIDE, re.S).group(1)
    (tmp_path / "shop.yaml").write_text(example)
    declaration = compose.load(str(tmp_path / "shop.yaml"))
    assert [step.name for step in steps(declaration)] == ["where", "clicks", "join", "select"]


def test_the_guide_lists_every_step_number_type_and_key():
    from data_loaders.prepare import declaration as module

    for name in (*module.STEPS, *module.NUMBERS, *module.FORMATS):
        assert re.search(rf"`\{{?{name}\b", GUIDE), name
    for kind in (module.Explode, module.Join, module.Clicks, module.Negatives, module.History, module.Source):
        for key in kind.__dataclass_fields__:
            assert re.search(rf"\b{key}\b", GUIDE), (kind.__name__, key)


def test_a_join_may_say_on_without_quotes(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "name: r\nsources: {a: {files: [a.parquet]}, b: {files: [b.parquet]}}\n"
        "examples: {start: a, steps: [{join: {table: b, on: [key]}}]}\nschema: {features: {x: {kind: dense}}}\n"
    )
    declaration = compose.load(str(tmp_path / "r.yaml"))
    assert declaration.examples.parsed("examples")[0].argument.on == ["key"]
    assert compose.check(compose.to_plain(declaration), "r") == declaration
