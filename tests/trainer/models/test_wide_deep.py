import numpy as np
import pytest
import torch

from data_loaders.schema import Feature, Schema
from tests.helpers.samples import (
    check_conf,
    check_dense_start,
    check_model,
    make_batch,
    mlp,
    pooled_bag,
    random_rows,
    randomize,
    small_schema,
    state,
)
from trainer.models.wide_deep import Model
from trainer.modules.embeddings import wide_table

UNITS = {"hidden_units": [8, 4]}


def build(schema: Schema) -> torch.nn.Module:
    model = Model(schema, **UNITS, device=torch.device("cpu"))
    randomize(model)
    return model.eval()


def naive_logit(schema: Schema, values: dict[str, np.ndarray], row: dict) -> float:
    """Equation 3 of the paper on one row."""
    wide = 0.0
    for key in ("user.id", "item_id", "category_id", "tags", "user_x_category"):
        wide += sum(values[f"embedding_bags.embedding_bags.{wide_table(key)}.weight"][i, 0] for i in row[key])
    inputs = [np.array([row["price"], row["age"]])]
    for key in (*schema.sparse, *schema.sequences):
        table = schema.features[key].table
        weights = values[f"embedding_bags.embedding_bags.{table}.weight"]
        inputs.append(pooled_bag(weights, row[key], schema.tables[table].pooling))
    return wide + float(mlp(values, "head.deep", np.concatenate(inputs), "relu")[0])


def test_equals_the_paper():
    schema = small_schema()
    model, rows = build(schema), random_rows(schema, 12)
    expected = [naive_logit(schema, state(model), row) for row in rows]
    np.testing.assert_allclose(model(make_batch(schema, model.layout, rows)).detach(), expected, rtol=1e-4, atol=1e-5)


def test_contract():
    check_model(build(small_schema()), small_schema())
    check_dense_start(Model, small_schema(), **UNITS)
    check_conf(Model, "wide_deep")


def test_layout_has_crosses_and_only_declared_wide_tables():
    schema = small_schema()
    schema.features["clicked_items"].wide = True
    schema.features["user.id"].wide = False
    model = build(schema)
    assert model.layout.pooled == (*schema.sparse, *schema.sequences, "user_x_category")
    wide = {name for name in model.embedding_bags.embedding_bags if name.startswith("wide_")}
    assert wide == {"wide_item_id", "wide_category_id", "wide_tags", "wide_clicked_items", "wide_user_x_category"}


def test_new_model_has_no_linear_weights_yet():
    model = Model(small_schema(), **UNITS, device=torch.device("cpu"))
    assert not model.embedding_bags.embedding_bags["wide_item_id"].weight.any()
    assert model.embedding_bags.embedding_bags["item"].weight.std().item() == pytest.approx(0.01, rel=0.3)


def test_mistakes():
    with pytest.raises(ValueError, match="wide_deep needs at least one"):
        Model(Schema(features={"price": Feature("dense")}), device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"model.hidden_units is \[\]"):
        Model(small_schema(), hidden_units=[], device=torch.device("cpu"))
    with pytest.raises(ValueError, match="model.dropout is 1.0"):
        Model(small_schema(), dropout=1.0, device=torch.device("cpu"))
