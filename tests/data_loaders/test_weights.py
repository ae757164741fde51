"""Ids with weights: decoded, shuffled and batched as a row-by-row reading would."""

import numpy as np
import pyarrow as pa
import pytest

from data_loaders.batch import Cursor
from data_loaders.collate import Chunk, Collator
from data_loaders.column_decoders import Counters, RowError
from data_loaders.columns import concat_bags
from data_loaders.decode import Decoder
from data_loaders.errors import UserError
from data_loaders.schema import Feature, Schema, Table

ROWS = 30


def schema(pooling, **options):
    features = {
        "single": Feature("sparse", table="t"),
        "plain": Feature("sparse", table="other"),
        "bag": Feature("sparse", column="ids", table="t", max_length=3, weights="w", **options),
        "unweighed": Feature("sparse", table="t", max_length=5),
    }
    return Schema(tables={"t": Table(50, pooling=pooling), "other": Table(4)}, features=features)


def table(rng):
    ids = [None if rng.random() < 0.1 else rng.integers(0, 50, rng.integers(0, 6)).tolist() for _ in range(ROWS)]
    weights = [None if bag is None else rng.integers(0, 5, len(bag)).tolist() for bag in ids]
    return pa.table(
        {
            "ids": pa.array(ids, pa.list_(pa.int32())),
            "w": pa.array(weights, pa.list_(pa.float64())),
            "single": rng.integers(0, 50, ROWS),
            "plain": rng.integers(0, 4, ROWS),
            "unweighed": pa.array([rng.integers(0, 50, i % 4).tolist() for i in range(ROWS)], pa.list_(pa.int32())),
            "label": [0] * ROWS,
        }
    )


def decoded(rows, spec):
    layout = spec.layout()
    types = {field.name: field.type for field in rows.schema}
    decoder = Decoder(spec, layout, types, counters := Counters())
    return decoder([rows], len(rows)), decoder, layout, counters.snapshot()


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_batches_hold_what_a_sum_multiplies_each_id_by(pooling):
    rows = table(np.random.default_rng(1))
    columns, decoder, layout, counts = decoded(rows.slice(2), schema(pooling))
    assert layout.weighted == ("single", "bag", "unweighed") and layout.plain == ("plain",)
    count = columns.num_rows
    batch = Collator(layout, decoder.slots, count + 2)(
        [Chunk(columns, 0, 11), Chunk(columns, 11, count)], float(count), Cursor(0, 1, count, count)
    )
    assert batch.sparse.keys() == ["plain"] and batch.sparse.weights_or_none() is None
    assert batch.weighted.keys() == list(layout.weighted)
    for key, column in (("bag", "ids"), ("unweighed", "unweighed"), ("single", "single")):
        found = batch.weighted[key]
        offsets = found.offsets().tolist()
        for number, row in enumerate(rows.slice(2).to_pylist()):
            ids = [row[column]] if key == "single" else row[column] or []
            weights = (row["w"] or []) if key == "bag" else [1.0] * len(ids)
            if key == "bag":
                ids, weights = ids[-3:], weights[-3:]
            if pooling == "mean" and key != "single":
                weights = [w / (sum(weights) or 1) for w in weights]
            own = slice(offsets[number], offsets[number + 1])
            assert found.values()[own].tolist() == ids
            np.testing.assert_allclose(found.weights()[own].numpy(), weights, rtol=1e-6)
    assert counts["bag.truncated"] == sum(len(bag or []) > 3 for bag in rows["ids"][2:].to_pylist())


def test_they_follow_their_ids_through_a_shuffle():
    columns, decoder, *_ = decoded(table(np.random.default_rng(1)), schema("sum"))
    bag = columns.bags[decoder.slots["bag"].index]
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = concat_bags([bag.between(0, 7), bag.between(7, ROWS)]).take(order)
    for place, row in enumerate(order):
        own, was = (slice(*each.offsets[[i, i + 1]]) for each, i in ((shuffled, place), (bag, row)))
        assert shuffled.weights[own].tolist() == bag.weights[was].tolist()
    none = bag.without(np.arange(ROWS) > 3)
    assert len(none.weights) == len(none.values) == bag.offsets[4]


def test_ids_that_are_taken_out_take_their_weights_along():
    rows = table(np.random.default_rng(1)).slice(0, 1)
    for name, values in (("ids", [7, 99, 8]), ("w", [1.0, 5.0, 3.0])):
        rows = rows.set_column(rows.column_names.index(name), name, pa.array([values]))
    columns, decoder, *_ = decoded(rows, schema("mean", on_out_of_range="missing"))
    bag = columns.bags[decoder.slots["bag"].index]
    assert bag.values.tolist() == [7, 8] and bag.weights.tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("pooling", "weights", "message"),
    [
        ("sum", [1.0, 2.0], r"the weights of feature 'bag' \(column 'w'\) are 2 for 3 ids: write a finite number"),
        ("sum", None, "are 0 for 3 ids"),
        ("sum", [1.0, None, 2.0], "are null, not finite"),
        ("sum", [1.0, float("inf"), 2.0], "are null, not finite"),
        ("mean", [1.0, -1.0, 2.0], "in a mean, negative"),
    ],
)
def test_weights_that_cannot_be(pooling, weights, message):
    rows = table(np.random.default_rng(1)).slice(0, 2)
    for name, values in (("ids", [[1], [1, 2, 3]]), ("w", [[1.0], weights])):
        kind = pa.list_(pa.int32() if name == "ids" else pa.float64())
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values, kind))
    with pytest.raises(RowError, match=message) as error:
        decoded(rows, schema(pooling))
    assert error.value.row == 1


def test_declarations_that_contradict_themselves():
    with pytest.raises(UserError, match="weights: only ids have weights, this is dense"):
        Schema(features={"x": Feature("dense", weights="w")})
    rows = table(np.random.default_rng(1))
    texts = rows.set_column(1, "w", pa.array([["a"]] * ROWS))
    with pytest.raises(
        UserError, match="the weights of sparse feature 'bag': column 'w' has type string, expected a list"
    ):
        decoded(texts, schema("sum"))
    spec = schema("sum")
    spec.features["history"] = Feature("sequence", table="t", max_length=3, target="single")
    with pytest.raises(UserError, match="schema.features.bag.weights: its table 't' is read id by id by this model"):
        spec.layout(attention=True)
