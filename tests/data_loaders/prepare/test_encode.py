import random

import ibis
import pyarrow as pa
import pytest

from data_loaders.prepare.encode import encode, encode_apart, mean_elements, output_field, with_ids
from data_loaders.prepare.statistics import Statistics
from tests.helpers.declared import schema_of
from tests.helpers.raw_tables import column, make, rows

SPARSE = {"kind": "sparse", "table": "t"}


def vocabulary_of(engine, folder, *values, kind=None):
    """Ids from 2 in the order given."""
    made = make(engine, folder, value=pa.array(values, kind), id=pa.array(range(2, len(values) + 2), pa.int32()))
    return made.select("value", "id")


def encoded(engine, folder, schema, columns, known=None, fitted=None, histories=None, keep=()):
    """``known``: table -> its values."""
    vocabularies = {name: vocabulary_of(engine, folder, *values) for name, values in (known or {}).items()}
    return encode(
        make(engine, folder, **columns), schema, Statistics(fitted or {}), vocabularies, histories or {}, keep
    )


def type_of(table, name):
    return str(table[name].type()).replace("!", "")


def test_an_id_is_the_vocabularys_or_unknown_or_missing(engine, tmp_path):
    made = encoded(engine, tmp_path, schema_of({"x": SPARSE}), {"x": ["b", None, "", "c", "a"]}, {"t": ["a", "b", ""]})
    assert column(engine, made, "x") == [3, 0, 4, 1, 2]
    assert type_of(made, "x") == "int32"


@pytest.mark.parametrize("kind", [pa.int8(), pa.int32(), pa.int64(), pa.uint16()])
def test_integers_of_all_widths_find_their_ids(engine, tmp_path, kind):
    columns = {"x": pa.array([7, None, 9, 11], kind)}
    made = encoded(engine, tmp_path, schema_of({"x": SPARSE}), columns, {"t": [9, 7]})
    assert column(engine, made, "x") == [3, 0, 2, 1]


def test_large_integers_keep_their_last_digits(engine, tmp_path):
    values = [2**53, 2**53 + 1, -(2**63), 2**63 - 1]
    made = encoded(engine, tmp_path, schema_of({"x": SPARSE}), {"x": [*values, 2**53 + 2]}, {"t": values})
    assert column(engine, made, "x") == [2, 3, 4, 5, 1]


def test_values_of_another_kind_than_the_vocabularys_are_an_error(engine, tmp_path):
    with pytest.raises(ValueError, match=r"features\.x: its raw values are int64, those of the vocabulary .*string"):
        encoded(engine, tmp_path, schema_of({"x": SPARSE}), {"x": [1]}, {"t": ["1"]})


def test_many_features_are_one_select_with_left_joins(engine, tmp_path):
    names = [f"C{number}" for number in range(26)]
    schema = schema_of({name: {"kind": "sparse", "table": name} for name in names})
    draw = random.Random(0)
    columns = {name: [draw.choice(["a", "b", "c", None]) for _ in range(20)] for name in names}
    made = encoded(engine, tmp_path, schema, columns, {name: ["b", "a"] for name in names})
    ids = {"b": 2, "a": 3, "c": 1, None: 0}
    assert [[row[name] for name in names] for row in rows(engine, made)] == [
        [ids[columns[name][number]] for name in names] for number in range(20)
    ]
    sql = engine.backend.compile(made)
    # The examples, the outermost, and one that renames for each vocabulary.
    assert sql.count("LEFT OUTER JOIN") == 26 and sql.count("SELECT") == 28


def test_features_that_share_a_table_share_ids(engine, tmp_path):
    schema = schema_of({"x": SPARSE, "y": SPARSE, "z": {**SPARSE, "make": {"column": "x"}}})
    made = encoded(engine, tmp_path, schema, {"x": ["a", "b"], "y": ["b", "z"]}, {"t": ["a", "b"]})
    assert [(row["x"], row["y"], row["z"]) for row in rows(engine, made)] == [(2, 3, 2), (3, 1, 3)]


def test_columns_come_in_the_order_key_label_weight_features_kept(engine, tmp_path):
    schema = schema_of({"d": {"kind": "dense"}, "x": SPARSE}, label="y", weight="w")
    columns = {"x": ["a"], "extra": [5], "d": [1.0], "w": [0.5], "y": [1], "more": ["m"]}
    keep = ("more", "x", "extra", "more", "y")
    made = encoded(engine, tmp_path, schema, columns, {"t": ["a"]}, keep=keep)
    assert list(made.columns) == ["__row", "__part", "y", "w", "d", "x", "more", "extra"]
    (row,) = rows(engine, made)
    assert row["more"] == "m" and row["x"] == 2 and row["w"] == 0.5


def test_label_and_weight_may_be_missing_when_scoring(engine, tmp_path):
    made = encoded(engine, tmp_path, schema_of({"x": SPARSE}, weight="w"), {"x": ["a"]}, {"t": ["a"]})
    assert list(made.columns) == ["__row", "__part", "x"]


def test_a_column_to_keep_that_is_missing(engine, tmp_path):
    with pytest.raises(ValueError, match="keep: 'extar' is not known; did you mean 'extra'"):
        encoded(engine, tmp_path, schema_of({"x": SPARSE}), {"x": ["a"], "extra": [1]}, {"t": ["a"]}, keep=("extar",))


def test_dense_features_are_float32_and_filled(engine, tmp_path):
    schema = schema_of({"d": {"kind": "dense", "fill": -1.5}})
    made = encoded(engine, tmp_path, schema, {"d": [0.1, None, float("nan"), 1e300, float("-inf"), -3.0]})
    assert type_of(made, "d") == "float32"
    assert column(engine, made, "d") == [pytest.approx(0.1, rel=1e-7), -1.5, -1.5, -1.5, -1.5, -3.0]
    assert not output_field("d", schema, pa.float32()).nullable


def test_what_the_trainer_has_to_fill_stays_null(engine, tmp_path):
    features = {
        "scaled": {"kind": "dense", "fill": 1, "offset": 5},
        "dropped": {"kind": "dense", "on_null": "drop", "fill": 1},
        "plain": {"kind": "dense"},
    }
    schema = schema_of({name: {**values, "make": {"column": "d"}} for name, values in features.items()})
    made = encoded(engine, tmp_path, schema, {"d": [2.0, None]})
    assert [rows(engine, made)[1][name] for name in features] == [None] * 3
    assert [output_field(name, schema, pa.float32()).nullable for name in features] == [True, True, False]


def test_dense_features_go_through_their_steps(engine, tmp_path):
    schema = schema_of({"d": {"kind": "dense", "fill": 0.25, "make": {"column": "raw", "numbers": ["minmax"]}}})
    made = encoded(engine, tmp_path, schema, {"raw": [0, 5, None, 20]}, fitted={"d": [{"min": 0.0, "max": 10.0}]})
    assert column(engine, made, "d") == [0.0, 0.5, 0.25, 1.0]


def test_buckets_are_ids(engine, tmp_path):
    features = {name: {"kind": "sparse", "table": name, "make": {"column": "d"}} for name in ("given", "learnt")}
    features["given"]["make"]["numbers"] = [{"buckets": [0, 10]}]
    features["learnt"]["make"]["numbers"] = [{"buckets": 3}]
    features["learnt"]["on_null"] = "drop"
    schema = schema_of(features)
    made = encoded(engine, tmp_path, schema, {"d": [-1.0, None, 10.0]}, fitted={"learnt": [{"boundaries": [4.0]}]})
    assert column(engine, made, "given") == [1, 0, 3]
    assert column(engine, made, "learnt") == [1, None, 2]
    assert type_of(made, "given") == type_of(made, "learnt") == "int32"


def test_lists_are_encoded_in_order(engine, tmp_path):
    schema = schema_of({"bag": SPARSE, "line": {"kind": "sequence", "table": "t", "max_length": 9}})
    lists = [["c", "a", "zz", "a"], [], None, [None, "b", None], ["b"]]
    made = encoded(engine, tmp_path, schema, {"bag": lists, "line": lists}, {"t": ["a", "b", "c"]})
    assert column(engine, made, "bag") == [[4, 2, 1, 2], [], [], [3], [3]]
    assert column(engine, made, "line") == [[4, 2, 1, 2], [], [], [0, 3, 0], [3]]
    assert type_of(made, "bag") == "array<int32>"


def test_the_last_ids_of_a_list_are_kept(engine, tmp_path):
    features = {
        "bag": {**SPARSE, "max_length": 2},
        "line": {"kind": "sequence", "table": "t", "max_length": 2},
    }
    lists = [[1, 2, 3], [1, None], [3, None, 2, None], [2], []]
    columns = {name: pa.array(lists, pa.list_(pa.int64())) for name in features}
    made = encoded(engine, tmp_path, schema_of(features), columns, {"t": [1, 2, 3]})
    assert column(engine, made, "bag") == [[3, 4], [2], [4, 3], [3], []]
    assert column(engine, made, "line") == [[3, 4], [2, 0], [3, 0], [3], []]


def test_long_lists_of_several_parts_of_a_row_keep_their_order(engine, tmp_path):
    draw = random.Random(2)
    lists = [[draw.randrange(30) for _ in range(draw.randrange(200))] for _ in range(30)]
    keys = {"__row": pa.array([n // 2 for n in range(30)], pa.int64()), "__part": pa.array([n % 2 for n in range(30)])}
    columns = {"bag": pa.array(lists, pa.list_(pa.int32())), **keys}
    made = encoded(engine, tmp_path, schema_of({"bag": SPARSE}), columns, {"t": list(range(25))})
    assert column(engine, made, "bag") == [[x + 2 if x < 25 else 1 for x in values] for values in lists]


def test_nulls_stay_where_the_trainer_is_to_see_them(engine, tmp_path):
    features = {
        "one": {**SPARSE, "on_null": "error"},
        "bag": {**SPARSE, "on_null": "drop"},
    }
    schema = schema_of(features)
    columns = {"one": ["a", None, "z"], "bag": [["a", None], None, []]}
    made = encoded(engine, tmp_path, schema, columns, {"t": ["a"]})
    assert column(engine, made, "one") == [2, None, 1]
    assert column(engine, made, "bag") == [[2, None], None, []]
    assert output_field("one", schema, pa.int32()).nullable
    assert output_field("bag", schema, pa.list_(pa.int32())).type.value_field.nullable


def test_hashed_and_identity_ids_of_a_sized_table_pass_unchanged(engine, tmp_path):
    features = {
        "hashed": {"kind": "sparse", "table": "h", "ids": "hash"},
        "same": {"kind": "sparse", "table": "s"},
        "bag": {"kind": "sparse", "table": "h", "ids": "hash"},
        "both": {"kind": "sparse", "table": "h", "ids": "hash", "make": {"cross": ["hashed", "same"]}},
    }
    schema = schema_of(features, {"h": {"num_embeddings": 100}, "s": {"num_embeddings": 9}})
    columns = {"hashed": ["a", None], "same": pa.array([3, 4], pa.int16()), "bag": [["x", None], None]}
    made = encoded(engine, tmp_path, schema, columns)
    assert column(engine, made, "hashed") == ["a", None]
    assert column(engine, made, "same") == [3, 4] and type_of(made, "same") == "int16"
    assert column(engine, made, "bag") == [["x", None], None]
    assert column(engine, made, "both") == ["a\x1f3", None]
    assert output_field("hashed", schema, pa.string()) == pa.field("hashed", pa.string())


def test_crosses_are_looked_up_by_their_text(engine, tmp_path):
    features = {
        "x": SPARSE,
        "both": {"kind": "sparse", "table": "b", "make": {"cross": ["x", "flag"]}},
    }
    columns = {"x": ["a", "a", None, "b"], "flag": [True, False, True, None]}
    made = encoded(engine, tmp_path, schema_of(features), columns, {"t": ["a"], "b": ["a\x1ftrue"]})
    assert column(engine, made, "both") == [2, 1, 0, 0]


def test_histories_are_joined_by_row_and_part(engine, tmp_path):
    make_history = {"history": {"events": "log", "by": ["u"], "time": "at", "value": "item"}}
    line = {"kind": "sequence", "table": "t", "max_length": 5, "make": make_history}
    schema = schema_of({"x": SPARSE, "items": line, "kinds": line, "others": line})
    keys = {"__row": [0, 2], "__part": [0, 1]}
    lists = {"items": [[2, 3], [4]], "kinds": [[5, 6], [7]]}
    table = make(engine, tmp_path, **{name: pa.array(v, pa.list_(pa.int32())) for name, v in lists.items()}, **keys)
    other = make(engine, tmp_path, others=pa.array([[8], []], pa.list_(pa.int32())), **keys)
    columns = {"x": ["a", "b", "a", "a"], "__row": [0, 1, 2, 2], "__part": [0, 0, 0, 1]}
    histories = {"items": table, "kinds": table, "others": other}
    made = encoded(engine, tmp_path, schema, columns, {"t": ["a"]}, histories=histories)
    found = [tuple(row[name] for name in ("x", "items", "kinds", "others")) for row in rows(engine, made)]
    assert found == [(2, [2, 3], [5, 6], [8]), (1, [], [], []), (2, [], [], []), (2, [4], [7], [])]
    assert engine.backend.compile(made).count("LEFT OUTER JOIN") == 3  # a table of two features is joined once


def test_the_values_of_events_get_the_ids_of_a_features_table(engine, tmp_path):
    schema = schema_of({"x": SPARSE, "seen": {"kind": "sequence", "table": "t", "max_length": 5}})
    events = make(engine, tmp_path, item=["b", None, "zz"], at=[1, 2, 3])
    made = with_ids(events, "item", "seen", schema, {"t": vocabulary_of(engine, tmp_path, "a", "b")})
    assert list(made.columns) == [*events.columns, "seen"]
    assert column(engine, made, "seen") == [3, 0, 1] and type_of(made, "seen") == "int32"
    with pytest.raises(ValueError, match=r"features\.seen: its raw values are int64"):
        with_ids(events, "at", "seen", schema, {"t": vocabulary_of(engine, tmp_path, "a")})


def test_events_of_a_sized_table_are_their_own_ids_unless_hashed(engine, tmp_path):
    line = {"kind": "sequence", "table": "t", "max_length": 5}
    events = make(engine, tmp_path, item=[4, None])
    schema = schema_of({"seen": line}, {"t": {"num_embeddings": 9}})
    assert column(engine, with_ids(events, "item", "seen", schema, {}), "seen") == [4, 0]
    schema = schema_of({"seen": {**line, "ids": "hash"}}, {"t": {"num_embeddings": 9}})
    with pytest.raises(ValueError, match="leave out num_embeddings of table 't'"):
        with_ids(events, "item", "seen", schema, {})


def test_no_rows_have_the_same_types(engine, tmp_path):
    schema = schema_of({"x": SPARSE, "bag": SPARSE, "d": {"kind": "dense"}})
    columns = {"x": ["a"], "bag": [["a"]], "d": [1.0]}
    vocabularies = {"t": vocabulary_of(engine, tmp_path, "a")}
    examples = make(engine, tmp_path, **columns)
    whole = encode(examples, schema, Statistics(), vocabularies, {})
    none = encode(examples.limit(0), schema, Statistics(), vocabularies, {})
    assert none.schema() == whole.schema() and rows(engine, none) == []


def test_tables_side_by_side_hold_the_same(engine, tmp_path):
    features = {f"s{i}": {**SPARSE, "make": {"column": "x"}} for i in range(5)}
    schema = schema_of({"bag": SPARSE, **features, "d": {"kind": "dense"}})
    columns = {"x": ["a", "b", None, "c"], "bag": [["b"], [], None, ["c", "a"]], "d": [1.0, 2.0, None, 4.0]}
    vocabularies = {"t": vocabulary_of(engine, tmp_path, "a", "b")}
    examples = make(engine, tmp_path, **columns)
    whole = rows(engine, encode(examples, schema, Statistics(), vocabularies, {}, ["x"]))
    apart = encode_apart(examples, schema, Statistics(), vocabularies, {}, ["x"], joins_at_once=2)
    names = [[name for name in table.columns if not name.startswith("__")] for table in apart]
    assert names == [["bag", "d", "x"], ["s0", "s1"], ["s2", "s3"], ["s4"]]
    assert [
        dict(row for part in parts for row in part.items()) for parts in zip(*(rows(engine, t) for t in apart))
    ] == whole


def test_an_empty_vocabulary_makes_all_unknown(engine, tmp_path):
    schema = schema_of({"x": SPARSE})
    empty = {"t": vocabulary_of(engine, tmp_path, kind=pa.string())}
    made = encode(make(engine, tmp_path, x=["a", None]), schema, Statistics(), empty, {})
    assert column(engine, made, "x") == [1, 0]


def test_types_of_the_output():
    schema = schema_of({"d": {"kind": "dense", "fill": 0}, "x": SPARSE, "bag": SPARSE})
    assert output_field("d", schema, pa.float32()) == pa.field("d", pa.float32(), False)
    assert output_field("x", schema, pa.int32()) == pa.field("x", pa.int32(), False)
    ids = pa.list_(pa.field("element", pa.int32(), False))
    assert output_field("bag", schema, pa.list_(pa.int32())) == pa.field("bag", ids, False)


def test_a_missing_raw_column_is_named():
    table = ibis.table({"itme": "string", "__row": "int64", "__part": "int64"}, name="t")
    schema = schema_of({"x": {**SPARSE, "make": {"column": "item"}}})
    with pytest.raises(ValueError, match=r"features\.x\.make\.column: 'item' is not known; did you mean 'itme'"):
        encode(table, schema, Statistics(), {"t": table}, {})


def test_elements_of_lists_are_counted_so_that_chunks_of_rows_stay_small(engine, tmp_path):
    lists = {"x": [["a", "b"], ["a", "b", "c", "a"], None, []], "seen": [["a"], [], ["b", "b"], None]}
    columns = {**lists, "y": ["a", "b", "c", "d"], "raw": [[1, 2, 3]] * 4, "number": [1.0] * 4}
    schema = schema_of(
        {
            "x": SPARSE,
            "again": {**SPARSE, "make": {"column": "seen"}},
            "y": SPARSE,
            "raw": {"kind": "sparse", "table": "own", "ids": "hash"},
            "number": {"kind": "dense"},
        },
        tables={"t": {"vocabulary": {}}, "own": {"num_embeddings": 9}},
    )
    assert mean_elements(engine, make(engine, tmp_path, **columns), schema) == (2 + 4 + 1 + 2) / 4
    assert mean_elements(engine, make(engine, tmp_path, y=["a"]), schema_of({"y": SPARSE})) == 0


def test_empty_strings_of_a_split_are_no_ids_and_text_is_no_bag(engine, tmp_path):
    line = {"kind": "sequence", "table": "t", "max_length": 9}
    lists = [["a", "", "b"], [""], ["", "", "c", ""], None]
    schema = schema_of({"bag": {**SPARSE, "max_length": 2}, "line": line})
    made = encoded(engine, tmp_path, schema, {"bag": lists, "line": lists}, {"t": ["a", "b", "c"]})
    assert column(engine, made, "bag") == [[2, 3], [], [4], []]
    assert column(engine, made, "line") == [[2, 0, 3], [0], [0, 0, 4, 0], []]
    for spec, word in ((line, "sequence"), ({**SPARSE, "max_length": 2}, "bag")):
        with pytest.raises(
            ValueError, match=rf"schema.features.x is a {word} .* column 'x' is text: split it .*string_split"
        ):
            encoded(engine, tmp_path, schema_of({"x": spec}), {"x": ["a,b", "c", None, ""]}, {"t": ["a", "b"]})
