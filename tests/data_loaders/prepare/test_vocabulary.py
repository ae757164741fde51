import random
from collections import Counter
from datetime import date, datetime

import ibis
import pyarrow as pa
import pytest

from data_loaders.prepare import vocabulary
from data_loaders.prepare.statistics import Statistics
from tests.data_loaders.prepare.conftest import open_engine
from tests.helpers.declared import schema_of
from tests.helpers.raw_tables import make

ONE = {"x": {"kind": "sparse", "table": "t"}}


def built(engine, folder, values, kind=None, previous=None, evict=None, **options):
    schema = schema_of(ONE, {"t": {"vocabulary": options}})
    train = make(engine, folder, x=pa.array(values, kind))
    return vocabulary.build(engine, "t", schema, train, previous, evict=evict)


def entries(engine, found):
    return [
        (row["value"], row["id"], row["count"], row["unseen"])
        for row in engine.fetch(found.table.order_by("id")).to_pylist()
    ]


def pairs(engine, table):
    return [(row["value"], row["count"]) for row in engine.fetch(table.order_by("value")).to_pylist()]


def words(*counts):
    """("a", 3), ("b", 1) -> a a a b"""
    return [value for value, count in counts for _ in range(count)]


def test_most_frequent_first_and_equals_by_value(engine, tmp_path):
    values = words(("b", 2), ("a", 2), ("z", 5), ("é", 1), ("", 1), ("Z", 1), (None, 4))
    random.Random(0).shuffle(values)
    found = built(engine, tmp_path, values)
    expected = [("z", 5), ("a", 2), ("b", 2), ("", 1), ("Z", 1), ("é", 1)]
    assert entries(engine, found) == [(value, i + 2, count, 0) for i, (value, count) in enumerate(expected)]
    assert pairs(engine, found.rare) == []
    nothing = {"kept": 0, "aged": 0, "rare": 0}
    assert found.report == {"values": 6, "added": 6, **nothing, "rows_counted": 12, "missing": 4}


def test_the_columns_have_the_types_of_the_file(engine, tmp_path):
    schema = built(engine, tmp_path, ["a"]).table.schema()
    assert [(name, str(kind).lstrip("!")) for name, kind in schema.items()] == [
        ("value", "string"),
        ("id", "int32"),
        ("count", "int64"),
        ("unseen", "int32"),
    ]


def test_min_count_leaves_the_others_rare(engine, tmp_path):
    found = built(engine, tmp_path, words(("a", 3), ("b", 2), ("c", 1), ("d", 1)), min_count=2)
    assert entries(engine, found) == [("a", 2, 3, 0), ("b", 3, 2, 0)]
    assert pairs(engine, found.rare) == [("c", 1), ("d", 1)]
    assert found.report["rare"] == 2 and found.report["rows_counted"] == 7


def test_max_size_keeps_the_most_frequent(engine, tmp_path):
    found = built(engine, tmp_path, words(("c", 2), ("a", 3), ("b", 2)), max_size=2, keep_rare=False)
    assert entries(engine, found) == [("a", 2, 3, 0), ("b", 3, 2, 0)]
    assert found.rare is None and found.report["rare"] == 1


@pytest.mark.parametrize(
    "kind, values, expected",
    [
        (pa.int8(), [-3, 5, 5, None], [5, -3]),
        (pa.uint32(), [2**32 - 1, 7, 7], [7, 2**32 - 1]),
        (pa.int64(), [2**53 + 1, 2**53 + 1, 2**53, -(2**63)], [2**53 + 1, -(2**63), 2**53]),
        (pa.uint64(), [2**64 - 1, 2**64 - 1, 7], ["18446744073709551615", "7"]),
        (pa.bool_(), [True, False, False, None], ["false", "true"]),
        (pa.date32(), [date(2020, 1, 2), date(2019, 12, 31), None], ["2019-12-31", "2020-01-02"]),
        (
            pa.timestamp("us"),
            [datetime(2020, 1, 2), datetime(2020, 1, 2, 3, 4, 5, 600000)],
            ["2020-01-02 00:00:00", "2020-01-02 03:04:05.6"],
        ),
        (pa.large_string(), ["b", "b", "a"], ["b", "a"]),
        (pa.list_(pa.int32()), [[1, None, 2], [], None, [2]], [2, 1]),
        (pa.list_(pa.string()), [["b", "a"], ["b"]], ["b", "a"]),
        (pa.string(), [None, None], []),
        (pa.string(), [], []),
    ],
)
def test_every_kind_of_id(engine, tmp_path, kind, values, expected):
    assert [row[0] for row in entries(engine, built(engine, tmp_path, values, kind))] == expected


@pytest.mark.parametrize("kind", [pa.float64(), pa.binary(), pa.list_(pa.float32())])
def test_what_cannot_be_an_id(engine, tmp_path, kind):
    with pytest.raises(ValueError, match=r"features\.x: column 'x' is .*cannot be an id.*select"):
        built(engine, tmp_path, [], kind)


def test_features_that_share_a_table_are_counted_together_sequences_not(engine, tmp_path):
    schema = schema_of(
        {
            "item": {"kind": "sparse", "table": "t"},
            "bag": {"kind": "sparse", "table": "t"},
            "seen": {"kind": "sequence", "table": "t", "max_length": 3},
        }
    )
    table = make(engine, tmp_path, item=["a", "b", None], bag=[["b", "c"], [None], ["b"]], seen=[["d"], None, ["d"]])
    found = vocabulary.build(engine, "t", schema, table)
    assert entries(engine, found) == [("b", 2, 3, 0), ("a", 3, 1, 0), ("c", 4, 1, 0)]
    assert found.report["rows_counted"] == 5 and found.report["missing"] == 2


def test_a_sequence_alone_is_counted(engine, tmp_path):
    schema = schema_of({"seen": {"kind": "sequence", "table": "t", "max_length": 3}})
    table = make(engine, tmp_path, seen=[["d", "a"], None, ["d"]])
    assert entries(engine, vocabulary.build(engine, "t", schema, table)) == [("d", 2, 2, 0), ("a", 3, 1, 0)]


def test_a_history_alone_has_nothing_to_count(engine, tmp_path):
    history = {"events": "log", "by": ["u"], "time": "t", "value": "i"}
    schema = schema_of({"seen": {"kind": "sequence", "table": "t", "max_length": 3, "make": {"history": history}}})
    with pytest.raises(ValueError, match="share table 't' with a sparse feature"):
        vocabulary.build(engine, "t", schema, make(engine, tmp_path, u=[1]))


def test_two_kinds_of_values_in_one_table_are_an_error(engine, tmp_path):
    schema = schema_of({"a": {"kind": "sparse", "table": "t"}, "b": {"kind": "sparse", "table": "t"}})
    with pytest.raises(ValueError, match=r"tables\.t: the values of 'a' are int64, those of 'b' string"):
        vocabulary.build(engine, "t", schema, make(engine, tmp_path, a=[1], b=["1"]))


def test_columns_that_are_never_null_go_with_those_that_may_be():
    table = ibis.table({"a": "int32", "b": "!int64", "c": "!array<!int64>"}, name="t")
    schema = schema_of({name: {"kind": "sparse", "table": "t"} for name in "abc"})
    assert vocabulary.family(table, "t", schema, {}) == ibis.dtype("int64")


def test_crosses_join_values_as_text_and_are_missing_where_a_part_is(engine, tmp_path):
    schema = schema_of(
        {
            "both": {"kind": "sparse", "table": "t", "make": {"cross": ["x", "day", "age"]}},
            "age": {"kind": "sparse", "table": "ages", "make": {"column": "years", "numbers": [{"buckets": [18, 30]}]}},
        }
    )
    columns = {"x": [1, 1, None], "day": ["mo", "mo", "tu"], "years": [20.0, 29.0, 1.0]}
    found = vocabulary.build(engine, "t", schema, make(engine, tmp_path, **columns))
    assert entries(engine, found) == [("1\x1fmo\x1f2", 2, 2, 0)]
    assert found.report["missing"] == 1


def test_crosses_that_cannot_be(engine, tmp_path):
    table = make(engine, tmp_path, a=[1], l=[[1]], f=[0.5])
    for cross, message in [
        (["a", "l"], "'l' is a list"),
        (["a", "f"], "column 'f' is float64, which cannot be an id"),
        (["a", "bb"], "'bb' is not known"),
        (["a", "y"], "it contains itself"),
    ]:
        schema = schema_of(
            {
                "x": {"kind": "sparse", "table": "t", "make": {"cross": cross}},
                "y": {"kind": "sparse", "table": "s", "make": {"cross": ["a", "x"]}},
            }
        )
        with pytest.raises(ValueError, match=message):
            vocabulary.build(engine, "t", schema, table)


def test_numbers_have_a_vocabulary_of_their_discrete_values(engine, tmp_path):
    schema = schema_of(
        {"x": {"kind": "sparse", "table": "t", "make": {"numbers": ["minmax", {"clip": [0, 9]}, "log2"]}}}
    )
    statistics = Statistics({"x": [{"min": 0.0, "max": 1.0}, None, None]})
    table = make(engine, tmp_path, x=[0.2, 1.0, 7.0, None])
    found = vocabulary.build(engine, "t", schema, table, statistics=statistics)
    assert entries(engine, found) == [(1, 2, 2, 0), (0, 3, 1, 0)]


def test_a_missing_column_is_named(engine, tmp_path):
    with pytest.raises(ValueError, match=r"features\.x\.make\.column: 'x' is not known; .*valid: y"):
        vocabulary.build(engine, "t", schema_of(ONE), make(engine, tmp_path, y=[1]))


class Days:
    """A vocabulary extended day by day, each with an engine of its own work folder, as it is in life."""

    def __init__(self, engine, folder):
        self.name, self.folder, self.number, self.previous, self.engine = engine.name, folder, 0, None, None

    def day(self, values, kind=None, **options):
        self.number += 1
        self.engine = open_engine(self.name, self.folder / f"work-{self.number}")
        previous = tuple(self._again(table) for table in self.previous) if self.previous else None
        found = built(self.engine, self.folder, values, kind, previous, **options)
        self.previous = found.table.to_pyarrow(), found.rare.to_pyarrow() if found.rare is not None else None
        return found

    def _again(self, arrow):
        if arrow is None:
            return None
        columns = {name: arrow[name].combine_chunks() for name in arrow.column_names}
        return make(self.engine, self.folder, **columns).select(*columns)


def test_ids_never_move_and_new_values_are_appended(engine, tmp_path):
    days = Days(engine, tmp_path)
    days.day(words(("a", 3), ("b", 2), ("c", 1)))
    found = days.day(words(("z", 4), ("c", 9), ("y", 4), (None, 1)))
    assert entries(days.engine, found) == [
        ("a", 2, 3, 1),
        ("b", 3, 2, 1),
        ("c", 4, 10, 0),
        ("y", 5, 4, 0),
        ("z", 6, 4, 0),
    ]
    counted = {"rows_counted": 17, "missing": 1}
    assert found.report == {"values": 5, "added": 2, "kept": 1, "aged": 2, "rare": 0, **counted}
    found = days.day(["b"])
    assert [row[3] for row in entries(days.engine, found)] == [2, 0, 1, 1, 1]


def test_values_unseen_for_days_are_evicted_and_the_others_move_together(engine, tmp_path):
    days = Days(engine, tmp_path)
    days.day(words(("a", 5), ("b", 4), ("c", 3), ("d", 2)))
    days.day(words(("a", 1), ("c", 1)), evict=2)  # b and d: one day
    found = days.day(words(("d", 1), ("e", 7), ("a", 1)), evict=2, max_size=4)
    assert entries(days.engine, found) == [("a", 2, 7, 0), ("c", 3, 4, 1), ("d", 4, 3, 0), ("e", 5, 7, 0)]
    assert found.report | {"evicted": 1, "kept": 2, "aged": 1, "added": 1, "values": 4} == found.report
    again = days.day(words(("b", 2)), evict=2)  # as if it had never been there
    assert entries(days.engine, again) == [("a", 2, 7, 1), ("d", 3, 3, 1), ("e", 4, 7, 1), ("b", 5, 2, 0)]


def test_rare_values_add_up_over_days(engine, tmp_path):
    days = Days(engine, tmp_path)
    days.day(words(("a", 3), ("b", 2), ("c", 1)), min_count=3)
    found = days.day(words(("b", 1), ("d", 1), ("a", 1)), min_count=3)
    assert entries(days.engine, found) == [("a", 2, 4, 0), ("b", 3, 3, 0)]
    assert pairs(days.engine, found.rare) == [("c", 1), ("d", 1)]
    found = days.day(words(("c", 2)), min_count=3)
    assert entries(days.engine, found) == [("a", 2, 4, 1), ("b", 3, 3, 1), ("c", 4, 3, 0)]


def test_without_the_rare_counts_each_day_counts_alone(engine, tmp_path):
    days = Days(engine, tmp_path)
    days.day(words(("a", 3), ("b", 2)), min_count=3, keep_rare=False)
    found = days.day(words(("b", 2)), min_count=3, keep_rare=False)
    assert [row[0] for row in entries(days.engine, found)] == ["a"]


def test_max_size_limits_the_whole_and_removes_nothing(engine, tmp_path):
    days = Days(engine, tmp_path)
    days.day(words(("a", 3), ("b", 2), ("c", 1)), max_size=3)
    found = days.day(words(("d", 9), ("e", 5)), max_size=4)
    assert [row[0] for row in entries(days.engine, found)] == ["a", "b", "c", "d"]
    assert pairs(days.engine, found.rare) == [("e", 5)]
    found = days.day(words(("f", 9)), max_size=2)
    assert [row[0] for row in entries(days.engine, found)] == ["a", "b", "c", "d"]


def test_a_lower_min_count_takes_in_rare_values_of_before(engine, tmp_path):
    days = Days(engine, tmp_path)
    days.day(words(("a", 3), ("b", 2)), min_count=3)
    found = days.day(["a"], min_count=2)
    assert entries(days.engine, found) == [("a", 2, 4, 0), ("b", 3, 2, 1)]
    assert found.report["added"] == 1 and found.report["aged"] == 0


def test_a_day_without_rows_ages_all(engine, tmp_path):
    days = Days(engine, tmp_path)
    days.day(words(("a", 3), ("b", 2)))
    found = days.day([], pa.string())
    assert entries(days.engine, found) == [("a", 2, 3, 1), ("b", 3, 2, 1)]
    assert found.report["aged"] == 2 and found.report["added"] == 0


def test_an_earlier_vocabulary_of_another_type_or_damaged(engine, tmp_path):
    days = Days(engine, tmp_path)
    days.day(["a"])
    with pytest.raises(ValueError, match=r"raw values are int64, those of the earlier vocabulary string"):
        days.day([1])
    whole = make(engine, tmp_path, value=["a", "b"], id=[2, 4], count=[1, 1], unseen=[0, 0])
    with pytest.raises(ValueError, match="damaged"):
        built(engine, tmp_path, ["a"], previous=(whole, None))


def test_a_random_vocabulary_is_that_of_a_counter(engine, tmp_path):
    draw = random.Random(5)
    values = [f"{int(draw.paretovariate(0.5)) % 300:x}" for _ in range(5000)]
    found = built(engine, tmp_path, values, min_count=4, max_size=60)
    ordered = sorted(((-count, value) for value, count in Counter(values).items() if count >= 4))[:60]
    assert entries(engine, found) == [(value, i + 2, -count, 0) for i, (count, value) in enumerate(ordered)]


def test_ids_fit_what_ibis_calls_int32(engine, tmp_path):
    assert built(engine, tmp_path, ["a"]).table.id.type().copy(nullable=True) == ibis.dtype("int32")
