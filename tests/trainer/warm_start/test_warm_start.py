"""A new run from an old run's checkpoint: what is kept, moved, new or lost, held against naive numpy; what is refused."""

import copy
import dataclasses
import io
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import conf
from data_loaders.schema import Cross, Feature, Schema, Table
from tests.helpers.old_runs import ADAGRAD, RUN_STEPS, Run, dense, plan_of, start, table, vocabulary
from tests.helpers.rounding import model_tolerance
from tests.helpers.samples import one_dim_schema, random_rows, small_schema
from trainer.checkpoint.format import Reader
from trainer.checkpoint.piece import Piece, whole_piece
from trainer.config.optim import TableOptimizerConfig
from trainer.config.warm_start import WarmStartConfig
from trainer.models import load_model_class
from trainer.models.construct import build_model
from trainer.optim.ftrl import ftrl_update
from trainer.warm_start import tables
from trainer.warm_start.sides import old_side
from trainer.warm_start.vocabularies import Vocabularies

MODELS = sorted(path.stem for path in (Path(conf.__file__).parent / "model").glob("*.yaml"))
ONE_WIDTH = ("autoint", "deepfm", "dlrm", "fibinet", "finalmlp", "fm", "fnn", "masknet", "pnn", "wukong", "xdeepfm")
# What becomes of one field depends on how many there are: a softmax, a mean or a norm over all of them, a state of all.
RELATIVE = ("autoint", "bst", "dien", "fibinet", "masknet", "wukong")
FTRL = TableOptimizerConfig("ftrl", lr=0.5, l1=0.05, l2=0.1, beta=0.7)


def plain_schema(users=12, **tables):
    """Ids of two vocabularies, numbers, and a cross of hashed and plain ids."""
    return Schema(
        embedding_dim=8,
        tables={"user": Table(users), "item": Table(9), "hashed": Table(20)} | tables,
        features={
            "price": Feature("dense"),
            "user_id": Feature("sparse", table="user"),
            "item_id": Feature("sparse", table="item"),
            "shop_id": Feature("sparse", table="hashed", ids="hash"),
        },
        crosses={"item_x_shop": Cross(["item_id", "shop_id"], 30)},
    )


@pytest.fixture
def folders(tmp_path):
    return Vocabularies(tmp_path / "old_data", tmp_path / "new_data")


# Kept.


@pytest.mark.parametrize("name", MODELS)
def test_a_run_that_differs_in_nothing_is_kept_to_the_bit(name, tmp_path):
    old, new = Run(one_dim_schema(), name, seed=1), Run(one_dim_schema(), name, seed=2, fresh=True)
    report = start(old.save(tmp_path / "step-7"), new)
    assert all(torch.equal(piece.tensor, old.now(piece.name)) for piece in new.pieces)
    assert {it.status for it in (*report.tables, *report.dense)} == {"kept"}
    assert {it.ids_kept for it in report.tables} == {100.0} and report.totals["rows"]["new"] == 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("schema", [one_dim_schema(), small_schema()], ids=["one width", "two widths"])
def test_the_columns_of_features_cover_their_parameters_exactly(name, schema):
    if name in ONE_WIDTH and schema.tables["category"].embedding_dim:
        pytest.skip(f"{name} has one width")
    covered = set()
    other = {
        "dcn_v2": {"rank": 2, "experts": 3, "structure": "parallel"},
        "din": {"intensity": True},
        "autoint": {"hidden_units": [4]},
        "masknet": {"block_units": [8] * 16},
        "xdeepfm": {"cross_units": [4] * 16},
    }
    for hyperparameters in ({}, *(found for key, found in other.items() if key == name)):
        model = build_model({"name": name, **hyperparameters}, schema, seed=1)
        shapes = {key: value.shape for key, value in model.named_parameters()}
        axes = {key: found for key, found in model.feature_axes(schema).items() if key in shapes}
        covered |= axes.keys()
        for key, (axis, blocks) in axes.items():
            for each in (axis,) if isinstance(axis, int) else axis:
                assert shapes[key][each] == sum(width for _, width in blocks), key
            owners = [(owner,) if isinstance(owner, str) else owner for owner, _ in blocks]
            assert {feature for features in owners for feature in features} <= {*schema.features}
        if "head.deep.layers.0.weight" in axes:
            assert {feature for feature, _ in axes["head.deep.layers.0.weight"][1]} == {*schema.features}
    assert covered == model.feature_axes(schema).keys()  # no name is misspelt


# Tables.


def test_a_table_grows_where_vocabularies_prove_that_no_id_moves_or_a_rule_says_so(tmp_path, folders):
    old = Run(plain_schema(12), seed=1)
    saved = old.save(tmp_path / "step-7")
    vocabulary(folders.old, "user", [f"u{i}" for i in range(10)])
    vocabulary(folders.new, "user", [f"u{i}" for i in range(17)])
    for vocabularies, rules in ((folders, {}), (None, {"grow": ["tables/*user*"]})):
        new = Run(plain_schema(19), seed=2, fresh=True)
        report = start(saved, new, vocabularies, **rules)
        for name in ("tables/user/weight", "tables/user/sum", "tables/wide_user_id/weight", "tables/wide_user_id/sum"):
            assert torch.equal(new.now(name)[:12], old.now(name))
            assert torch.equal(new.now(name)[12:], new.before[name][12:])
        found = table(report, "user")
        assert (found.status, found.old_rows, found.new_rows, found.ids_kept) == ("grown", 12, 19, 100.0)
        assert (found.rows_new, found.rows_dropped, found.state) == (7, 0, "kept")
        assert table(report, "item").status == "kept"


@pytest.mark.parametrize("slab", [1, 3 * 32, 1 << 20], ids=["a row", "some rows", "all rows"])
@pytest.mark.parametrize("text", [True, False], ids=["text", "numbers"])
def test_rows_follow_their_raw_values_through_both_vocabularies(slab, text, tmp_path, folders, monkeypatch):
    monkeypatch.setattr(tables, "SLAB_BYTES", slab)
    draw = np.random.default_rng(5)
    value = (lambda i: f"user {i}") if text else int
    before, after = draw.permutation(60)[:38], draw.permutation(60)[:30]
    vocabulary(folders.old, "user", [value(i) for i in before])
    order = draw.permutation(30)  # rows of the file come in any order
    vocabulary(folders.new, "user", [value(i) for i in after[order]], order + 2)
    old = Run(plain_schema(40), seed=1)
    new = Run(plain_schema(35), seed=2, fresh=True)
    report = start(old.save(tmp_path / "step-7"), new, folders)

    kept = set(before) & set(after)
    for name in ("tables/user/weight", "tables/user/sum", "tables/wide_user_id/weight", "tables/wide_user_id/sum"):
        expected, source = new.before[name].numpy().copy(), old.now(name).numpy()
        expected[0], expected[1] = source[0], source[1]
        for place, i in enumerate(after):
            if i in kept:
                expected[place + 2] = source[list(before).index(i) + 2]
        np.testing.assert_array_equal(new.now(name).numpy(), expected)
    found = table(report, "user")
    assert found.status == "remapped" and found.ids_kept == pytest.approx(100 * len(kept) / 38)
    assert found.rows_new == 35 - 2 - len(kept) and found.rows_dropped == 40 - 2 - len(kept)
    assert table(report, "wide_user_id").rows_new == found.rows_new


def test_shards_get_their_part_of_old_rows_and_states_of_other_parts_are_converted(tmp_path, folders, monkeypatch):
    """Cut by rows and columns; row-wise AdaGrad's sums of two parts of a row become those of two other parts."""
    monkeypatch.setattr(tables, "SLAB_BYTES", 64)
    vocabulary(folders.old, "user", [*"abcdefghij"])
    vocabulary(folders.new, "user", [*"cjxbyaz"])
    optimizers = ("rowwise_adagrad", "adagrad")
    old = Run(plain_schema(12), seed=1, optimizers=optimizers)
    new = Run(plain_schema(9), seed=2, fresh=True, optimizers=optimizers)
    old.pieces = [piece for piece in old.pieces if piece.name != "tables/user/sum"]
    old.pieces.append(whole_piece("tables/user/sum", torch.rand(12, 2), (4, 4)))
    saved = old.save(tmp_path / "step-7")
    sums = torch.zeros(9, 2)
    cut = []
    for first, height in ((0, 4), (4, 0), (4, 5)):
        for part in (0, 1):
            rows = slice(first, first + height)
            weight = new.now("tables/user/weight")[rows, 4 * part : 4 * part + 4]
            cut.append(Piece("tables/user/weight", (9, 8), (first, 4 * part), weight))
            cut.append(Piece("tables/user/sum", (9, 2), (first, part), sums[rows, part : part + 1], True, (2, 6)))
    plan_of(saved, new, folders).apply(cut, Reader(saved), ADAGRAD)

    rows = [0, 1, 2 + "abcdefghij".index("c"), 11, -1, 3, -1, 2, -1]
    for row, source in enumerate(rows):
        weight = new.before["tables/user/weight"][row] if source < 0 else old.now("tables/user/weight")[source]
        assert torch.equal(new.now("tables/user/weight")[row], weight)
        a, b = (0, 0) if source < 0 else old.now("tables/user/sum")[source].tolist()
        assert sums[row].tolist() == pytest.approx([a, (2 * a + 4 * b) / 6])


def test_a_value_in_another_ones_place_begins_anew(tmp_path, folders):
    vocabulary(folders.old, "user", [*"abc"])
    vocabulary(folders.new, "user", [*"axcy"])
    old, new = Run(plain_schema(12), seed=1), Run(plain_schema(12), seed=2, fresh=True)
    report = start(old.save(tmp_path / "step-7"), new, folders)
    source, found = old.now("tables/user/weight"), new.now("tables/user/weight")
    for row, before in enumerate([0, 1, 2, None, 4, *7 * [None]]):
        expected = new.before["tables/user/weight"][row] if before is None else source[before]
        assert torch.equal(found[row], expected)
    assert table(report, "user").ids_kept == pytest.approx(200 / 3)


def test_a_smaller_table_keeps_its_values_where_only_spare_rows_are_gone(tmp_path, folders):
    for folder in (folders.old, folders.new):
        vocabulary(folder, "user", [*"abc"])
    old, new = Run(plain_schema(12), seed=1), Run(plain_schema(5), seed=2, fresh=True)
    report = start(old.save(tmp_path / "step-7"), new, folders)
    assert torch.equal(new.now("tables/user/weight"), old.now("tables/user/weight")[:5])
    assert (table(report, "user").status, table(report, "user").ids_kept) == ("remapped", 100.0)


def test_a_renamed_table_and_feature_bring_their_rows_columns_and_linear_weights(tmp_path, folders):
    vocabulary(folders.old, "user", [*"abcdefghij"])
    vocabulary(folders.new, "customer", [*"jihgfedcba"])
    old = Run(plain_schema(12), seed=1)
    schema = plain_schema(12)
    renamed = Schema(
        embedding_dim=8,
        tables={"customer": Table(12), "item": Table(9), "hashed": Table(20)},
        features={
            {"user_id": "customer_id"}.get(name, name): Feature("sparse", table="customer")
            if name == "user_id"
            else spec
            for name, spec in schema.features.items()
        },
        crosses=schema.crosses,
    )
    new = Run(renamed, seed=2, fresh=True)
    rename = {"tables/user": "tables/customer", "features/user_id": "features/customer_id"}
    report = start(old.save(tmp_path / "step-7"), new, folders, rename=rename, require=["tables/*"])
    for before, after in (("user", "customer"), ("wide_user_id", "wide_customer_id")):
        source = old.now(f"tables/{before}/weight")
        assert torch.equal(new.now(f"tables/{after}/weight")[2:], source[2:].flip(0))
        assert table(report, after).source == before
    rows = [{"price": 0.3, "user_id": [4], "item_id": [3], "shop_id": [5], "item_x_shop": [6]}]
    moved = [{**rows[0], "customer_id": [13 - 4]}]
    torch.testing.assert_close(new.logits(moved), old.logits(rows))
    assert {it.status for it in report.dense} == {"kept"}


# Features.


def history(target):
    return {"max_length": 6, "target": target, "history": "clicked"}


def changed_schema():
    """As ``one_dim_schema``: features in another order, added ones of every kind among them, some removed; the history
    gets an attribute, and another history is put before it."""
    schema = one_dim_schema()
    tables = {**schema.tables, "city": Table(7), "shop": Table(8), "viewed_shop": Table(9)}
    old = schema.features
    features = {
        "hour": Feature("dense"),
        "city": Feature("sparse", table="city"),
        "viewed_id": Feature("sparse", table="viewed_shop"),
        "viewed": Feature("sequence", table="viewed_shop", max_length=4, target="viewed_id"),
        "tags": old["tags"],
        "price": old["price"],
        "category_id": old["category_id"],
        "item_id": old["item_id"],
        "user.id": old["user.id"],
        "shop_id": Feature("sparse", table="shop"),
        "clicked_shops": Feature("sequence", table="shop", **history("shop_id")),
        "clicked_categories": old["clicked_categories"],
        "clicked_items": old["clicked_items"],
    }
    return Schema(embedding_dim=8, tables=tables, features=features, crosses=schema.crosses)


ADDED = ("hour", "city", "viewed_id", "viewed", "shop_id", "clicked_shops")
REMOVED = ("age", "carted_items")
CHANGED = {"skip": [f"features/{name}" for name in ADDED], "drop": [f"features/{name}" for name in REMOVED]}


def rows_for_both(schema):
    """Rows without the removed features; the added ones are there where their embeddings are 0, else missing."""
    rows = random_rows(schema, 12, seed=4)
    for row in rows:
        row |= {"age": 0.0, "carted_items": []}
        length = len(row["clicked_items"])
        row |= {"shop_id": [3], "clicked_shops": list(range(length)), "hour": 0.0}
    return rows


def check_same_logits(old, new, rows):
    """Up to the order of sums, which other places of the features change."""
    expected = old.logits(rows)
    allowed = model_tolerance(old.model, lambda: old.logits(rows))
    torch.testing.assert_close(new.logits(rows), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in RELATIVE])
def test_columns_of_features_that_come_go_and_move_are_found_by_name(name, tmp_path):
    """With the new features zeroed, the new model's logits are the old one's."""
    old, new = Run(one_dim_schema(), name, seed=1), Run(changed_schema(), name, seed=2, fresh=True)
    if name == "dcn":  # biases are added to what is multiplied: 0 in a new run, and lost with a feature
        biases = "dense/model.head.cross.biases"
        for values in (new.now(biases), new.before[biases]):
            values.zero_()
        blocks = old.model.feature_axes(old.schema)["head.cross.biases"][1]
        for (feature, _), part in zip(blocks, old.now(biases).split([width for _, width in blocks], dim=1)):
            part.mul_(feature not in REMOVED)
    for piece in old.pieces:  # moments that show which weight they belong to
        if piece.name.endswith("/exp_avg"):
            piece.tensor.copy_(2 * old.now(f"dense/{piece.name[10:-8]}"))
    report = start(old.save(tmp_path / "step-7"), new, **CHANGED)
    for shop in ("tables/shop/weight", "tables/wide_shop_id/weight"):
        if shop in new.before:
            new.now(shop).zero_()
    check_same_logits(old, new, rows_for_both(one_dim_schema()))

    parameters = dict(new.model.named_parameters())
    for key in filter(parameters.__contains__, load_model_class(name).feature_axes(changed_schema())):
        weight, moment = new.now(f"dense/model.{key}"), new.now(f"optimizer/model.{key}/exp_avg")
        came = moment != 0
        is_new = key.startswith("head.attentions.0.")  # of the history that is before the old one now
        assert came.any() != is_new and torch.equal(moment[came], 2 * weight[came])
        assert torch.equal(weight[~came], new.before[f"dense/model.{key}"][~came])
    if "head.deep.layers.0.weight" not in load_model_class(name).feature_axes(changed_schema()):
        return
    found = dense(report, "model.head.deep.layers.0.weight")
    assert found.status == "remapped" and set(found.new) == set(ADDED) and set(found.dropped) == set(REMOVED)
    assert set(found.kept) == set(changed_schema().features) - set(ADDED)


VARIANTS = [
    *((name, {}) for name in MODELS),
    ("pnn", {"product": "outer"}),
    ("dcn_v2", {"rank": 2, "experts": 3}),
    ("masknet", {"structure": "serial"}),
    ("fibinet", {"bilinear": "all"}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_features_that_only_change_places_leave_the_logits_as_they_are(name, options, tmp_path):
    """No shape changes then: only names show which entry of a tensor is whose."""
    schema = one_dim_schema()
    turned = dataclasses.replace(schema, features=dict(reversed(schema.features.items())))
    assert turned.sparse == schema.sparse[::-1] and turned.dense == schema.dense[::-1] and len(schema.dense) > 1
    old, new = Run(schema, name, seed=1, **options), Run(turned, name, seed=2, fresh=True, **options)
    start(old.save(tmp_path / "step-7"), new)
    check_same_logits(old, new, random_rows(schema, 12, seed=4))


def test_rows_of_another_type_are_rounded_and_told(tmp_path):
    old, new = Run(plain_schema(), seed=1), Run(plain_schema(user=Table(12, dtype="fp16")), seed=2, fresh=True)
    report = start(old.save(tmp_path / "step-7"), new)
    found = new.now("tables/user/weight")
    assert found.dtype == torch.float16 and torch.equal(found, old.now("tables/user/weight").half())
    assert torch.equal(new.now("tables/user/sum"), old.now("tables/user/sum"))
    assert any("table 'user': dtype was fp32, is fp16" in note for note in report.notes)
    back = Run(plain_schema(), seed=3, fresh=True)
    start(new.save(tmp_path / "step-8"), back)
    assert torch.equal(back.now("tables/user/weight"), found.float())


def test_what_belongs_to_two_features_begins_anew_where_one_of_them_gives_way_to_another(tmp_path):
    schema, widths = plain_schema(), [1, 8, 8, 8]  # price, user_id, item_id, shop_id
    features = {"city" if key == "item_id" else key: feature for key, feature in schema.features.items()}
    changed = dataclasses.replace(schema, features=features, crosses={})
    schema = dataclasses.replace(schema, crosses={})
    rules = {"skip": ["features/city", "tables/item"], "drop": ["features/item_id"]}
    old, new = Run(schema, "dcn_v2", seed=1), Run(changed, "dcn_v2", seed=2, fresh=True)
    report = start(old.save(tmp_path / "dcn"), new, **rules)
    its = np.repeat([False, False, True, False], widths)
    fresh = torch.from_numpy(its[:, None] | its)
    name = "dense/model.head.cross.weights"
    for layer, was, before in zip(new.now(name), old.now(name), new.before[name], strict=True):
        assert torch.equal(layer, torch.where(fresh, before, was))
    found = dense(report, "model.head.cross.weights")
    assert (found.status, found.new, found.dropped) == ("remapped", ("city",), ("item_id",))
    assert found.kept == ("price", "user_id", "shop_id")

    old, new = Run(schema, "pnn", seed=1), Run(changed, "pnn", seed=2, fresh=True)
    start(old.save(tmp_path / "pnn"), new, **rules)
    name = "dense/model.head.products.inner.weight"  # fields: user_id, city, shop_id, price
    is_new = torch.tensor(["city" in pair for pair in combinations(("user_id", "city", "shop_id", "price"), 2)])
    assert torch.equal(new.now(name), torch.where(is_new, new.before[name], old.now(name)))


def test_a_skipped_feature_is_learnt_anew_with_its_table_and_columns(tmp_path):
    old, new = Run(plain_schema(), seed=1), Run(plain_schema(), seed=2, fresh=True)
    report = start(old.save(tmp_path / "step-7"), new, skip=["features/user_id"])
    for name in ("tables/user/weight", "tables/wide_user_id/weight", "tables/user/sum"):
        assert torch.equal(new.now(name), new.before[name])
    first = "dense/model.head.deep.layers.0.weight"  # columns: price, user 8, item 8, shop 8
    assert torch.equal(new.now(first)[:, 1:9], new.before[first][:, 1:9])
    assert torch.equal(new.now(first)[:, 9:], old.now(first)[:, 9:])
    assert table(report, "user").status == "new" and table(report, "item").status == "kept"


# Optimizer state.


def test_optimizer_state_is_kept_reset_or_decayed_by_rule(tmp_path):
    old, new = Run(plain_schema(), seed=1), Run(plain_schema(), seed=2, fresh=True)
    rules = {
        "tables/item": "reset",
        "tables/wide_*": "decay=0.25",
        "dense/*.output.*": "reset",
        "dense/*.layers.1.*": "decay=0.5",
    }
    report = start(old.save(tmp_path / "step-7"), new, optimizer=rules)
    factors = {
        "tables/item/sum": 0.0,
        "tables/user/sum": 1.0,
        "tables/wide_item_id/sum": 0.25,
        "optimizer/model.head.deep.output.weight/exp_avg": 0.0,
        "optimizer/model.head.deep.output.weight/step": 0.0,
        "optimizer/model.head.deep.layers.1.weight/exp_avg": 0.5,
        "optimizer/model.head.deep.layers.1.weight/exp_avg_sq": 0.5,
        "optimizer/model.head.deep.layers.1.weight/step": 1.0,
        "optimizer/model.head.deep.layers.0.weight/exp_avg_sq": 1.0,
    }
    for name, factor in factors.items():
        assert torch.equal(new.now(name), factor * old.now(name)), name
    for piece in new.pieces:
        if piece.name.startswith("dense/") or piece.name.endswith("/weight"):
            assert torch.equal(piece.tensor, old.now(piece.name))
    states = {it.table: it.state for it in report.tables}
    assert states["item"] == "reset" and states["user"] == "kept" and states["wide_item_id"] == "decayed ×0.25"
    assert dense(report, "model.head.deep.output.weight").state == "reset"


@pytest.mark.parametrize(("rule", "factor"), [("keep", 1.0), ("reset", 0.0), ("decay=0.25", 0.25)])
def test_ftrl_goes_on_from_the_same_weights_however_much_it_remembers(rule, factor, tmp_path):
    optimizers = ("adagrad", "ftrl")
    old, new = (Run(plain_schema(), seed=seed, fresh=seed > 1, optimizers=optimizers) for seed in (1, 2))
    name = "tables/wide_user_id/weight"
    rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(3))
    rows[:, 2] = rows[:, 2].square()
    old.now(name).copy_(ftrl_update(rows, FTRL))  # weights that FTRL itself came to
    start(old.save(tmp_path / "step-7"), new, wide=FTRL, optimizer={"tables/wide_*": rule})
    before, after = old.now(name), new.now(name)
    assert torch.equal(after[:, 0], before[:, 0]) and (after[:, 0] != 0).any()
    if rule == "keep":
        assert torch.equal(after, before)
    torch.testing.assert_close(after[:, 2], factor * before[:, 2])
    tiny = torch.cat((after[:, :3], torch.full((12, 1), 1e-7)), dim=1)  # a step that only computes w again
    torch.testing.assert_close(ftrl_update(tiny, FTRL)[:, 0], before[:, 0], rtol=1e-4, atol=1e-5)


def test_from_ftrl_to_another_optimizer_only_the_weights_come_along(tmp_path):
    old = Run(plain_schema(), seed=1, optimizers=("adagrad", "ftrl"))
    new = Run(plain_schema(), seed=2, fresh=True)
    saved = old.save(tmp_path / "step-7")
    start(saved, new, optimizer={"tables/wide_*": "reset"})
    found = new.now("tables/wide_user_id/weight")
    assert torch.equal(found[:, 0], old.now("tables/wide_user_id/weight")[:, 0]) and not found[:, 1:].any()
    assert not new.now("tables/wide_user_id/sum").any()


# What is refused.


def with_features(schema, **features):
    return Schema(
        embedding_dim=schema.embedding_dim,
        tables=schema.tables,
        crosses=schema.crosses,
        features=schema.features | features,
    )


def wider_item():
    return plain_schema(item=Table(9, embedding_dim=4))


def without(schema, feature):
    features = {name: spec for name, spec in schema.features.items() if name != feature}
    return Schema(embedding_dim=8, tables=schema.tables, features=features, crosses=schema.crosses)


def crossing(*columns):
    schema = plain_schema()
    return Schema(
        embedding_dim=8,
        tables=schema.tables,
        features=schema.features,
        crosses={"item_x_shop": Cross(list(columns), 30)},
    )


def hashing_items():
    return with_features(plain_schema(), item_id=Feature("sparse", table="item", ids="hash"))


ITEM = {"skip": ["tables/item", "tables/wide_item_id"]}
HASHED = {"skip": ["tables/hashed", "tables/wide_shop_id"]}
UNEXPLAINED = {
    "more rows": (
        plain_schema(19),
        {},
        ["tables/user has 19 rows, had 12, and no", "grow: ['tables/user']"],
        {"grow": ["tables/*"]},
    ),
    "fewer rows": (
        plain_schema(9),
        {},
        ["tables/user has 9 rows", "vocabularies, or skip: ['tables/user']"],
        {"skip": ["features/user_id"]},
    ),
    "another width": (
        wider_item(),
        {},
        ["tables/item has 4 columns, had 8", "skip: ['tables/item']"],
        {"skip": ["tables/item"]},
    ),
    "hashed elsewhere": (
        plain_schema(hashed=Table(25)),
        {},
        ["sends every id elsewhere", "skip: ['tables/hashed']"],
        HASHED,
    ),
    "ids hashed now": (
        hashing_items(),
        {},
        ["tables/item has hashed ids in one of the runs only"],
        {"skip": ["*item*"]},
    ),
    "another cross": (
        crossing("shop_id", "item_id"),
        {},
        ["tables/wide_item_x_shop crosses"],
        {"skip": ["tables/wide_item_x_shop"]},
    ),
    "a new feature": (
        with_features(plain_schema(), age=Feature("dense")),
        {},
        ["features/age is new", "skip: ['features/age']"],
        {"skip": ["*/age"]},
    ),
    "a lost feature": (
        without(plain_schema(), "user_id"),
        {},
        ["features/user_id of the old run", "drop: ['features/user_id']"],
        {"drop": ["features/user_id"]},
    ),
    "other layers": (
        plain_schema(),
        {"hidden_units": [7, 5]},
        ["dense/model.head.deep.layers.0.weight has shape", "skip: ['dense/"],
        {"skip": ["dense/*layers.*"]},
    ),
    "more layers": (
        plain_schema(),
        {"hidden_units": [6, 5, 5]},
        ["dense/model.head.deep.layers.2.bias is new"],
        {"skip": ["dense/*layers.2.*"]},
    ),
    "fewer layers": (
        plain_schema(),
        {"hidden_units": [6]},
        ["dense/model.head.deep.layers.1.bias of the old run"],
        {"drop": ["dense/*layers.1.*"], "skip": ["dense/*output.*"]},
    ),
    "another optimizer": (
        plain_schema(),
        {"optimizers": ("rowwise_adagrad", "adagrad")},
        ["tables/user has another optimizer (adagrad, now rowwise_adagrad)", "optimizer: {'tables/user': reset}"],
        {"optimizer": {"tables/*": "reset"}},
    ),
}


@pytest.mark.parametrize("case", UNEXPLAINED)
def test_what_no_rule_explains_is_an_error_with_the_rule_that_would(case, tmp_path):
    schema, options, told, remedy = UNEXPLAINED[case]
    old, new = Run(plain_schema(), seed=1), Run(schema, seed=2, fresh=True, **options)
    saved = old.save(tmp_path / "step-7")
    with pytest.raises(ValueError) as error:
        start(saved, new)
    assert all(text in str(error.value) for text in told), str(error.value)
    assert all(torch.equal(piece.tensor, new.before[piece.name]) for piece in new.pieces)
    start(saved, new, **remedy)


def test_all_that_is_unexplained_is_told_at_once(tmp_path):
    old, new = (
        Run(plain_schema(), seed=1),
        Run(with_features(plain_schema(19), age=Feature("dense")), seed=2, fresh=True),
    )
    with pytest.raises(
        ValueError, match=r"3 difference\(s\).*\(1\) features/age.*\(2\) tables/user.*\(3\) tables/wide_user"
    ):
        start(old.save(tmp_path / "step-7"), new)


def test_what_was_renamed_away_is_not_found_under_its_old_name(tmp_path):
    schema = plain_schema(customer=Table(12))
    schema = with_features(schema, customer_id=Feature("sparse", table="customer"))
    old, new = Run(plain_schema(), seed=1), Run(schema, seed=2, fresh=True)
    saved = old.save(tmp_path / "step-7")
    rename = {"tables/user": "tables/customer", "features/user_id": "features/customer_id"}
    with pytest.raises(ValueError, match=r"1 difference.*features/user_id is new"):
        plan_of(saved, new, rename=rename)
    start(saved, new, rename=rename, skip=["features/user_id"])
    assert torch.equal(new.now("tables/customer/weight"), old.now("tables/user/weight"))
    assert torch.equal(new.now("tables/user/weight"), new.before["tables/user/weight"])


def test_a_vocabulary_in_one_run_only_and_ids_that_moved_under_a_cross_are_told(tmp_path, folders):
    old, new = Run(plain_schema(), seed=1), Run(plain_schema(), seed=2, fresh=True)
    saved = old.save(tmp_path / "step-7")
    vocabulary(folders.old, "item", [*"abcdefg"])
    with pytest.raises(ValueError, match=r"tables/item has a vocabulary in the old run only: grow"):
        plan_of(saved, new, folders)
    vocabulary(folders.new, "item", [*"gfedcba"])
    vocabularies = Vocabularies(folders.old, folders.new)
    with pytest.raises(ValueError, match=r"wide_item_x_shop crosses 'item_id', whose ids have moved: skip"):
        plan_of(saved, new, vocabularies)
    report = start(saved, new, vocabularies, skip=["tables/wide_item_x_shop"])
    assert table(report, "item").status == table(report, "wide_item_id").status == "remapped"


def test_another_model_gives_its_tables_and_what_rules_say_of_its_layers(tmp_path):
    old, new = Run(plain_schema(), "deepfm", seed=1), Run(plain_schema(), "wide_deep", seed=2, fresh=True)
    saved = old.save(tmp_path / "step-7")
    with pytest.raises(ValueError, match=r"layers.0.weight is of another model.*dense_fields.weights of the old run"):
        start(saved, new, skip=["tables/wide_item_x_shop", "features/item_x_shop"])
    rules = {"skip": ["features/item_x_shop", "dense/*layers.0.*"], "drop": ["dense/*dense_fields*"]}
    start(saved, new, **rules)
    assert torch.equal(new.now("tables/user/weight"), old.now("tables/user/weight"))
    assert torch.equal(new.now("dense/model.head.deep.output.weight"), old.now("dense/model.head.deep.output.weight"))


def test_damaged_and_foreign_vocabularies_are_refused(tmp_path, folders):
    old, new = Run(plain_schema(), seed=1), Run(plain_schema(), seed=2, fresh=True)
    saved = old.save(tmp_path / "step-7")
    vocabulary(folders.old, "user", [*"abc"])
    for values, ids, told in (
        ([*"abc"], np.array([2, 3, 12]), r"ids 2 … 12, its table rows 2 … 11"),
        ([*"abc"], np.array([1, 2, 3]), r"ids 1 … 3"),
        ([*"aba"], np.array([2, 3, 4]), "damaged"),
        ([1, 2, 3], None, "of .*large_string, those of .*int64"),
    ):
        vocabulary(folders.new, "user", values, ids)
        with pytest.raises(ValueError, match=told):
            plan_of(saved, new, Vocabularies(folders.old, folders.new))


def test_what_is_required_must_not_begin_anew(tmp_path):
    old, new = Run(plain_schema(), seed=1), Run(plain_schema(), seed=2, fresh=True)
    saved = old.save(tmp_path / "step-7")
    start(saved, new, require=["tables/user", "dense/*", "features/*"])
    for name in ("tables/user", "dense/model.head.deep.output.bias", "features/price"):
        with pytest.raises(ValueError, match=f"{name} is required, but would begin anew"):
            plan_of(saved, new, require=["*"], skip=[name])


def test_rules_that_apply_to_nothing_or_make_no_sense_are_told(tmp_path):
    old, new = Run(plain_schema(), seed=1), Run(plain_schema(), seed=2, fresh=True)
    saved = old.save(tmp_path / "step-7")
    plan_of(saved, new, skip=["tables/gone"], drop=["features/gone"])  # yesterday's
    for rule, told in (
        ({"require": ["tables/usr"]}, "require: 'tables/usr' matches nothing"),
        ({"grow": ["tables/usr"]}, "grow: 'tables/usr' matches nothing"),
        ({"optimizer": {"tables/usr": "reset"}}, "optimizer: 'tables/usr' matches nothing"),
        ({"rename": {"tables/usr": "tables/user"}}, "'tables/usr' is not in the old run: did you mean 'tables/user'"),
    ):
        with pytest.raises(ValueError, match=told):
            plan_of(saved, new, **rule)
    for rules, told in (
        ({"skip": ["user"]}, "warm_start.skip: 'user' is no name"),
        ({"optimizer": {"tables/user": "halve"}}, "'halve': give keep, reset, or decay="),
        ({"optimizer": {"tables/user": "decay=0"}}, "'decay=0'"),
        ({"optimizer": {"tables/user": "decay=x"}}, "'decay=x'"),
        ({"rename": {"tables/user": "features/user"}}, "both must be of one kind"),
        ({"rename": {"tables/a": "tables/c", "tables/b": "tables/c"}}, "two old names become one"),
    ):
        with pytest.raises(ValueError, match=told):
            WarmStartConfig("run", **rules)
    with pytest.raises(ValueError, match="rules but no path"):
        WarmStartConfig(skip=["tables/user"])


def test_facts_that_say_nothing_of_the_model_are_told(tmp_path):
    saved = Run(plain_schema(), seed=1).save(tmp_path / "step-7")
    for facts in ({}, {"identity": {"schema": {"tables": {"a": {"rows": 3}}}, "model": {"name": "x"}}}):
        with pytest.raises(ValueError, match="does not say what its tensors mean"):
            old_side(Reader(saved), facts, "wide_deep", load_model_class("wide_deep"))


def test_a_model_that_does_not_name_its_columns_is_refused_once_features_changed(tmp_path, monkeypatch):
    old = Run(plain_schema(), seed=1)
    saved = old.save(tmp_path / "step-7")
    monkeypatch.delattr(load_model_class("wide_deep"), "feature_axes")
    assert {it.status for it in start(saved, Run(plain_schema(), seed=2, fresh=True)).dense} == {"kept"}
    schema = plain_schema()
    schema.features = dict(sorted(schema.features.items(), reverse=True))
    moved = Run(schema, seed=2, fresh=True)
    with pytest.raises(ValueError, match="the model does not say which columns"):
        start(saved, moved)
    start(saved, moved, skip=["dense/*"])


# The report.


def test_the_report_is_json_and_two_tables_with_a_warning_for_changed_meaning(tmp_path):
    schema = copy.deepcopy(plain_schema(19))
    schema.features["price"] = Feature("dense", log1p=True)
    old, new = Run(plain_schema(), seed=1), Run(schema, seed=2, fresh=True)
    report = start(old.save(tmp_path / "step-7"), new, grow=["*user*"])
    told = json.loads(json.dumps(report.to_dict()))
    assert told["step"] == RUN_STEPS and told["totals"]["tables"] == {"kept": 5, "grown": 2}
    kept = 12 + 9 + 20 + 12 + 9 + 20 + 30
    assert told["totals"]["rows"] == {"kept": kept, "new": 14, "dropped": 0}
    console = Console(file=io.StringIO(), width=200)
    report.print(console)
    shown = console.file.getvalue()
    assert all(text in shown for text in ("user", "grown", "100.0 %", "14 new", "step-7"))
    assert "warning: feature 'price': log1p was False, is True" in shown


def test_the_totals_count_every_value_of_the_dense_part(tmp_path):
    old, new = Run(plain_schema(), seed=1), Run(plain_schema(), seed=2, fresh=True)
    report = start(old.save(tmp_path / "step-7"), new)
    sizes = {piece.name: math.prod(piece.shape) for piece in new.pieces if piece.name.startswith("dense/")}
    assert {f"dense/{it.name}": it.size for it in report.dense} == sizes
