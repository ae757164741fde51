"""What becomes of what DIN adds to its paper and of counted ids when a new run begins with an old one's model."""

import pytest
import torch

from data_loaders.schema import Feature, Schema
from tests.helpers.old_runs import Run, dense, start
from tests.helpers.samples import small_schema
from trainer.checkpoint.piece import whole_piece

POSITIONS = "dense/model.head.attentions.{}.positions"


def run(schema: Schema, seed: int, position: str = "learned", **options) -> Run:
    return Run(schema, "din", seed=seed, attention_units=[8, 4], position=position, **options)


def with_visits_first() -> Schema:
    """A history of its own before the old one, whose attention thereby is the second."""
    schema = small_schema()
    visits = Feature("sequence", table="item", max_length=4, target="item_id")
    schema.features = {"visited_items": visits, **schema.features}
    return schema


def test_position_vectors_go_with_their_history(tmp_path):
    old, new = run(small_schema(), seed=1), run(with_visits_first(), seed=2, fresh=True)
    report = start(old.save(tmp_path / "step-7"), new, skip=["features/visited_items"])
    assert torch.equal(new.now(POSITIONS.format(1)), old.now(POSITIONS.format(0)))
    assert torch.equal(new.now(POSITIONS.format(0)), new.before[POSITIONS.format(0)])
    assert dense(report, "model.head.attentions.1.positions").status == "kept"


def test_position_vectors_that_come_go_or_change_their_number_need_a_rule(tmp_path):
    longer = small_schema()
    for name in ("clicked_items", "clicked_categories"):
        longer.features[name].max_length = 8
    name = POSITIONS.format(0)
    cases = [
        (run(small_schema(), 1, "none"), run(small_schema(), 2), f"{name} is new.*skip: ", {"skip": [name]}),
        (run(small_schema(), 1), run(small_schema(), 2, "none"), f"{name} of the old run.*drop: ", {"drop": [name]}),
        (run(small_schema(), 1), run(longer, 2), f"{name} has shape .8, 8., had .6, 8.*skip: ", {"skip": [name]}),
    ]
    for number, (old, new, message, rules) in enumerate(cases):
        folder = old.save(tmp_path / f"step-{number}")
        with pytest.raises(ValueError, match=message):
            start(folder, new)
        start(folder, new, **rules)
        if "skip" in rules:
            assert torch.equal(new.now(name), new.before[name])


def test_the_direction_of_intensity_moves_by_attribute(tmp_path):
    """It belongs to the columns of an event, which may change places."""
    options = {"cosine": True, "intensity": True}
    turned = small_schema()
    names = ["clicked_categories", "clicked_items"]
    others = {name: feature for name, feature in turned.features.items() if name not in names}
    turned.features = {**others, **{name: turned.features[name] for name in names}}
    old, new = run(small_schema(), 1, **options), run(turned, 2, fresh=True, **options)
    name = "dense/model.head.attentions.0.intensity"
    width = {key: small_schema().dim(small_schema().features[key].table) for key in names}
    start(old.save(tmp_path / "step-7"), new)
    items, categories = old.now(name).split([width["clicked_items"], width["clicked_categories"]])
    assert torch.equal(new.now(name), torch.cat((categories, items)))
    cosine = "dense/model.head.attentions.0.cosine.weight"
    assert torch.equal(new.now(cosine), old.now(cosine))


def test_counted_ids_are_those_of_the_new_data(tmp_path):
    """The old run's counts are neither taken nor missed."""
    old, new = run(small_schema(), seed=1), run(small_schema(), seed=2, fresh=True)
    old.pieces.append(whole_piece("counts/item", torch.full((30, 1), 5)))
    old.pieces.append(whole_piece("counts/user", torch.full((20, 1), 5)))
    new.pieces.append(whole_piece("counts/item", torch.full((30, 1), 7)))
    start(old.save(tmp_path / "step-7"), new)
    assert (new.now("counts/item") == 7).all()
    assert torch.equal(new.now("tables/item/weight"), old.now("tables/item/weight"))
