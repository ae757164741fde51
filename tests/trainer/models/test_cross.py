"""DCN and DCN-V2 and their cross networks against the papers' formulas, a row at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_loaders.schema import Feature, Schema
from tests.helpers.model_checks import CPU, check_equals, field, logits, made, without_numbers
from tests.helpers.samples import check_dense_start, check_model, mlp, random_rows, randomize, small_schema, state
from trainer.models import dcn, dcn_v2, embedding_mlp
from trainer.modules.interactions import CrossNetwork, LowRankCrossNetwork, MatrixCrossNetwork

UNITS = {"hidden_units": [8, 4]}
V2_OPTIONS = {
    "full, stacked": {},
    "full, parallel": {"structure": "parallel"},
    "rank 3": {"rank": 3},
    "three experts": {"rank": 2, "experts": 3, "structure": "parallel"},
}


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum()


def naive_cross(values, start):
    """Equation 3 of DCN."""
    crossed = start
    for weight, bias in zip(values["weights"], values["biases"], strict=True):
        crossed = np.outer(start, crossed) @ weight + bias + crossed
    return crossed


def naive_cross_v2(values, start, rank, experts):
    """Equations 1 to 5 of DCN-V2, expert by expert."""
    crossed = start
    for layer, bias in enumerate(values["biases"]):
        if rank is None:
            product = start * (values["weights"][layer].reshape(len(start), len(start)) @ crossed + bias)
        elif experts == 1:
            product = start * (values["up"][layer] @ (values["down"][layer] @ crossed) + bias)
        else:
            gates = softmax(values["gates"][layer] @ crossed)
            product = np.zeros_like(start)
            for k in range(experts):
                rows = slice(k * rank, (k + 1) * rank)
                hidden = np.tanh(values["down"][layer][rows] @ crossed)
                hidden = np.tanh(values["middle"][layer][k] @ hidden)
                product = product + gates[k] * start * (values["up"][layer][:, rows] @ hidden + bias)
        crossed = product + crossed
    return crossed


def part(values, prefix):
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def naive_inputs(schema, values, row):
    embedded = [field(schema, values, key, row) for key in (*schema.sparse, *schema.sequences)]
    return np.concatenate([np.array([row[key] for key in schema.dense]), *embedded])


def naive_dcn(schema, values, row):
    inputs = naive_inputs(schema, values, row)
    crossed = naive_cross(part(values, "head.cross."), inputs)
    deep = float(mlp(values, "head.deep", inputs, "relu")[0])
    return deep + values["head.cross_output.weight"][0] @ crossed


def naive_dcn_v2(structure="stacked", rank=None, experts=1):
    def logit(schema, values, row):
        inputs = naive_inputs(schema, values, row)
        crossed = naive_cross_v2(part(values, "head.cross."), inputs, rank, experts)
        if structure == "stacked":
            return float(mlp(values, "head.deep", crossed, "relu")[0])
        return float(mlp(values, "head.deep", inputs, "relu")[0]) + values["head.cross_output.weight"][0] @ crossed

    return logit


def randomized(module, std=0.3):
    randomize(module, std=std)
    return module


def small(model_class, schema, **options):
    """Weights of 0.2: products of several layers of larger ones lose float32's digits."""
    model = model_class(schema, **options, device=CPU)
    randomize(model, std=0.2)
    return model.eval()


@pytest.mark.parametrize("layers", [1, 3])
def test_dcn_equals_the_paper(layers):
    for schema in (small_schema(), without_numbers(small_schema())):
        model = small(dcn.Model, schema, **UNITS, cross_layers=layers)
        check_equals(naive_dcn, model, schema, random_rows(schema, 12))
        check_model(model, schema)
    check_dense_start(dcn.Model, small_schema(), **UNITS, cross_layers=layers)


@pytest.mark.parametrize("options", V2_OPTIONS.values(), ids=V2_OPTIONS)
def test_dcn_v2_equals_the_paper(options):
    for schema in (small_schema(), without_numbers(small_schema())):
        model = small(dcn_v2.Model, schema, **UNITS, cross_layers=2, **options)
        check_equals(naive_dcn_v2(**options), model, schema, random_rows(schema, 12))
        check_model(model, schema)
    check_dense_start(dcn_v2.Model, small_schema(), **UNITS, **options)


def test_dcn_without_cross_layers_is_the_deep_network_alone():
    schema, rows = small_schema(), random_rows(small_schema(), 12)
    model = made(dcn.Model, schema, **UNITS, cross_layers=0)
    deep = embedding_mlp.Model(schema, **UNITS, activation="relu", device=CPU)
    deep.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, schema, rows), logits(deep, schema, rows))


def test_cross_layers_of_zeros_change_nothing():
    inputs = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    for network in (CrossNetwork(7, 3), MatrixCrossNetwork(7, 3), LowRankCrossNetwork(7, 3, 2, 1)):
        for parameter in network.parameters():
            torch.nn.init.zeros_(parameter)
        assert torch.equal(network(inputs), inputs)


def test_a_matrix_whose_rows_are_all_one_vector_is_dcns_first_layer():
    """Wang et al., 2021, section 3.4: W = 1 w^T gives ``x_0 (x_0 . w)``, if the bias is not multiplied."""
    inputs = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    vector, matrix = randomized(CrossNetwork(7, 1)), MatrixCrossNetwork(7, 1)
    with torch.no_grad():
        vector.biases.zero_()
        matrix.weights.copy_(vector.weights.unsqueeze(1).expand(1, 7, 7).reshape(matrix.weights.shape))
    torch.testing.assert_close(matrix(inputs), vector(inputs), rtol=1e-5, atol=1e-5)


def test_low_rank_of_full_rank_equals_the_full_matrix():
    inputs = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    full, low = randomized(MatrixCrossNetwork(7, 3)), LowRankCrossNetwork(7, 3, 7, 1)
    with torch.no_grad():
        low.up.copy_(full.weights.reshape(3, 7, 7))
        low.down.copy_(torch.eye(7).expand(3, 7, 7))
        low.biases.copy_(full.biases)
    torch.testing.assert_close(low(inputs), full(inputs), rtol=1e-4, atol=1e-5)


def test_experts_that_are_all_alike_are_as_good_as_two_of_them():
    """The gates sum to 1, whatever they are."""
    inputs = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    two, four = randomized(LowRankCrossNetwork(7, 2, 3, 2)), randomized(LowRankCrossNetwork(7, 2, 3, 4))
    with torch.no_grad():
        for network in (two, four):
            experts = network.num_experts
            network.down.copy_(two.down[:, :3].repeat(1, experts, 1))
            network.up.copy_(two.up[:, :, :3].repeat(1, 1, experts))
            network.middle.copy_(two.middle[:, :1].expand_as(network.middle))
            network.biases.copy_(two.biases)
    torch.testing.assert_close(four(inputs), two(inputs), rtol=1e-5, atol=1e-5)


def test_a_cross_layer_with_a_vector_keeps_its_digits_under_autocast():
    network, inputs = randomized(CrossNetwork(64, 4)), torch.randn(9, 64)
    exact = network(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(inputs), exact)


def test_new_cross_networks_multiply_by_about_one():
    """The products of a fresh network are of the size of its inputs, however wide it is."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(200, 512, generator=generator)
    for network in (CrossNetwork(512, 1), MatrixCrossNetwork(512, 1), LowRankCrossNetwork(512, 1, 32, 1)):
        product = network(inputs).detach() - inputs
        assert 0.7 < float(product.std()) < 1.4, type(network)


def test_state_of_a_model_names_what_it_has():
    values = state(dcn_v2.Model(small_schema(), **UNITS, rank=2, experts=3, structure="parallel", device=CPU))
    found = {name.removeprefix("head.cross.") for name in values if name.startswith("head.cross.")}
    assert found == {"down", "up", "biases", "middle", "gates"}


def test_mistakes():
    numbers = Schema(features={"price": Feature("dense")})
    for model_class, schema, options, told in (
        (dcn.Model, numbers, {}, "model dcn needs at least one"),
        (dcn_v2.Model, numbers, {}, "model dcn_v2 needs at least one"),
        (dcn.Model, small_schema(), {"cross_layers": -1}, "model.cross_layers is -1: it must be at least 0"),
        (dcn.Model, small_schema(), {"hidden_units": [0]}, r"model.hidden_units is \[0\]"),
        (dcn_v2.Model, small_schema(), {"cross_layers": 0}, "model.cross_layers is 0: it must be at least 1"),
        (dcn_v2.Model, small_schema(), {"structure": "stack"}, "model.structure: 'stack'.*did you mean 'stacked'"),
        (dcn_v2.Model, small_schema(), {"rank": 0}, "model.rank is 0"),
        (dcn_v2.Model, small_schema(), {"experts": 0}, "model.experts is 0"),
        (dcn_v2.Model, small_schema(), {"experts": 4}, "model.experts is 4, but.*full: give model.rank"),
        (dcn_v2.Model, small_schema(), {"dropout": 1}, "model.dropout is 1"),
    ):
        with pytest.raises(ValueError, match=told):
            model_class(replace(schema), **options, device=CPU)
