"""What a declared type takes, and what it does not, is the same in every format and on every engine."""

import datetime
import decimal
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_loaders.prepare import values
from data_loaders.prepare.declaration import Source

DAY, NIL = datetime.date(2024, 1, 2), None
INF, NAN = math.inf, math.nan


def at(hour=0, minute=0, micro=0):
    return datetime.datetime(2024, 1, 2, hour, minute, 0, micro)


# text -> what each type makes of it; a type that is left out does not take it.
TEXTS = {
    "7": {"int8": 7, "int64": 7, "float32": 7.0, "float64": 7.0},
    "+7": {"int8": 7, "int64": 7, "float32": 7.0, "float64": 7.0},
    " -12 ": {"int8": -12, "int64": -12, "float32": -12.0, "float64": -12.0},
    "123.0": {"int8": 123, "int64": 123, "float32": 123.0, "float64": 123.0},
    "128": {"int64": 128, "float32": 128.0, "float64": 128.0},
    "1.7": {"float32": 1.7, "float64": 1.7},
    ".5": {"float32": 0.5, "float64": 0.5},
    "1e3": {"int64": 1000, "float32": 1e3, "float64": 1e3},
    "1.5e3": {"int64": 1500, "float32": 1500.0, "float64": 1500.0},
    "1.5e-3": {"float32": 1.5e-3, "float64": 1.5e-3},
    "1e39": {"float64": 1e39},
    "1e400": {},
    "9007199254740993": {"int64": 2**53 + 1, "float32": 2.0**53, "float64": 2.0**53},
    "9007199254740993.0": {"int64": 2**53 + 1, "float32": 2.0**53, "float64": 2.0**53},
    "1e18": {"float32": 1e18, "float64": 1e18},  # more digits than a float tells apart
    "9223372036854775808": {"float32": 2.0**63, "float64": 2.0**63},
    "nan": {"float32": NAN, "float64": NAN},
    "-Infinity": {"float32": -INF, "float64": -INF},
    "True": {"boolean": True},
    "no": {"boolean": False},
    "0": {"int8": 0, "int64": 0, "float32": 0.0, "float64": 0.0, "boolean": False},
    "2024-01-02": {"date": DAY, "timestamp": at()},
    "2024-1-2": {"date": DAY, "timestamp": at()},
    "2024-01-02 10:30": {"timestamp": at(10, 30)},
    "2024-01-02T10:30:00.123456789Z": {"timestamp": at(10, 30, 123456)},
    "2024-01-02 10:30:00+02": {"timestamp": at(8, 30)},
    "2024-01-02 10:30:00-05:45": {"timestamp": at(16, 15)},
    "1700000000": {"int64": 1_700_000_000, "float32": 1_700_000_000.0, "float64": 1_700_000_000.0},
    **dict.fromkeys(["1_000", "0x10", "12L", "1,5", "1.0f", "", "  ", "٣", "x", "2024-13-01", "2024/1/2"], {}),
}
KINDS = ("int8", "int64", "float32", "float64", "boolean", "date", "timestamp")


def same(found, wanted, kind):
    if isinstance(found, float) and isinstance(wanted, float):
        close = 2**-24 if kind == "float32" else 0
        return math.isnan(found) and math.isnan(wanted) or math.isclose(found, wanted, rel_tol=close) or found == wanted
    return found == wanted


def stored(engine, table, name):
    engine.store(table, name)
    path = engine.work / f"{name}.parquet"
    rows = pq.read_table(path if path.exists() else engine.work / name).to_pylist()
    return sorted(rows, key=lambda row: row["__row"])


def test_a_text_is_taken_exactly_or_not_at_all(engine, tmp_path):
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": list(TEXTS), "__row": range(len(TEXTS))}), path)
    table = engine.backend.read_parquet(str(path))
    made = {kind: values.as_declared(table["text"], values.declared_type(kind)) for kind in KINDS}
    for row in stored(engine, table.select("text", "__row", **made), "made"):
        wanted = TEXTS[row["text"]]
        for kind in KINDS:
            assert same(row[kind], wanted.get(kind), kind), (row["text"], kind, row[kind])


@pytest.mark.parametrize("text", TEXTS)
def test_python_and_the_engines_take_the_same_texts(text):
    assert [kind for kind in KINDS if values.holds(text, kind)] == [kind for kind in KINDS if kind in TEXTS[text]]


def parquet(**columns):
    return pa.table(
        {name: value if isinstance(value, pa.Array) else pa.array(value) for name, value in columns.items()}
    )


def read(engine, folder, files, optional=frozenset(), **source):
    for name, table in files.items():
        path = folder / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table) if isinstance(table, str) else pq.write_table(table, path)
    found = stored(
        engine, engine.read("log", Source(files=["**/*.*"], **source), str(folder / "raw"), optional), "read"
    )
    return [{name: value for name, value in row.items() if not name.startswith("__")} for row in found]


def test_parquet_of_unlike_schemas_is_read_by_what_is_declared(engine, tmp_path):
    files = {
        "day=1/a.parquet": parquet(u=[2**53 + 1], v=["a"], t=pa.array([at(10)], pa.timestamp("ns"))),
        "day=02/b.parquet": parquet(
            v=["b", None], u=[3.0, None], t=pa.array([at(10), None], pa.timestamp("ms", "Europe/Berlin"))
        ),
        "day=3/c.parquet": parquet(u=["4", "5.0"], v=pa.array([None, None], pa.null()), t=pa.array([DAY, None])),
        "day=3/d.parquet": parquet(
            U=[9], u=[decimal.Decimal("6.00")], v=["d"], t=pa.array([at(1)], pa.timestamp("us"))
        ),
    }
    columns = {"u": "int64", "v": "string", "t": "timestamp", "day": "int32"}
    assert read(engine, tmp_path, files, columns=columns) == [
        {"u": 3, "v": "b", "t": at(10), "day": 2},
        {"u": None, "v": None, "t": None, "day": 2},
        {"u": 2**53 + 1, "v": "a", "t": at(10), "day": 1},
        {"u": 4, "v": None, "t": at(), "day": 3},
        {"u": 5, "v": None, "t": None, "day": 3},
        {"u": 6, "v": "d", "t": at(1), "day": 3},
    ]
    (tmp_path / "raw" / "day=3" / "e.parquet").parent.mkdir(exist_ok=True)
    pq.write_table(
        parquet(u=[1, 2, 3], v=["x"] * 3, t=[DAY] * 3, day=[3, 3, 4]), tmp_path / "raw" / "day=3" / "e.parquet"
    )
    with pytest.raises(
        ValueError, match=r"e.parquet', row 3: column 'day' holds '4', and the folder's name says day=3"
    ):
        engine.read("again", Source(files=["**/*.parquet"], columns=columns), str(tmp_path / "raw"))


def test_spark_loses_no_row_of_a_file_whose_name_it_spells_in_another_way(engine, tmp_path, monkeypatch):
    if engine.name != "spark":
        pytest.skip("DuckDB numbers its files itself")
    monkeypatch.setattr("data_loaders.prepare.spark_engine._uris", lambda file: [f"other:{file}"])
    for files in ({"day=1/a.parquet": parquet(u=[1])}, {"a.parquet": parquet(u=[1])}):
        columns = dict.fromkeys(("u", "day") if "day=1/a.parquet" in files else ("u",), "int64")
        with pytest.raises(ValueError, match=r"spells a file's name in a way of its own: .*a\.parquet$"):
            read(engine, tmp_path / str(len(columns)), files, columns=columns)


@pytest.mark.parametrize(
    ("folder", "value", "told"),
    [
        ("3", None, "holds 'null', and the folder's name says day=3"),
        ("__HIVE_DEFAULT_PARTITION__", "3", "holds '3', and the folder's name says day=null"),
        ("4", "3\x1f4", "holds '3 4', and the folder's name says day=4"),
        ("__HIVE_DEFAULT_PARTITION__", None, None),
    ],
)
def test_a_folder_and_a_column_that_differ_are_told_where_one_is_null_too(duckdb_engine, tmp_path, folder, value, told):
    files = {f"day={folder}/a.parquet": parquet(u=[1], day=pa.array([value], pa.string()))}
    columns = {"u": "int64", "day": "string"}
    if told is None:
        assert read(duckdb_engine, tmp_path, files, columns=columns) == [{"u": 1, "day": None}]
        return
    with pytest.raises(ValueError, match=rf"a.parquet', row 1: column 'day' {told}: rename"):
        read(duckdb_engine, tmp_path, files, columns=columns)


BAD = {
    "separator of ours": ([parquet(u=["1\x1f2"])], {"u": "int64"}, "column 'u' holds '1 2', which is not int64"),
    "lacks": ([parquet(u=[1], p=[1.0]), parquet(u=[2])], {}, "b.parquet' lacks a column that other files have, 'p'"),
    "lacks what is declared": (
        [parquet(u=[1], p=[1.0]), parquet(u=[2], pp=[1.0])],
        {"u": "int64", "p": "float64"},
        "b.parquet' lacks a column: 'p' is not known; did you mean 'pp'",
    ),
    "drift": (
        [parquet(u=[1]), parquet(u=["2"])],
        {},
        "'u' is int64 in .*a.parquet' and string in .*b.parquet': declare",
    ),
    "fraction": (
        [parquet(u=[1.0, 1.7])],
        {"u": "int64"},
        "a.parquet', row 2: column 'u' holds '1.7', .*columns.u=float64",
    ),
    "rounded": ([parquet(u=[2.0**53 + 2])], {"u": "int64"}, "row 1: column 'u' holds '9007199254740994"),
    "overflow": ([parquet(u=[300])], {"u": "int8"}, "column 'u' holds '300', which is not int8: .*columns.u=int64"),
    "uint64": (
        [parquet(u=pa.array([2**63], pa.uint64()))],
        {"u": "int64"},
        "holds '9223372036854775808'.*columns.u=string",
    ),
    "boolean": ([parquet(u=[True])], {"u": "int8"}, "'u' is boolean, not int8: declare boolean"),
    "time": ([parquet(u=[at()])], {"u": "float64"}, r"'u' is timestamp.*, not float64: declare timestamp.*epoch\(u\)"),
    "number": ([parquet(u=[1])], {"u": "timestamp"}, "'u' is int64, not timestamp.*: declare int64"),
    "bytes": ([parquet(u=[b"x"])], {"u": "string"}, "'u' is binary, which cannot be read as string"),
    "list": ([parquet(u=[[1.0, 2.5]])], {"u": "list<int64>"}, "row 1: column 'u' holds '2.5'.*columns.u=list<float64>"),
    "twins": ([parquet(u=[1], U=[2])], {}, "has the columns 'u' and 'U', which SQL does not distinguish: name those"),
}


def test_of_undeclared_columns_those_that_nobody_needs_may_be_missing_or_twins(duckdb_engine, tmp_path):
    one = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], ["User", "user", "new"])
    other = pa.Table.from_arrays([pa.array([4]), pa.array([5])], ["user", "User"])
    for name, table in {"a": one, "b": other}.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    source = Source(files=["*.parquet"])
    found = duckdb_engine.read("log", source, str(tmp_path), frozenset(), frozenset({"user"}))
    assert [row["user"] for row in stored(duckdb_engine, found, "found")] == [2, 4] and "new" not in found.columns
    with pytest.raises(ValueError, match="b.parquet' lacks a column that other files have, 'new'"):
        duckdb_engine.read("more", source, str(tmp_path), frozenset(), frozenset({"user", "new"}))


@pytest.mark.parametrize("case", BAD)
def test_parquet_that_does_not_hold_what_is_declared_is_an_error_with_its_place(case, duckdb_engine, tmp_path):
    tables, columns, message = BAD[case]
    files = {f"{letter}.parquet": table for letter, table in zip("abc", tables)}
    with pytest.raises(ValueError, match=r"^sources\.log.*" + message):
        read(duckdb_engine, tmp_path, files, columns=columns)


def lines(*objects):
    return "".join(json.dumps(one) + "\n" for one in objects)


def test_a_key_that_no_line_has_is_an_error_and_one_that_some_leave_out_is_not(engine, tmp_path):
    columns = {"item": "int64", "user": "int64"}
    whole = lines({"item": None, "user": 1, "User": 5}, {"user": "2.0"})
    assert read(engine, tmp_path, {"a.json": whole}, format="json", columns=columns) == [
        {"item": None, "user": 1},
        {"item": None, "user": 2},
    ]
    (tmp_path / "raw" / "b.json").write_text(lines({"item_id": 1, "user": 1}))
    source = Source(files=["b.json"], format="json", columns=columns)
    assert stored(engine, engine.read("optional", source, str(tmp_path / "raw"), frozenset({"item"})), "optional")
    with pytest.raises(ValueError, match=r"sources.renamed.columns: .*b.json' lacks a column .*did you mean 'item_id'"):
        engine.read("renamed", source, str(tmp_path / "raw"))


@pytest.mark.parametrize(
    ("kind", "value"), [("int64", 1.7), ("int8", 0.15), ("int8", True), ("int64", 2**64), ("date", 5)]
)
def test_text_formats_refuse_what_parquet_refuses(kind, value, duckdb_engine, tmp_path):
    files = {"csv": f"u\n{value}\n", "json": lines({"u": value})}
    for name, text in files.items():
        with pytest.raises(ValueError, match=rf"a.{name}', line [12]: column 'u' holds .*, which is not {kind}"):
            read(duckdb_engine, tmp_path / name, {f"a.{name}": text}, format=name, columns={"u": kind})
