import numpy as np
import pytest
import torch

from data_loaders.schema import Feature, Schema, Table
from tests.helpers.samples import (
    activate,
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
from trainer.models.din import Model

UNITS = {"hidden_units": [8, 4], "attention_units": [8, 4]}


def build(schema: Schema, **options) -> torch.nn.Module:
    model = Model(schema, **UNITS, **options, device=torch.device("cpu"))
    randomize(model)
    return model.eval()


def bare_schema() -> Schema:
    """A candidate and its history: no number, nothing pooled."""
    return Schema(
        embedding_dim=8,
        tables={"item": Table(30)},
        features={
            "item_id": Feature("sparse", table="item"),
            "clicked": Feature("sequence", table="item", max_length=6, target="item_id"),
        },
    )


def two_histories_schema() -> Schema:
    """Clicks, of two attributes, and visits are each looked at by a candidate of their own; their tables differ in width."""
    schema = small_schema()
    schema.tables["shop"] = Table(15, embedding_dim=4)
    schema.features["shop_id"] = Feature("sparse", table="shop")
    schema.features["visited_shops"] = Feature("sequence", table="shop", max_length=9, target="shop_id")
    return schema


def naive_logit(schema: Schema, values: dict[str, np.ndarray], row: dict, activation: str, softmax: bool) -> float:
    """Figure 2 and equations 2 and 3 of the paper on one row."""

    def weights(key: str) -> np.ndarray:
        table = schema.features[key].table
        pooled = f"embedding_bags.embedding_bags.{table}.weight"
        return values.get(pooled, values.get(f"embeddings.dim_{schema.dim(table)}.embeddings.{table}.weight"))

    def pool(key: str) -> np.ndarray:
        return pooled_bag(weights(key), row[key], schema.tables[schema.features[key].table].pooling)

    attended = [key for group in schema.histories.values() for key in group]
    layout = schema.layout(attention=True)
    plain = [key for key in (*layout.pooled, *layout.unpooled) if key not in attended]
    inputs = [np.array([row[key] for key in schema.dense]), *(pool(key) for key in plain)]
    for number, group in enumerate(schema.histories.values()):
        query = np.concatenate([pool(schema.features[key].target) for key in group])
        events = [np.concatenate([weights(key)[row[key][t]] for key in group]) for t in range(len(row[group[0]]))]
        inputs.append(naive_interest(values, f"head.attentions.{number}", query, events, activation, softmax))
    return float(mlp(values, "head.deep", np.concatenate(inputs), activation)[0])


def naive_interest(
    values: dict[str, np.ndarray], prefix: str, query: np.ndarray, events: list, activation: str, softmax: bool
) -> np.ndarray:
    scores = []
    for number, event in enumerate(events):
        inputs = np.concatenate([query, event, query - event, query * event])
        hidden = values[f"{prefix}.first.weight"] @ inputs + values[f"{prefix}.first.bias"]
        if f"{prefix}.positions" in values:
            hidden = hidden + values[f"{prefix}.positions"][len(events) - 1 - number]
        if f"{prefix}.cosine.weight" in values:
            cosine = query @ event / (np.linalg.norm(query) * np.linalg.norm(event) or 1.0)
            hidden = hidden + values[f"{prefix}.cosine.weight"][:, 0] * cosine
        hidden = activate(values, f"{prefix}.activation", hidden, activation)
        scores.append(float(mlp(values, f"{prefix}.rest", hidden, activation)[0]))
    if softmax and scores:
        scores = np.exp(scores) / np.exp(scores).sum()
    added = values.get(f"{prefix}.intensity", 0.0)
    return sum((score * (event + added) for score, event in zip(scores, events)), np.zeros_like(query))


SCHEMAS = [small_schema, bare_schema, two_histories_schema]


@pytest.mark.parametrize("make_schema", SCHEMAS)
@pytest.mark.parametrize("options", [{}, {"position": "learned"}, {"cosine": True, "intensity": True}])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ["dice", "prelu"])
def test_equals_the_paper_and_its_extensions(make_schema, activation, softmax, options):
    schema = make_schema()
    model = build(schema, activation=activation, softmax=softmax, **options)
    rows = random_rows(schema, 12)
    expected = [naive_logit(schema, state(model), row, activation, softmax) for row in rows]
    np.testing.assert_allclose(model(make_batch(schema, model.layout, rows)).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make_schema", SCHEMAS)
@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "prelu", "softmax": True, "position": "learned"}, {"cosine": True, "intensity": True}],
)
def test_contract(make_schema, options):
    # What is added to every score of a history, its softmax takes out again.
    cancelled = [".rest.output.bias"] if options.get("softmax") else []
    check_model(build(make_schema(), **options), make_schema(), cancelled)
    check_dense_start(Model, make_schema(), **UNITS, **options)


def test_conf():
    check_conf(Model, "din")


def test_tables_of_attended_sequences_are_read_id_by_id():
    model = build(small_schema())
    assert model.layout.pooled == ("user.id", "tags")
    assert model.layout.unpooled == ("item_id", "category_id", "clicked_items", "clicked_categories", "carted_items")
    assert list(model.embedding_bags.embedding_bags) == ["user", "tag"]
    assert {name: list(part.embeddings) for name, part in model.embeddings.items()} == {
        "dim_8": ["item"],
        "dim_4": ["category"],
    }


def test_each_history_has_its_own_distances_as_many_as_it_may_have_events():
    attentions = build(two_histories_schema(), position="learned").head.attentions
    assert [tuple(attention.positions.shape) for attention in attentions] == [(6, 8), (9, 8)]
    assert all(attention.positions is None for attention in build(two_histories_schema()).head.attentions)


def test_the_order_of_events_matters_to_positions_alone():
    schema = bare_schema()
    rows = [{"item_id": [1], "clicked": clicked} for clicked in ([7, 8, 9], [9, 8, 7])]
    for position, same in (("none", True), ("learned", False)):
        model = build(schema, position=position)
        first, second = model(make_batch(schema, model.layout, rows)).tolist()
        assert (first == pytest.approx(second, rel=1e-4)) is same


def test_nothing_pooled():
    assert build(bare_schema()).embedding_bags is None


def test_candidate_changes_the_interest():
    schema = bare_schema()
    model = build(schema)
    model.head.deep = torch.nn.Identity()  # looks at the network's inputs: candidate [8], interest [8]
    model.head.deep.forward = lambda inputs, valid: inputs[:, 8:].sum(1, keepdim=True)
    rows = [{"item_id": [i], "clicked": [7, 8, 9]} for i in (1, 2)] + [{"item_id": [1]}, {"clicked": [7]}]
    first, second, empty, unknown = model(make_batch(schema, model.layout, rows)).tolist()
    assert first != pytest.approx(second, rel=1e-3)
    assert empty == 0.0
    assert unknown != 0.0


def test_mistakes():
    schema = bare_schema()
    schema.features["clicked"].target = None
    with pytest.raises(ValueError, match="no sequence with a target.*set target"):
        Model(schema, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"model.attention_units is \[\]"):
        Model(bare_schema(), attention_units=[], device=torch.device("cpu"))
    with pytest.raises(ValueError, match="model.position: 'learnt' is not known; did you mean 'learned'"):
        Model(bare_schema(), position="learnt", device=torch.device("cpu"))
    with pytest.raises(ValueError, match="model.activation: 'dic' is not known; did you mean 'dice'"):
        Model(bare_schema(), activation="dic", device=torch.device("cpu"))
