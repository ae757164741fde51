"""FNN begins as a trained factorization machine: the rules of warm_start that do it (docs/models.md)."""

import dataclasses

import pytest
import torch

from data_loaders.schema import Schema
from tests.helpers.model_checks import without_numbers
from tests.helpers.old_runs import Run, start, table
from tests.helpers.samples import one_dim_schema

RULES = {"skip": ["dense/model.head.deep.*"], "drop": ["dense/model.head.bias"]}


@pytest.mark.parametrize("schema", [one_dim_schema(), without_numbers(one_dim_schema())], ids=["numbers", "ids alone"])
def test_fnn_takes_the_vectors_and_linear_weights_of_fm_with_their_optimizer_state(schema: Schema, tmp_path):
    old, new = Run(schema, "fm", seed=1), Run(schema, "fnn", seed=2, fresh=True)
    report = start(old.save(tmp_path / "step-7"), new, **RULES)
    tables = [piece.name for piece in new.pieces if piece.name.startswith("tables/")]
    assert {"tables/item/weight", "tables/item/sum", "tables/wide_item_id/weight"} < set(tables)
    assert all(torch.equal(new.now(name), old.now(name)) for name in tables)
    assert table(report, "item").status == "kept" and table(report, "item").state == "kept"
    for piece in new.pieces:
        if ".dense_fields." in piece.name:  # numbers' linear weights and vectors, with the optimizer's moments
            assert torch.equal(piece.tensor, old.now(piece.name)), piece.name
        elif not piece.name.startswith("tables/"):
            assert torch.equal(piece.tensor, new.before[piece.name]), piece.name


def test_numbers_of_fm_follow_their_names_into_fnn(tmp_path):
    schema = one_dim_schema()
    turned = dataclasses.replace(schema, features=dict(reversed(schema.features.items())))
    old, new = Run(schema, "fm", seed=1), Run(turned, "fnn", seed=2, fresh=True)
    start(old.save(tmp_path / "step-7"), new, **RULES)
    for name in ("weights", "vectors"):
        key = f"dense/model.head.dense_fields.{name}"
        assert len(schema.dense) > 1 and torch.equal(new.now(key), old.now(key).flip(0))


def test_a_model_takes_no_columns_from_one_that_it_does_not_name(tmp_path):
    old, new = Run(one_dim_schema(), "deepfm", seed=1), Run(one_dim_schema(), "fnn", seed=2, fresh=True)
    with pytest.raises(
        ValueError, match="head.dense_fields.vectors is of another model, whose columns belong to nobody"
    ):
        start(old.save(tmp_path / "step-7"), new, **RULES)


def test_without_its_rules_fnn_names_them(tmp_path):
    old, new = Run(one_dim_schema(), "fm", seed=1), Run(one_dim_schema(), "fnn", seed=2, fresh=True)
    with pytest.raises(ValueError) as error:
        start(old.save(tmp_path / "step-7"), new)
    assert "head.deep.layers.0.weight is new" in str(error.value)
    assert "2 difference" not in str(error.value) and "dense_fields.vectors is" not in str(error.value)
    assert "drop: ['dense/model.head.bias']" in str(error.value)
