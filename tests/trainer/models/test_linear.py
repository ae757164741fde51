"""Logistic regression, FM, FNN and Embedding & MLP against their papers' formulas, a row at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_loaders.schema import Feature, Schema, Table
from tests.helpers.model_checks import BAGS, CPU, check_equals, field, logits, made, without_numbers
from tests.helpers.samples import check_dense_start, check_model, mlp, one_dim_schema, random_rows, small_schema
from trainer.models import deepfm, embedding_mlp, fm, fnn, lr
from trainer.models.construct import build_model
from trainer.modules.embeddings import wide_table

UNITS = {"hidden_units": [8, 4]}


def linear_weight(values, key, row):
    return sum(values[f"{BAGS}.{wide_table(key)}.weight"][i, 0] for i in row[key])


def naive_lr(schema, values, row):
    wide = sum(linear_weight(values, key, row) for key in schema.wide)
    return values["head.bias"] + wide + sum(row[key] * values["head.numbers"][i] for i, key in enumerate(schema.dense))


def naive_fm(schema, values, row):
    """Equation 1 of Rendle, 2010, with the sum over pairs written out."""
    total = values["head.bias"] + sum(linear_weight(values, key, row) for key in schema.sparse)
    fields = [field(schema, values, key, row) for key in (*schema.sparse, *schema.sequences)]
    for i, key in enumerate(schema.dense):
        total = total + row[key] * values["head.dense_fields.weights"][i]
        fields.append(row[key] * values["head.dense_fields.vectors"][i])
    return total + sum(fields[i] @ fields[j] for i in range(len(fields)) for j in range(i + 1, len(fields)))


def naive_fnn(activation):
    def logit(schema, values, row):
        linear = [linear_weight(values, key, row) for key in schema.sparse]
        vectors = [field(schema, values, key, row) for key in (*schema.sparse, *schema.sequences)]
        for i, key in enumerate(schema.dense):
            linear.append(row[key] * values["head.dense_fields.weights"][i])
            vectors.append(row[key] * values["head.dense_fields.vectors"][i])
        inputs = np.concatenate([linear, *vectors])
        if activation != "tanh":
            return float(mlp(values, "head.deep", inputs, activation)[0])
        layer = 0
        while f"head.deep.layers.{layer}.weight" in values:
            weight, bias = (values[f"head.deep.layers.{layer}.{part}"] for part in ("weight", "bias"))
            inputs, layer = np.tanh(weight @ inputs + bias), layer + 1
        return float(values["head.deep.output.weight"][0] @ inputs + values["head.deep.output.bias"][0])

    return logit


def naive_embedding_mlp(activation):
    def logit(schema, values, row):
        embedded = [field(schema, values, key, row) for key in (*schema.sparse, *schema.sequences)]
        inputs = np.concatenate([np.array([row[key] for key in schema.dense]), *embedded])
        return float(mlp(values, "head.deep", inputs, activation)[0])

    return logit


def wide_sequence_schema():
    schema = small_schema()
    schema.features["clicked_items"].wide = True
    schema.features["user.id"].wide = False
    return schema


@pytest.mark.parametrize("make_schema", [small_schema, wide_sequence_schema])
def test_lr_equals_its_formula_over_features_crosses_and_numbers(make_schema):
    schema = make_schema()
    model = made(lr.Model, schema)
    check_equals(naive_lr, model, schema, random_rows(schema, 12))
    assert set(model.layout.pooled) == set(schema.wide) and "user_x_category" in model.layout.pooled
    assert set(model.embedding_bags.embedding_bags) == {wide_table(key) for key in schema.wide}


def test_a_new_lr_says_one_half_and_without_numbers_has_a_bias_alone():
    schema = small_schema()
    model = lr.Model(schema, device=CPU)
    assert not logits(model, schema, random_rows(schema, 5)).any()
    bare = without_numbers(schema)
    model = made(lr.Model, bare)
    assert [name for name, _ in model.head.named_parameters()] == ["bias"]
    check_model(model, bare)


def test_fm_equals_the_paper():
    for schema in (one_dim_schema(), without_numbers(one_dim_schema())):
        check_equals(naive_fm, made(fm.Model, schema), schema, random_rows(schema, 12))
        check_model(made(fm.Model, schema), schema)


def test_fm_with_zero_vectors_is_logistic_regression():
    schema = replace(one_dim_schema(), crosses={})
    model, linear = made(fm.Model, schema), made(lr.Model, schema)
    with torch.no_grad():
        for table in schema.tables:
            model.embedding_bags.embedding_bags[table].weight.zero_()
        model.head.dense_fields.vectors.zero_()
        model.head.dense_fields.weights.copy_(linear.head.numbers)
        model.head.bias.copy_(linear.head.bias)
        for key in schema.sparse:
            model.embedding_bags.embedding_bags[wide_table(key)].weight.copy_(
                linear.embedding_bags.embedding_bags[wide_table(key)].weight
            )
    rows = random_rows(schema, 12)
    torch.testing.assert_close(logits(model, schema, rows), logits(linear, schema, rows))


def test_fm_is_deepfm_without_its_network():
    schema = one_dim_schema()
    whole, part = made(deepfm.Model, schema, **UNITS), fm.Model(schema, device=CPU)
    shared = {name: value for name, value in whole.state_dict().items() if ".deep." not in name}
    part.load_state_dict({**shared, "head.bias": torch.tensor(0.25)})
    with torch.no_grad():
        whole.head.deep.output.weight.zero_()
        whole.head.deep.output.bias.fill_(0.25)
    rows = random_rows(schema, 12)
    torch.testing.assert_close(logits(part, schema, rows), logits(whole, schema, rows))


@pytest.mark.parametrize("activation", ["tanh", "relu", "dice"])
def test_fnn_equals_the_paper(activation):
    for schema in (one_dim_schema(), without_numbers(one_dim_schema())):
        model = made(fnn.Model, schema, **UNITS, activation=activation)
        check_equals(naive_fnn(activation), model, schema, random_rows(schema, 12))
        check_model(model, schema)


@pytest.mark.parametrize("activation", ["dice", "prelu", "relu"])
def test_embedding_mlp_equals_the_paper(activation):
    """Tables of both widths and both poolings; the candidate's vector is beside its pooled history."""
    schema = small_schema()
    schema.tables["category"].pooling = "sum"
    model = made(embedding_mlp.Model, schema, **UNITS, activation=activation)
    check_equals(naive_embedding_mlp(activation), model, schema, random_rows(schema, 12))
    check_model(model, schema)


def test_embedding_mlp_has_dins_inputs_and_network():
    """Both draw the same network from the seed: their columns are as many, though in another order."""
    schema = small_schema()
    base, din = (build_model({"name": name, **UNITS}, schema, seed=4) for name in ("embedding_mlp", "din"))
    shapes = [{k: v.shape for k, v in model.head.deep.state_dict().items()} for model in (base, din)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("model_class", "options"), [(lr.Model, {}), (fm.Model, {}), (fnn.Model, UNITS), (embedding_mlp.Model, UNITS)]
)
def test_the_dense_part_starts_from_the_seed(model_class, options):
    check_dense_start(model_class, one_dim_schema(), **options)


def test_mistakes():
    numbers = Schema(features={"price": Feature("dense")})
    nothing_wide = Schema(tables={"user": Table(9)}, features={"user": Feature("sparse", table="user", wide=False)})
    for model_class, schema, told in (
        (lr.Model, nothing_wide, "no feature for a linear model: set wide: true"),
        (fm.Model, small_schema(), "category: 4.*model fm multiplies.*one embedding_dim"),
        (fnn.Model, small_schema(), "category: 4.*model fnn multiplies.*one embedding_dim"),
        (fm.Model, numbers, "model fm needs at least one"),
        (fnn.Model, numbers, "model fnn needs at least one"),
        (embedding_mlp.Model, numbers, "model embedding_mlp needs at least one"),
    ):
        with pytest.raises(ValueError, match=told):
            model_class(schema, device=CPU)
    for model_class in (fnn.Model, embedding_mlp.Model):
        for options, told in (
            ({"hidden_units": []}, r"model.hidden_units is \[\]"),
            ({"dropout": 1.0}, "model.dropout is 1.0"),
            ({"activation": "tan"}, "model.activation: 'tan' is not known; did you mean 'tanh'"),
        ):
            with pytest.raises(ValueError, match=told):
                model_class(one_dim_schema(), **options, device=CPU)
