"""Mistakes in a user's own files, and in what goes over a recorded configuration: one line with file, key and remedy."""

import pytest
import yaml

from data_loaders.errors import UserError
from trainer.config.compose import compose, from_yaml

SHOP = """name: shop
root: logs
train: [a.parquet]
schema:
  label: clicked
  embedding_dim: 16
  tables: {user: {num_embeddings: 100}}
  features: {user_id: {kind: sparse, table: user}}
"""
HEADER = "# @package _global_\n"


def message(folder, files, *overrides):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(UserError) as caught:
        compose(["--config-dir", str(folder), *overrides])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            "embedding_dim",
            "embeding_dim",
            "data.schema.embeding_dim is not a known key; did you mean data.schema.embedding_dim?",
        ),
        ("16", "sixteen", "data.schema.embedding_dim is 'sixteen': expected a whole number"),
        ("table: user", "tabel: user", "data.schema.features.user_id.tabel is not a known key; did you mean"),
        ("kind: sparse", "kind: spars", "schema.features.user_id.kind: 'spars' is not known; did you mean 'sparse'?"),
        ("table: user", "table: usr", "schema.features.user_id.table: 'usr' is not known; did you mean 'user'?"),
        ("[a.parquet]", "a.parquet", "data.train is 'a.parquet': expected a list: write [a.parquet]"),
        ("[a.parquet]", "[[a]]", "data.train[0] is ['a']: expected a word or text"),
        ("{user_id: {kind: sparse, table: user}}", "[user_id]", "data.schema.features is ['user_id']: expected a map"),
        ("clicked", "null", "data.schema.label is null"),
        ("clicked", "yes", "quote the word"),
        ("100", "1e6", "expected a whole number: write 1000000"),
        ("logs", "${oc.env:NOT_SET_HERE}", "the environment variable NOT_SET_HERE is not set"),
        ("logs", "${nope}", "data.root is '${nope}': there is no such key"),
        ("logs", "${data.root}", "it refers to itself"),
        ("name: shop", "\tname: shop", "line 1: a tab"),
        ("name: shop", "# @package dat", "'# @package dat' names no part of the configuration; did you mean data?"),
        (SHOP, "", "is empty: expected keys and values"),
        ("name: shop", "defaults: [shpo]\nname: shop", "data=shpo: there is no conf/data/shpo.yaml"),
    ],
)
def test_a_data_file(tmp_path, before, after, expected):
    said = message(tmp_path, {"data/shop.yaml": SHOP.replace(before, after)}, "data=shop", "model=lr")
    assert str(tmp_path / "data" / "shop.yaml") in said and expected in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch_size: 128\n", "begin the file with the line '# @package _global_'"),
        (HEADER + "batch_sise: 128\n", "first.yaml: batch_sise is not a known key; did you mean batch_size?"),
        (HEADER + "optim: {dense: {lr: -1}}\n", "first.yaml: optim.dense.lr is -1"),
        (HEADER + "defaults: [/data: ml1m]\n", "write '- override /data: ml1m'"),
        (HEADER + "defaults: [override data: ml1m]\n", "write '- override /data: ml1m'"),
        (
            HEADER + "defaults: [override /dta: ml1m]\n",
            "'override /dta' overrides what conf/train.yaml does not choose; did you",
        ),
        (HEADER + "defaults: [override /data: tirvago]\n", "did you mean trivago?"),
        (HEADER + "defaults: {data: ml1m}\n", "first.yaml: defaults is {'data': 'ml1m'}: expected a list"),
        (HEADER + "defaults: [first]\n", "choose each other in a circle"),
    ],
)
def test_an_experiment(tmp_path, text, expected):
    assert expected in message(tmp_path, {"experiment/first.yaml": text}, "experiment=first", "data.root=x")


def test_files_of_the_other_groups(tmp_path):
    files = {
        "model/mine.yaml": "name: deepfm\nhiden_units: [1]\n",
        "optim/other.yaml": "dense: {name: adm}\n",
        "data/ml1m.yaml": SHOP,
        "data/other.yml": SHOP,
    }
    hiden = message(tmp_path, files, "model=mine", "data.root=x")
    assert "model/mine.yaml: model.hiden_units is not a hyperparameter of deepfm; did you mean hidden_units" in hiden
    assert "optim/other.yaml: optim.dense.name: 'adm' is not known" in message(
        tmp_path, {}, "optim=other", "data.root=x"
    )
    assert "conf/data/ml1m.yaml has the same name" in message(tmp_path, {}, "data=ml1m")
    assert "other.yml must be called other.yaml" in message(tmp_path, {}, "data=other")
    # What the command line gives is not the file's fault.
    assert message(tmp_path, {}, "optim=other", "optim.dense.name=amd", "data.root=x").startswith("optim.dense.name")


def test_what_multiplies_itself_ends():
    bomb = [f"+optim.dense.options.x{n}=${{.x{n - 1}}}${{.x{n - 1}}}" for n in range(1, 40)]
    for overrides in (["+optim.dense.options.x0=aaaaaaaa", *bomb], ["+a=" + "[" * 3000], ["+model.a=" + "{a:" * 300]):
        with pytest.raises(UserError, match="repeats other keys too often|nested too deeply|is not an override"):
            compose(["data.root=x", *overrides])


def test_what_goes_over_a_recorded_configuration(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(compose(["model=lr", "data=synthetic", "data.root=x"]).tree))
    for override, expected in {
        "data.rot=x": "data.rot is not a known key; did you mean data.root?",
        "batch_size=8k": "batch_size is '8k': expected a whole number",
        "data.test=a.parquet": "expected a list: write [a.parquet]",
        "data.test=[a": "a '[' or '{' that is not closed",
        "nope": "'nope' is not an override",
        "data.root=${oc.env:NOT_SET_HERE}": "the environment variable NOT_SET_HERE is not set",
    }.items():
        with pytest.raises(UserError) as caught:
            from_yaml(path, [override])
        assert expected in str(caught.value)
    for text, expected in {"": "is empty", "[1]": "is empty or no map", "data: " + "[" * 999: "50 deep"}.items():
        path.write_text(text)
        with pytest.raises(UserError, match=expected):
            from_yaml(path)
