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
    one_dim_schema,
    pooled_bag,
    random_rows,
    randomize,
    small_schema,
    state,
)
from trainer.models.deepfm import Model
from trainer.modules.embeddings import wide_table

UNITS = {"hidden_units": [8, 4]}


def build(schema: Schema) -> torch.nn.Module:
    model = Model(schema, **UNITS, device=torch.device("cpu"))
    randomize(model)
    return model.eval()


def naive_logit(schema: Schema, values: dict[str, np.ndarray], row: dict) -> float:
    """Equations 1-4 of the paper on one row, with the sum over pairs of fields written out."""
    bags = "embedding_bags.embedding_bags"
    fields, first_order = [], 0.0
    for key in (*schema.sparse, *schema.sequences):
        table = schema.features[key].table
        fields.append(pooled_bag(values[f"{bags}.{table}.weight"], row[key], schema.tables[table].pooling))
        if key in schema.sparse:
            first_order += sum(values[f"{bags}.{wide_table(key)}.weight"][i, 0] for i in row[key])
    for i, key in enumerate(schema.dense):
        fields.append(row[key] * values["head.dense_fields.vectors"][i])
        first_order += row[key] * values["head.dense_fields.weights"][i]
    pairs = sum(fields[i] @ fields[j] for i in range(len(fields)) for j in range(i + 1, len(fields)))
    return first_order + pairs + float(mlp(values, "head.deep", np.concatenate(fields), "relu")[0])


def without_numbers() -> Schema:
    schema = one_dim_schema()
    features = {name: feature for name, feature in schema.features.items() if feature.kind != "dense"}
    return Schema(embedding_dim=8, tables=schema.tables, features=features)


@pytest.mark.parametrize("make_schema", [one_dim_schema, without_numbers])
def test_equals_the_paper(make_schema):
    schema = make_schema()
    model, rows = build(schema), random_rows(schema, 12)
    expected = [naive_logit(schema, state(model), row) for row in rows]
    np.testing.assert_allclose(model(make_batch(schema, model.layout, rows)).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make_schema", [one_dim_schema, without_numbers])
def test_contract(make_schema):
    check_model(build(make_schema()), make_schema())
    check_dense_start(Model, make_schema(), **UNITS)


def test_conf():
    check_conf(Model, "deepfm")


def test_first_order_weights_whatever_the_linear_model_of_the_schema():
    schema = one_dim_schema()
    schema.features["user.id"].wide = False
    schema.features["clicked_items"].wide = True
    model = build(schema)
    assert model.layout.pooled == (*schema.sparse, *schema.sequences)
    wide = [name for name in model.embedding_bags.embedding_bags if name.startswith("wide_")]
    assert wide == [wide_table(key) for key in (*schema.sparse, "clicked_items")]


def test_mistakes():
    with pytest.raises(ValueError, match="user: 8, item: 8, category: 4, tag: 8.*one embedding_dim"):
        Model(small_schema(), device=torch.device("cpu"))
    with pytest.raises(ValueError, match="deepfm needs at least one"):
        Model(Schema(features={"price": Feature("dense")}), device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"model.hidden_units is \[8, 0\]"):
        Model(one_dim_schema(), hidden_units=[8, 0], device=torch.device("cpu"))
