"""Both engines read the same rows in the same order, and write the same files."""

import gzip
import json

import ibis
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from data_loaders.prepare import parquet_files
from data_loaders.prepare.declaration import Source
from data_loaders.prepare.engine import raw_files
from data_loaders.prepare.engines import make_engine, parse_bytes

COLUMNS = {"id": "int64", "name": "string", "price": "float64"}
ROWS = [(1, "ä", 1.5), (2, None, None), (-3, "", -2.0), (2**60, 'a "b", c', 0.25)]


def rows_of(engine, table):
    halves = {"__source_file", "__source_place"} & set(table.columns)  # DuckDB's, for skipping rows
    return engine.fetch(table.drop(*halves).order_by("__row")).to_pylist()


def expected(number, place, row, **more):
    return dict(zip(COLUMNS, row), __row=(number << 40) + place, __part=0, **more)


def test_parquet_rows_are_numbered_by_file_and_place(engine, tmp_path):
    for number in (2, 0, 1):
        table = pa.table({name: [row[i] for row in ROWS] for i, name in enumerate(COLUMNS)})
        pq.write_table(table.slice(number, 2), tmp_path / f"day {number}.parquet", row_group_size=1)
    source = Source(files=["day *.parquet"], file_column="file")
    found = rows_of(engine, engine.read("log", source, str(tmp_path)))
    assert found == [
        expected(number, place, ROWS[number + place], file=str(tmp_path / f"day {number}.parquet"))
        for number in range(3)
        for place in range(2)
    ]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_csv_keeps_its_order_its_quotes_and_its_missing_values(engine, tmp_path, ending):
    opener = gzip.open if ending else open
    for number in range(2):
        with opener(tmp_path / f"{number}.csv{ending}", "wt", encoding="utf-8") as file:
            file.write(
                'price,ignored,name,id\n1.5,x,ä,1\nNULL,y,NULL,2\n-2.0,,"",-3\n0.25,z,"a ""b"", c",1152921504606846976\n'
            )
    source = Source(files=[f"*.csv{ending}"], format="csv", columns=COLUMNS, null_values=["NULL"])
    found = rows_of(engine, engine.read("log", source, str(tmp_path)))
    for row in found:
        row["name"] = row["name"] or None  # whether a quoted empty text is missing is the format's to say
    wanted = [(i, n or None, p) for i, n, p in ROWS]
    assert found == [expected(number, place, wanted[place]) for number in range(2) for place in range(4)]


def test_csv_without_a_header_takes_long_separators_and_other_encodings(engine, tmp_path):
    (tmp_path / "movies.dat").write_bytes("1::Les Misérables::3.0\n2::Drôle::4.0\n".encode("latin-1"))
    source = Source(
        files=["movies.dat"], format="csv", columns=COLUMNS, separator="::", header=False, quote="", encoding="latin-1"
    )
    found = rows_of(engine, engine.read("movies", source, str(tmp_path)))
    assert found == [expected(0, 0, (1, "Les Misérables", 3.0)), expected(0, 1, (2, "Drôle", 4.0))]


def test_json_lines_take_missing_keys_as_missing_values(engine, tmp_path):
    lines = [{"id": 1, "name": "a", "price": 2.0, "more": {"x": 1}}, {"id": 2}]
    (tmp_path / "reviews.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = rows_of(engine, engine.read("log", Source(files=["*.json"], format="json", columns=COLUMNS), str(tmp_path)))
    assert found == [expected(0, 0, (1, "a", 2.0)), expected(0, 1, (2, None, None))]


def test_a_label_may_be_missing_from_rows_to_score(engine, tmp_path):
    (tmp_path / "a.tsv").write_text("5\tx\n6\ty\n")
    columns = {"label": "int8", "id": "int64", "name": "string"}
    source = Source(files=["a.tsv"], format="csv", columns=columns, separator="\t", header=False)
    found = rows_of(engine, engine.read("log", source, str(tmp_path), frozenset({"label"})))
    assert [(row["label"], row["id"], row["name"]) for row in found] == [(None, 5, "x"), (None, 6, "y")]
    with pytest.raises(ValueError, match="2 column.s. in its first line, and 3 are declared"):
        engine.read("another", source, str(tmp_path))


def test_a_value_of_another_type_is_named(engine, tmp_path):
    (tmp_path / "a.csv").write_text("id,name,price\n1,a,2\nseven,b,3\n")
    source = Source(files=["a.csv"], format="csv", columns=COLUMNS)
    with pytest.raises(ValueError, match="sources.log.*seven"):
        engine.read("log", source, str(tmp_path))


def test_a_missing_column_is_named_with_its_neighbours(engine, tmp_path):
    pq.write_table(pa.table({"id": [1], "nam": ["a"], "price": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="lacks a column: 'name' is not known; did you mean 'nam'"):
        engine.read("log", Source(files=["a.parquet"], columns=COLUMNS), str(tmp_path))


def test_what_was_stored_is_used_again(engine, tmp_path):
    first = engine.store(ibis.memtable({"a": [1, 2]}), "views/x")
    again = engine.store(ibis.memtable({"a": [3]}), "views/x")
    assert sorted(engine.fetch(first)["a"].to_pylist()) == sorted(engine.fetch(again)["a"].to_pylist()) == [1, 2]


def test_output_goes_to_the_folders_of_a_column_and_tables_of_a_chunk_lie_side_by_side(engine, tmp_path):
    rows = 1000
    data = {"k": [(7 * i) % rows for i in range(rows)], "x": list(range(rows)), "y": [-i for i in range(rows)]}
    table = engine.store(ibis.memtable(data | {"which": ["ab"[i % 3 == 0] for i in range(rows)]}), "t")
    chunk = [table]
    if engine.joins_at_once is not None:
        chunk = [table.select("k", "x", "which"), table.order_by("x").select("k", "y")]
    schema = pa.schema([pa.field("y", pa.int32(), False), pa.field("x", pa.int32(), False)])
    assert engine.write([chunk], tmp_path / "out", schema, ["k"], by="which") == rows
    expected = sorted(zip(data["k"], data["x"]))
    for name in "ab":
        written = ds.dataset(sorted(map(str, (tmp_path / "out" / name).glob("*.parquet")))).to_table()
        assert written["x"].to_pylist() == [x for _, x in expected if "ab"[x % 3 == 0] == name]
        assert written["y"].to_pylist() == [-x for x in written["x"].to_pylist()]


def test_output_is_sorted_and_never_null(engine, tmp_path):
    table = engine.store(ibis.memtable({"k": [3, 1, 2], "x": [30, 10, 20], "y": [1, None, 3]}), "t")
    schema = pa.schema([pa.field("x", pa.int32(), False)])
    assert engine.write([[table]], tmp_path / "out", schema, ["k"]) == 3
    files = sorted(map(str, (tmp_path / "out").glob("*.parquet")))
    written = ds.dataset(files).to_table()
    assert written["x"].to_pylist() == [10, 20, 30] and written.schema == schema
    with pytest.raises(ValueError, match="'y' has 1 missing"):
        try:
            engine.write([[table]], tmp_path / "bad", pa.schema([pa.field("y", pa.int32(), False)]), ["k"])
        except Exception as error:
            raise engine.explain(error) or error from error


def test_one_file_is_there_for_no_rows_too(engine, tmp_path):
    table = engine.store(ibis.memtable({"x": [2, 1]}), "t")
    schema = pa.schema([pa.field("x", pa.int64(), False)])
    engine.write_file(table, tmp_path / "v" / "x.parquet", schema, ["x"])
    engine.write_file(table.filter(table.x > 5), tmp_path / "v" / "none.parquet", schema, ["x"])
    assert pq.read_table(tmp_path / "v" / "x.parquet")["x"].to_pylist() == [1, 2]
    assert pq.read_table(tmp_path / "v" / "none.parquet").num_rows == 0


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 10**9), ("1.5GiB", 1610612736), ("800MB", 8 * 10**8), ("7", 7)])
def test_sizes(text, size):
    assert parse_bytes(text) == size


def test_mistakes_in_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="memory_limit=lots"):
        make_engine("duckdb", tmp_path, memory_limit="lots", threads=1, options={})
    with pytest.raises(ValueError, match="did you mean 'duckdb'"):
        make_engine("duckdbb", tmp_path, memory_limit="1GB", threads=1, options={})


def test_a_file_beside_its_packed_self_is_refused(tmp_path):
    for ending in ("", ".gz"):
        (tmp_path / f"train.txt{ending}").write_text("1")
    with pytest.raises(ValueError, match="each row would count twice"):
        raw_files("log", Source(files=["train.txt*"]), str(tmp_path))


def test_a_damaged_parquet_input_is_named_with_its_source(tmp_path):
    """Its footer counts a row more than its row group has."""
    pq.write_table(pa.table({"x": list(range(30))}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    place = content.index(b"\x16\x3c\x19")  # num_rows = 30, then the row groups
    (tmp_path / "a.parquet").write_bytes(content[:place] + b"\x16\x3e\x19" + content[place + 3 :])
    with pytest.raises(ValueError, match=r"sources.log: .*a\.parquet' .*it counts 31 rows, its row groups 30"):
        parquet_files.groups("log", Source(), [str(tmp_path / "a.parquet")], str(tmp_path), frozenset())
