"""The steps of views and examples."""

import re

import pyarrow as pa
import pytest

from data_loaders.prepare import steps
from data_loaders.prepare.declaration import View
from tests.helpers import raw_tables


def apply(engine, table, *declared, scoring=False, **others):
    return steps.apply_steps(engine, table, View("log", list(declared)).parsed("examples"), others, scoring=scoring)


def plain(engine, table):
    """Rows without what is the program's."""
    return [
        {name: value for name, value in row.items() if not name.startswith("__")}
        for row in raw_tables.rows(engine, table)
    ]


def keys(engine, table):
    return [(row["__row"], row["__part"]) for row in raw_tables.rows(engine, table)]


def test_where_keeps_the_rows_for_which_it_is_true(engine, tmp_path):
    table = raw_tables.make(engine, tmp_path, rating=[4.0, 1.0, None, 5.0], name=["a", "b", "c", "it's"])
    made = apply(engine, table, {"where": "rating >= 4 -- good"}, {"where": "name = 'it''s' OR name LIKE 'a%'"})
    assert plain(engine, made) == [{"rating": 4.0, "name": "a"}, {"rating": 5.0, "name": "it's"}]
    assert keys(engine, made) == [(0, 0), (3, 0)]


def test_select_adds_and_replaces_and_sees_the_columns_before_it(engine, tmp_path):
    table = raw_tables.make(engine, tmp_path, a=[1, 2], b=[10, 20])
    made = apply(engine, table, {"select": {"a": "a + b", "c": "a * 2", "half": "a / 2", "odd name": "b IN (10, 30)"}})
    assert made.columns[:2] == ("a", "b")
    assert plain(engine, made) == [
        {"a": 11, "b": 10, "c": 2, "half": 0.5, "odd name": True},
        {"a": 22, "b": 20, "c": 4, "half": 1.0, "odd name": False},
    ]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"where": "ratng > 3"}, r"examples.steps\[0\].where: ratng > 3: 'ratng' .* did you mean 'rating'"),
        ({"where": "rating >"}, r"examples.steps\[0\].where: 'rating >' is not an SQL expression"),
        ({"where": "rating > 3 LIMIT 1"}, r"examples.steps\[0\].where"),
        (
            {"where": "no_function(rating) > 3"},
            r"examples.steps\[0\].where: 'no_function\(rating\) > 3': the function no_function\(\) is not one of those",
        ),
        ({"select": {"x": "ratng * 2"}}, r"examples.steps\[0\].select.*'ratng' .* did you mean 'rating'"),
        ({"select": {"__x": "rating"}}, r"examples.steps\[0\].select: '__x' begins with '__'"),
        ({"select": {"Rating": "rating"}}, r"'Rating' and the column 'rating' differ by case alone"),
        ({"where": "random() < 0.5"}, r"'random\(\) < 0.5' gives other values each time"),
        ({"drop": ["ratng"]}, r"examples.steps\[0\].drop: 'ratng' .* did you mean 'rating'"),
        ({"drop": ["__row"]}, r"'__row' is not known"),
        ({"distinct": ["ratng"]}, r"examples.steps\[0\].distinct: 'ratng'"),
    ],
)
def test_mistakes_in_expressions_and_columns_are_named_with_their_place(engine, tmp_path, step, message):
    table = raw_tables.make(engine, tmp_path, rating=[4.0])
    with pytest.raises(ValueError, match=message):
        apply(engine, table, step)


def test_drop_leaves_columns_out(engine, tmp_path):
    made = apply(engine, raw_tables.make(engine, tmp_path, a=[1], b=[2], c=[3]), {"drop": ["a", "c"]})
    assert made.columns == ("b", "__row", "__part")


def test_distinct_keeps_the_first_row_in_raw_order(engine, tmp_path):
    columns = {"u": [1, None, 1, 2, None, 2], "v": ["a", "b", "a", "a", "b", None], "x": [0, 1, 2, 3, 4, 5]}
    table = raw_tables.make(engine, tmp_path, **columns, __row=[5, 4, 3, 2, 1, 0])
    made = apply(engine, table, {"distinct": ["u", "v"]})
    assert raw_tables.column(engine, made, "x") == [5, 4, 3, 2]


def test_explode_makes_a_row_of_each_element(engine, tmp_path):
    table = raw_tables.make(
        engine,
        tmp_path,
        user=[1, 2, 3, 4],
        items=[[7, 8, None], [], None, [9]],
        clicked=[[0, 1, 0], [], [], [1]],
        __part=[0, 0, 0, 2],
    )
    step = {"explode": {"columns": {"items": "item", "clicked": "label"}, "position": "place"}}
    made = apply(engine, table, step)
    assert plain(engine, made) == [
        {"user": 1, "item": 7, "label": 0, "place": 0},
        {"user": 1, "item": 8, "label": 1, "place": 1},
        {"user": 1, "item": None, "label": 0, "place": 2},
        {"user": 4, "item": 9, "label": 1, "place": 0},
    ]
    assert keys(engine, made) == [(0, 0), (0, 1), (0, 2), (3, 2 * 65536)]


def test_explode_of_one_list_may_keep_its_name(engine, tmp_path):
    table = raw_tables.make(engine, tmp_path, user=[1, 2], tags=[["a", "b"], None])
    made = apply(engine, table, {"explode": {"columns": {"tags": "tags"}}})
    assert plain(engine, made) == [{"user": 1, "tags": "a"}, {"user": 1, "tags": "b"}]
    assert keys(engine, made) == [(0, 0), (0, 1)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"items": "item", "longer": "other"}, r"explode: in 2 row\(s\) the lists items, longer have unequal lengths"),
        ({"items": "user"}, "'user' is taken"),
        ({"items": "x", "same": "x"}, "'x' is taken"),
        ({"user": "x"}, "'user' is int64, not a list"),
        ({"itms": "x"}, "did you mean 'items'"),
    ],
)
def test_lists_that_cannot_be_exploded_are_named(engine, tmp_path, columns, message):
    table = raw_tables.make(
        engine, tmp_path, user=[1, 2, 3], items=[[1], [1], None], same=[[1], [1], None], longer=[[1], [], [5]]
    )
    with pytest.raises(ValueError, match=message):
        apply(engine, table, {"explode": {"columns": columns}})


def test_join_adds_columns_and_null_where_nothing_matches(engine, tmp_path):
    table = raw_tables.make(engine, tmp_path, item=pa.array([3, 1, None, 9], pa.int32()), user=[1, 2, 3, 4])
    items = raw_tables.make(
        engine, tmp_path, item=[1, 3, None, None], name=["a", "c", "none", "none"], price=[1, 3, 0, 0]
    )
    made = apply(engine, table, {"join": {"table": "items", "on": ["item"]}}, items=items)
    assert made.columns == ("item", "user", "__row", "__part", "name", "price")
    assert raw_tables.column(engine, made, "name") == ["c", "a", None, None]
    chosen = apply(engine, table, {"join": {"table": "items", "on": ["item"], "columns": ["price"]}}, items=items)
    assert raw_tables.column(engine, chosen, "price") == [3, 1, None, None]
    assert "name" not in chosen.columns


def test_join_on_two_columns(engine, tmp_path):
    table = raw_tables.make(engine, tmp_path, a=[1, 1, 2], b=["x", "y", "x"])
    other = raw_tables.make(engine, tmp_path, a=[1, 2, 1], b=["x", "x", "z"], c=[10, 20, 30])
    made = apply(engine, table, {"join": {"table": "other", "on": ["a", "b"]}}, other=other)
    assert raw_tables.column(engine, made, "c") == [10, None, 20]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"on": ["item"]}, r"'items' has 2 rows with item=1: keys must be unique.*distinct: \[item\]"),
        ({"on": ["itm"]}, r"join.on: 'itm' .* did you mean 'item'"),
        ({"on": ["user"]}, r"join.on, table 'items': 'user'"),
        ({"on": ["item"], "columns": ["pric"]}, r"join.columns, table 'items': 'pric' .* did you mean 'price'"),
        ({"on": ["name"]}, r"'name' is int64 here and 'name' is string in 'items'"),
        ({"on": ["item"], "columns": ["name"]}, r"'name' is taken"),
    ],
)
def test_joins_that_do_not_fit_are_named(engine, tmp_path, step, message):
    table = raw_tables.make(engine, tmp_path, item=[1], user=[1], name=[1])
    items = raw_tables.make(engine, tmp_path, item=[1, 1], name=["a", "b"], price=[1, 2])
    if step == {"on": ["item"]}:
        items = items.drop("name")
    with pytest.raises(ValueError, match=message):
        apply(engine, table, {"join": {"table": "items", **step}}, items=items)


def test_scoring_leaves_out_the_steps_that_make_labels(engine, tmp_path):
    table = raw_tables.make(engine, tmp_path, user=[1, 1], item=[1, 2], time=[1, 2])
    declared = [
        {"clicks": {"table": "log", "on": ["user"], "time": "time", "within": 1}},
        {"negatives": {"user": "user", "item": "item", "count": 1}},
        {"select": {"x": "item + 1"}},
    ]
    made = apply(engine, table, *declared, scoring=True, log=table)
    assert plain(engine, made) == [{"user": 1, "item": 1, "time": 1, "x": 2}, {"user": 1, "item": 2, "time": 2, "x": 3}]


def test_steps_follow_each_other(engine, tmp_path):
    sessions = raw_tables.make(engine, tmp_path, user=[1, 2], items=[[1, 2], [2, 3]], clicked=[[0, 1], [1, 0]])
    items = raw_tables.make(engine, tmp_path, item=[1, 2, 3], category=["a", "b", "b"])
    made = apply(
        engine,
        sessions,
        {"explode": {"columns": {"items": "item", "clicked": "label"}}},
        {"where": "label = 1"},
        {"join": {"table": "items", "on": ["item"]}},
        {"negatives": {"user": "user", "item": "item", "count": 1, "touched": "log"}},
        items=items,
        log=raw_tables.make(engine, tmp_path, user=[1, 2, 2, 9], item=[2, 2, 1, 3]),
    )
    assert [(row["user"], row["label"], row["__part"]) for row in raw_tables.rows(engine, made)] == [
        (1, 1, 65536),
        (1, 0, 65537),
        (2, 1, 0),
        (2, 0, 1),
    ]
    negatives = [row["item"] for row in raw_tables.rows(engine, made) if not row["label"]]
    assert negatives[0] in (1, 3) and negatives[1] == 3


def test_overlap_counts_what_two_lists_have_in_common(engine, tmp_path):
    table = raw_tables.make(
        engine, tmp_path, a=[[1, 2, 2, None], [], None, [5]], b=[[2, 2, 1, 7, None], [1], [3], [5, 5]]
    )
    made = apply(engine, table, {"overlap": {"lists": ["a", "b"], "into": "common"}})
    assert [row["common"] for row in plain(engine, made)] == [2, 0, 0, 1]
    assert keys(engine, made) == keys(engine, table)


def by_hand(text, longest):
    words = [word for word in re.split(r"[^\w]+|_", (text or "").lower()) if word]
    return [" ".join(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1)]


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_ngrams_are_runs_of_words(engine, tmp_path, longest):
    texts = ["Red  Shoes, size 42!", "Ärmel-Länge", "one", "", None, "a b c d e"]
    table = raw_tables.make(engine, tmp_path, title=texts)
    made = apply(engine, table, {"ngrams": {"text": "title", "into": "grams", "longest": longest}})
    assert [row["grams"] for row in plain(engine, made)] == [by_hand(text, longest) for text in texts]


def test_lookup_takes_the_value_of_a_map_by_a_key(engine, tmp_path):
    maps = pa.array([[("a", 1.5), ("b", 2.0)], [("a", 3.0)], None], pa.map_(pa.string(), pa.float64()))
    table = raw_tables.make(engine, tmp_path, prices=maps, market=["b", "b", "a"])
    made = apply(engine, table, {"lookup": {"map": "prices", "key": "market", "into": "price"}}, {"drop": ["prices"]})
    assert [row["price"] for row in plain(engine, made)] == [2.0, None, None]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"overlap": {"lists": ["a"], "into": "x"}}, r"overlap.lists names 1 column\(s\): give two"),
        ({"overlap": {"lists": ["a", "text"], "into": "x"}}, "give two lists of one type"),
        ({"overlap": {"lists": ["a", "a"], "into": "text"}}, "'text' is taken"),
        ({"overlap": {"lists": ["a", "a"]}}, "overlap.into is missing"),
        ({"ngrams": {"text": "a", "into": "x"}}, "ngrams.text: 'a' is .*, not a text"),
        ({"ngrams": {"text": "txt", "into": "x"}}, "did you mean 'text'"),
        ({"ngrams": {"text": "text", "into": "x", "longest": 0}}, "longest is 0"),
        ({"lookup": {"map": "a", "key": "text", "into": "x"}}, "lookup.map: 'a' is .*, not a map"),
    ],
)
def test_columns_that_such_steps_cannot_use_are_named(engine, tmp_path, step, message):
    table = raw_tables.make(engine, tmp_path, a=[[1]], text=["b"])
    with pytest.raises(ValueError, match=message):
        apply(engine, table, step)
