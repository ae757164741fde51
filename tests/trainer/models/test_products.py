"""IPNN, OPNN, DLRM and the products they are made of, against their papers' formulas, a row at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_loaders.schema import Feature, Schema, Table
from tests.helpers.model_checks import CPU, check_equals, field, logits, made, without_numbers
from tests.helpers.samples import check_dense_start, check_model, mlp, one_dim_schema, random_rows, small_schema
from trainer.models import dlrm, pnn
from trainer.modules.interactions import FactorizationMachine, InnerProduct, OuterProduct

UNITS = {"hidden_units": [8, 4]}
DLRM_UNITS = {"bottom_units": [6, 5], "hidden_units": [8, 4]}


def one_feature():
    return Schema(embedding_dim=8, tables={"user": Table(9)}, features={"user": Feature("sparse", table="user")})


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def naive_pnn(product):
    """``l_z + l_p + b`` of the paper's section III, with the products written out."""

    def logit(schema, values, row):
        fields = [field(schema, values, key, row) for key in (*schema.sparse, *schema.sequences)]
        fields += [row[key] * values["head.number_vectors"][i] for i, key in enumerate(schema.dense)]
        count = len(fields)
        if product == "inner":
            products = np.array([fields[i] @ fields[j] for i in range(count) for j in range(i + 1, count)])
        else:
            products = sum(np.outer(left, right) for left in fields for right in fields).flatten()
        hidden = (
            values["head.linear.weight"] @ np.concatenate(fields) + values[f"head.products.{product}.weight"] @ products
        )
        hidden = np.maximum(hidden + values["head.linear.bias"], 0)
        return float(mlp(values, "head.deep", hidden, "relu")[0])

    return logit


def naive_dlrm(schema, values, row):
    vectors = [field(schema, values, key, row) for key in (*schema.sparse, *schema.sequences)]
    first = []
    if schema.dense:
        numbers = np.array([row[key] for key in schema.dense])
        first = [np.maximum(mlp(values, "head.bottom", numbers, "relu"), 0)]
        vectors = first + vectors
    dots = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i + 1, len(vectors))]
    return float(mlp(values, "head.top", np.concatenate([*first, dots]), "relu")[0])


def test_inner_products_are_of_all_pairs_and_sum_to_the_factorization_machine():
    fields = drawn(4, 6, 8)
    found = InnerProduct()(fields)
    expected = [(fields[:, i] * fields[:, j]).sum(1) for i in range(6) for j in range(i + 1, 6)]
    torch.testing.assert_close(found, torch.stack(expected, dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.sum(1), FactorizationMachine()(torch.zeros(len(fields)), fields), rtol=1e-4, atol=1e-4
    )


def test_outer_products_are_summed_over_all_pairs_and_their_trace_is_the_square_of_the_sum():
    fields = drawn(4, 6, 8)
    found = OuterProduct()(fields)
    torch.testing.assert_close(found, torch.einsum("bid,bje->bde", fields, fields).flatten(1), rtol=1e-4, atol=1e-4)
    trace = found.unflatten(1, (8, 8)).diagonal(dim1=1, dim2=2).sum(1)
    both = 2 * FactorizationMachine()(torch.zeros(len(fields)), fields) + fields.square().sum((1, 2))
    torch.testing.assert_close(trace, both, rtol=1e-4, atol=1e-4)
    assert OuterProduct()(fields.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("product", ["inner", "outer"])
def test_pnn_equals_the_paper(product):
    for schema in (one_dim_schema(), without_numbers(one_dim_schema())):
        model = made(pnn.Model, schema, **UNITS, product=product)
        check_equals(naive_pnn(product), model, schema, random_rows(schema, 12))
        check_model(model, schema)
    check_dense_start(pnn.Model, one_dim_schema(), **UNITS, product=product)


def test_pnn_without_product_weights_is_a_plain_network():
    schema = one_dim_schema()
    rows = random_rows(schema, 12)
    found = []
    for product in ("inner", "outer"):
        model = made(pnn.Model, schema, **UNITS, product=product)
        shared = {name: value for name, value in model.state_dict().items() if not name.startswith("head.products.")}
        if found:
            model.load_state_dict(found[0][0], strict=False)
        torch.nn.init.zeros_(next(model.head.products.parameters()))
        found.append((shared, logits(model, schema, rows)))
    torch.testing.assert_close(found[0][1], found[1][1])


def test_opnn_takes_one_feature():
    check_model(made(pnn.Model, one_feature(), **UNITS, product="outer"), one_feature())


def test_pnn_drops_units_of_its_product_layer_in_training_only():
    schema = one_dim_schema()
    model, rows = made(pnn.Model, schema, hidden_units=[64], dropout=0.5), random_rows(schema, 12)
    assert torch.equal(logits(model, schema, rows), logits(model, schema, rows))
    model.train()
    assert not torch.equal(logits(model, schema, rows), logits(model, schema, rows))


def test_dlrm_equals_the_paper():
    for schema in (one_dim_schema(), without_numbers(one_dim_schema())):
        model = made(dlrm.Model, schema, **DLRM_UNITS)
        check_equals(naive_dlrm, model, schema, random_rows(schema, 12))
        check_model(model, schema)
        assert (model.head.bottom is None) == (not schema.dense)
    check_dense_start(dlrm.Model, one_dim_schema(), **DLRM_UNITS)


def test_dlrm_with_numbers_and_one_feature_multiplies_them():
    schema = one_feature()
    schema = replace(schema, features={**schema.features, "price": Feature("dense")})
    model = made(dlrm.Model, schema, **DLRM_UNITS)
    check_equals(naive_dlrm, model, schema, random_rows(schema, 12))


def test_mistakes():
    numbers = Schema(features={"price": Feature("dense")})
    for model_class, schema, options, told in (
        (pnn.Model, small_schema(), {}, "category: 4.*model pnn multiplies.*one embedding_dim"),
        (dlrm.Model, small_schema(), {}, "category: 4.*model dlrm multiplies.*one embedding_dim"),
        (pnn.Model, numbers, {}, "model pnn needs at least one"),
        (dlrm.Model, numbers, {}, "model dlrm needs at least one"),
        (pnn.Model, one_feature(), {}, "has one feature: model pnn with model.product=inner"),
        (dlrm.Model, one_feature(), {}, "has one feature: model dlrm multiplies two"),
        (pnn.Model, one_dim_schema(), {"product": "iner"}, "model.product: 'iner' is not known; did you mean 'inner'"),
        (pnn.Model, one_dim_schema(), {"hidden_units": []}, r"model.hidden_units is \[\]"),
        (pnn.Model, one_dim_schema(), {"dropout": -0.1}, "model.dropout is -0.1"),
        (dlrm.Model, one_dim_schema(), {"bottom_units": [0]}, r"model.bottom_units is \[0\]"),
        (dlrm.Model, one_dim_schema(), {"hidden_units": []}, r"model.hidden_units is \[\]"),
    ):
        with pytest.raises(ValueError, match=told):
            model_class(schema, **options, device=CPU)
