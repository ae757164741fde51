"""The schema derives what the program needs and refuses to contradict itself."""

import pytest

from data_loaders.schema import Cross, Feature, Layout, Schema, Table


def schema(**changes):
    parts = {
        "tables": {"user": Table(100), "item": Table(50, embedding_dim=8), "hour": Table(24)},
        "features": {
            "user_id": Feature("sparse", table="user", ids="hash"),
            "item_id": Feature("sparse", column="item", table="item"),
            "hour": Feature("sparse", table="hour", missing_id=0),
            "clicked": Feature("sequence", table="item", target="item_id", max_length=5),
            "price": Feature("dense"),
        },
        "crosses": {"user_x_hour": Cross(["user_id", "hour"], 1000)},
    }
    return Schema(**{**parts, **changes})


def test_layouts_keys_and_columns():
    s = schema()
    assert s.layout() == Layout(("user_id", "item_id", "hour", "clicked"))
    assert s.layout(crosses=True).pooled[-1] == "user_x_hour"
    assert s.layout(attention=True) == Layout(("user_id", "hour"), ("item_id", "clicked"))
    assert s.columns(s.layout()) == ("price", "user_id", "item", "hour", "clicked")
    assert s.columns(Layout(("user_x_hour",))) == ("price", "user_id", "hour")
    assert s.wide == ("user_id", "item_id", "hour", "user_x_hour")
    assert s.histories == {"clicked": ("clicked",)}
    assert (s.dim("item"), s.dim("user"), s.num_embeddings("user_x_hour"), s.num_embeddings("clicked")) == (
        8,
        16,
        1000,
        50,
    )
    assert (s.missing_id("user_id"), s.missing_id("item_id"), s.missing_id("hour")) == (0, None, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": {"user": Table(0)}}, "schema.tables.user.num_embeddings is 0"),
        ({"tables": {"user": Table(9, embedding_dim=6)}}, "multiple of 4"),
        ({"features": {"x": Feature("sparse", table="usr")}}, "did you mean 'user'"),
        ({"features": {"x": Feature("dense", table="user")}}, "a dense feature has no table"),
        ({"features": {"x": Feature("sparse", table="hour", missing_id=24)}}, "rows 0 … 23"),
        ({"features": {"x": Feature("sequence", table="item")}}, "max_length is missing"),
        ({"features": {"x": Feature("sparse", table="hour", on_null="skip")}}, "valid: missing, error, drop"),
        ({"crosses": {"c": Cross(["user_id"], 10)}}, "at least two"),
        ({"crosses": {"hour": Cross(["user_id", "hour"], 10)}}, "rename the cross"),
        ({"crosses": {"c": Cross(["user_id", "price"], 10)}}, "'price' is not known"),
    ],
)
def test_a_contradiction_names_its_place_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        schema(**changes)


def test_a_sequence_and_its_target_share_a_table():
    features = {**schema().features, "clicked": Feature("sequence", table="item", target="hour", max_length=5)}
    with pytest.raises(ValueError, match="share a table"):
        schema(features=features)
