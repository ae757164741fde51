"""BST and DIEN against their papers' formulas, a row at a time."""

import numpy as np
import pytest
import torch

from tests.helpers.model_checks import CPU, check_equals, made
from tests.helpers.samples import (
    check_dense_start,
    check_model,
    make_batch,
    mlp,
    pooled_bag,
    random_rows,
    small_schema,
)
from trainer.models import bst, dien
from trainer.modules.jagged import Segments
from trainer.modules.sequences import auxiliary_loss


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def softmax(values):
    return np.exp(values - values.max()) / np.exp(values - values.max()).sum()


def normed(values, gain, bias):
    return (values - values.mean()) / np.sqrt(values.var() + 1e-5) * gain + bias


def naive_transformer(own, heads, candidate, events):
    last = len(own["positions"]) - 1
    items = [event + own["positions"][min(len(events) - i, last)] for i, event in enumerate(events)]
    query, items = candidate + own["positions"][0], [*items, candidate + own["positions"][0]]
    width, parts = len(query) // heads, []
    for head in range(heads):
        mine = slice(head * width, (head + 1) * width)
        scores = np.array([(own["query"][mine] @ query) @ (own["key"][mine] @ item) for item in items])
        weights = softmax(scores / np.sqrt(width))
        parts.append(sum(weight * (own["value"][mine] @ item) for weight, item in zip(weights, items)))
    hidden = normed(query + own["output"] @ np.concatenate(parts), own["gains"][0], own["biases"][0])
    inner = own["first"] @ hidden + own["first_bias"]
    made = own["second"] @ np.where(inner > 0, inner, 0.01 * inner) + own["second_bias"]
    return normed(hidden + made, own["gains"][1], own["biases"][1])


def naive_gru(own, layer, inputs, attention):
    (iu, ir, ih), (hu, hr, hh), (bu, br, bh) = (own[f"{layer}.{part}"] for part in ("inputs", "hidden", "bias"))
    state, states = np.zeros(len(bu)), []
    for event, weight in zip(inputs, attention):
        update, reset = sigmoid(iu @ event + hu @ state + bu), sigmoid(ir @ event + hr @ state + br)
        new = np.tanh(ih @ event + reset * (hh @ state) + bh)
        state = (1 - weight * update) * state + weight * update * new
        states.append(state)
    return states


def naive_evolution(own, _, candidate, events):
    if not events:
        return np.zeros_like(candidate)
    interests = naive_gru(own, "extractor", events, np.ones(len(events)))
    attention = softmax(np.array([state @ own["weight"] @ candidate for state in interests]))
    return naive_gru(own, "evolution", interests, attention)[-1]


def naive(interest, heads, activation):
    def logit(schema, values, row):
        def weights(key):
            table = schema.features[key].table
            pooled = f"embedding_bags.embedding_bags.{table}.weight"
            return values.get(pooled, values.get(f"embeddings.dim_{schema.dim(table)}.embeddings.{table}.weight"))

        def pool(key):
            return pooled_bag(weights(key), row[key], schema.tables[schema.features[key].table].pooling)

        attended = [key for group in schema.histories.values() for key in group]
        layout = schema.layout(attention=True)
        plain = [key for key in (*layout.pooled, *layout.unpooled) if key not in attended]
        inputs = [np.array([row[key] for key in schema.dense]), *(pool(key) for key in plain)]
        for number, group in enumerate(schema.histories.values()):
            prefix = f"head.attentions.{number}."
            own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
            candidate = np.concatenate([pool(schema.features[key].target) for key in group])
            events = [np.concatenate([weights(key)[row[key][t]] for key in group]) for t in range(len(row[group[0]]))]
            inputs.append(interest(own, heads, candidate, events))
        return float(mlp(values, "head.deep", np.concatenate(inputs), activation)[0])

    return logit


CASES = {
    "bst": (bst.Model, {"heads": 3, "block_units": 5, "hidden_units": [8]}, naive(naive_transformer, 3, "relu")),
    "dien": (dien.Model, {"hidden_units": [8]}, naive(naive_evolution, 1, "dice")),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_paper(name):
    model_class, options, formula = CASES[name]
    model = made(model_class, small_schema(), **options)
    check_equals(formula, model, small_schema(), random_rows(small_schema(), 12))
    check_model(model, small_schema())
    check_dense_start(model_class, small_schema(), **options)


def test_the_auxiliary_loss_tells_the_next_event_from_one_of_another_history():
    draw = np.random.default_rng(0)
    interests, tokens, offsets = draw.normal(size=(7, 3)), draw.normal(size=(7, 3)), [0, 3, 3, 4, 7]
    terms = []
    for start, end in zip(offsets, offsets[1:]):
        for t in range(start, end - 1):
            right, other = interests[t] @ tokens[t + 1], interests[t] @ tokens[(t + 7 // 2 + 1) % 7]
            terms.append(-np.log(sigmoid(right)) - np.log(1 - sigmoid(other)))
    found = auxiliary_loss(*map(torch.tensor, (interests, tokens)), Segments.of(torch.tensor(offsets), 7))
    assert len(terms) == 4 and float(found) == pytest.approx(np.mean(terms))


def test_the_auxiliary_loss_is_learnt_beside_the_logits_which_it_leaves_as_they_are():
    """The gradient of the logits' sum with it, less that without, is that of the loss itself, times its weight."""
    schema, rows, found = small_schema(), random_rows(small_schema(), 12), {}
    for weight in (0.0, 0.5):
        model = made(dien.Model, schema, hidden_units=[8], activation="relu", auxiliary=weight).train()
        batch, evolution = make_batch(schema, model.layout, rows), model.head.attentions[0]
        logits = model(batch)
        logits.sum().backward()
        assert evolution.extracted is None
        found[weight] = logits.detach(), evolution.extractor.inputs.grad.clone()
    assert torch.equal(found[0.0][0], found[0.5][0])
    model.zero_grad()
    caught = {}
    evolution.register_forward_hook(lambda module, *_: caught.update(loss=auxiliary_loss(*module.extracted)))
    model(batch)
    (expected,) = torch.autograd.grad(0.5 * caught["loss"], evolution.extractor.inputs)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found[0.5][1] - found[0.0][1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_class", "options", "told"),
    [
        (
            bst.Model,
            {"heads": 5},
            "model.heads is 5, which does not divide 12, the width of the events of clicked_items",
        ),
        (bst.Model, {"block_dropout": 1.0}, "model.block_dropout is 1.0"),
        (dien.Model, {"auxiliary": -1.0}, "model.auxiliary is -1.0"),
    ],
)
def test_mistakes(model_class, options, told):
    with pytest.raises(ValueError, match=told):
        model_class(small_schema(), **options, device=CPU)
