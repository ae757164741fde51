"""Text files as they come: compressed and encoded in some way, with rows that are not as declared."""

import bz2
import gzip
import json
import lzma
import os
import re
import zipfile

import pyarrow as pa
import pytest

from data_loaders.prepare import bad_rows, csv_rows, decoding, pipes
from data_loaders.prepare.__main__ import main
from data_loaders.prepare.declaration import Source

COLUMNS = {"user": "int64", "item": "string", "price": "float64"}
HEADER = "user,item,price\n"
TEXT = HEADER + "1,a,1\n2,b,0.5\n"
WANTED = [(1, "a", 1.0), (2, "b", 0.5)]
LONG = HEADER + "1,a,1\n" * 20_000  # more than is looked at before the engine reads
LINE = '{"user": 1, "item": "a", "price": 1.0}\n'


def packed(kind, text=TEXT):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, kind) as stream:
        stream.write(text.encode())
    return sink.getvalue().to_pybytes()


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def read(engine, folder, name="log", files=("*",), columns=COLUMNS, **options):
    source = Source(files=list(files), columns=columns, **{"format": "csv", **options})
    source.check(f"sources.{name}")
    table = engine.read(name, source, str(folder))
    return [tuple(row[key] for key in columns) for row in engine.fetch(table.order_by("__row")).to_pylist()]


def test_files_are_read_by_what_they_hold_and_empty_ones_and_marks_are_left_out(engine, tmp_path):
    contents = [
        *(packed("gzip"), packed("zstd"), packed("bz2"), packed("lz4"), lzma.compress(TEXT.encode())),
        *(gzip.compress(HEADER.encode() + b"1,a,1\n") + gzip.compress(b"2,b,0.5\n"), b"\xef\xbb\xbf" + TEXT.encode()),
        *(TEXT, TEXT.replace("\n", "\r"), TEXT.replace("\n", "\r\n"), TEXT.replace("1\n", "1\r\n"), TEXT[:-1]),
    ]
    parts = {f"part-{number:02}": content for number, content in enumerate(contents)}
    parts |= {"part-20.gz": TEXT, "part-21.zst": packed("gzip"), "part [22].csv": TEXT, "part-23.gz": packed("gzip")}
    empty = {"part-30": "", "part-31": gzip.compress(b""), "part-32": "\n\n", "part-33": b"\xef\xbb\xbf"}
    marks = {"_SUCCESS": "", "_committed_7": "{}", "part-00.crc": "x"}
    write(tmp_path / "in", **parts, **empty, **marks)
    assert read(engine, tmp_path / "in") == WANTED * len(parts)
    found = engine.inputs["log"]
    assert (found.files, found.empty, found.ignored, found.bad_rows) == (len(parts), len(empty), len(marks), 0)
    assert found.notes("log") == [
        "sources.log: 16 file(s) read, 4 empty one(s) and 3 that hold no data (_SUCCESS and the like) left out"
    ]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-be", "utf-32", "gb18030"])
def test_declared_encodings(encoding, tmp_path, duckdb_engine):
    letter = "中" if encoding == "gb18030" else "é"
    content = TEXT.replace(",b,", f",{letter},").encode(encoding)
    write(tmp_path / "in", plain=content, packed=gzip.compress(content))
    wanted = [(1, "a", 1.0), (2, letter, 0.5)] * 2
    assert read(duckdb_engine, tmp_path / "in", encoding=encoding.removesuffix("-be")) == wanted


def test_spark_reads_other_encodings_too(engine, tmp_path):
    write(tmp_path / "in", a=TEXT.replace(",b,", ",é,").encode("utf-16"))
    assert read(engine, tmp_path / "in", encoding="utf-16") == [(1, "a", 1.0), (2, "é", 0.5)]


def zipped():
    with zipfile.ZipFile(sink := pa.BufferOutputStream(), "w") as archive:
        archive.writestr("a.csv", TEXT)
    return sink.getvalue().to_pybytes()


WRONG = {
    "zip": (zipped, {}, "is a zip archive, not text: unpack it"),
    "snappy": (b"\xff\x06\x00\x00sNaPpYx", {}, "is compressed with snappy, not text: compress it anew"),
    "parquet": (b"PAR1", {}, "is Parquet, not text: declare it: sources.log.format=parquet"),
    "page": (b"\n<!DOCTYPE html>", {}, "is a web page"),
    "twice": (bz2.compress(packed("gzip")), {}, "is compressed twice"),
    "cut": (packed("gzip", LONG * 20)[:-9], {}, "is cut off: its gzip data cannot be decompressed to their end"),
    "checksum": (lambda: packed("gzip")[:-8] + bytes(8), {}, "is damaged: its gzip data"),
    "cut zstd": (packed("zstd")[:-3], {}, "is cut off: its zstd data"),
    "utf-16": (TEXT.encode("utf-16"), {}, "is utf-16, and utf-8 is declared: sources.log.encoding=utf-16"),
    "utf-16 without mark": (TEXT.encode("utf-16-be"), {}, "sources.log.encoding=utf-16, or convert the file"),
    "utf-32": (TEXT.encode("utf-32-le"), {}, "sources.log.encoding=utf-32"),
    "no utf-16": (TEXT, {"encoding": "utf-16"}, "is not utf-16, as sources.log.encoding says"),
    "latin-1": (TEXT.encode() + b"3,caf\xe9,1\n", {}, "line 4: byte 0xe9 is not utf-8.*encoding=latin-1 .*'3,café,1'"),
    "late": (
        LONG.encode() + b"3,\x93x\x94,1",
        {},
        "line 20,002: byte 0x93 is not utf-8.*sources.log.encoding=cp1252.*“x”",
    ),
    "cp1252": (
        TEXT.encode() + b"3,\x93x,1\n",
        {"encoding": "latin-1"},
        "line 4: byte 0x93 is a control.*encoding=cp1252",
    ),
    "utf-8": (
        TEXT + "3,é,1\n",
        {"encoding": "latin-1"},
        "is utf-8, and latin-1 is declared.*sources.log.encoding=utf-8",
    ),
    "gb18030": (TEXT.encode() + b"3,\xff\xff,1\n", {"encoding": "gb18030"}, "line 4: byte 0xff is not gb18030"),
    "zeros": (LONG + "3,\0,1\n" + LONG[len(HEADER) :], {}, "line 20,002: holds zero bytes"),
    "zeros at the end": (LONG + "\0" * 100, {}, "ends in zero bytes"),
    "empty": ("", {}, "sources.log.files: each of the 1 file.s. is empty"),
    "empty line": ("\n" + TEXT, {}, "begins with an empty line: remove it"),
    "tab": (TEXT.replace(",", "\t"), {}, r'its separator is "\\t", not ",": sources.log.separator="\\t"'),
    "no header": (TEXT.replace(",", ";"), {"header": False}, r'3 are declared: its separator is ";"'),
    "tab for a row": (TEXT[len(HEADER) :].replace(",", "\t"), {}, r'separator is "\\t"|has one column in its header'),
    "no names": (TEXT[len(HEADER) :], {}, "names none of the declared columns .*sources.log.header=false"),
    "names": (TEXT, {"header": False}, "line 1: the names of the columns: .*sources.log.header=true"),
    "json": (LINE, {}, "holds JSON, not csv: sources.log.format=json"),
    "long": (TEXT + "3," + "c" * 2_100_000 + ",1\n", {}, "line 4: a row of 2,100,004 characters, where 2,000,000"),
    "twin": ("user,item,price,item\n1,a,2,b\n", {}, "column 'item' is there twice .places 2 and 4"),
    "field more": (
        TEXT + "3,c,1,9\n",
        {},
        "line 4: 4 field.s. where 3 are due .'3,c,1,9'.; mend the row.*bad_rows=skip",
    ),
    "field less": (TEXT + "3,c\n", {}, "line 4: 2 field.s. where 3 are due"),
    "open quote": (TEXT + '3,"c,1\n4,d,1\n', {}, 'line 4: a quote .". that opens a field is not closed'),
    "open at the end": (TEXT + '3,c,"1\n', {}, 'line 4: a quote .". that opens a field is not closed'),
    "stray": (TEXT + '3,"c"d,1\n', {}, "line 4: characters follow a closing quote"),
    "backslash": (
        TEXT + '3,"say \\"c\\", d",1\n',
        {},
        r"line 4: .* escaped by a backslash here.*: sources.log.escape='\\'",
    ),
    "type": (
        TEXT + "x,c,1\n",
        {},
        "line 4: column 'user' holds 'x', which is not int64.*columns.user=string.*null_values",
    ),
    "range": (TEXT + "9223372036854775808,c,1\n", {}, "line 4: column 'user' holds '9223372036854775808'"),
}
WRONG_JSON = {
    "broken": (LINE + '{"user": 2,\n' + LINE, {}, "line 2: broken JSON at character 12"),
    "array": (
        f"[{LINE.strip()},\n{LINE.strip()}]\n",
        {},
        "line 1: a value that goes over several lines.*one object a line",
    ),
    "array in a line": (f"[{LINE.strip()}]\n", {}, "line 1: an array where an object"),
    "several lines": ('{\n "user": 1\n}\n', {}, "line 1: a value that goes over several lines"),
    "scalar": (LINE + "5\n", {}, "line 2: a single value where an object"),
    "null": (LINE + "null\n", {}, "line 2: a single value where an object"),
    "two": (LINE + LINE.strip() + LINE, {}, "line 2: more follows the object"),
    "twin": (LINE + '{"user": 1, "user": 2}\n', {}, "line 2: the key 'user' is there twice"),
    "deep": (LINE + '{"user": ' + "[" * 30_000 + "]" * 30_000 + "}\n", {}, "line 2: its values are nested too deeply"),
    "huge": (LINE + '{"user": ' + "9" * 5000 + "}\n", {}, "line 2: column 'user' holds .*, which is not int64"),
    "text": (LINE + '{"user": "x"}\n', {}, "line 2: column 'user' holds \"x\", which is not int64"),
    "half": (LINE + '{"item": "\\ud800"}\n', {}, "line 2: half of a surrogate pair"),
    "bytes": (LINE.encode() + b'{"item": "\xe9"}\n', {}, "line 2: byte 0xe9 is not utf-8"),
    "mark": (LINE.encode("utf-16"), {}, "sources.log.encoding=utf-16"),
}
ENGINES_OWN = "Error|Exception|ignore_errors|strict_mode|null_padding|auto_detect|Candidates|codec|SQLSTATE|delimiter ="


def check_wrong(engine, folder, case, name="log", **more):
    content, options, message = case
    write(folder, a=content() if callable(content) else content)
    with pytest.raises(ValueError, match=message.replace("sources.log", f"sources.{name}")) as caught:
        read(engine, folder, name=name, **options, **more)
    text = str(caught.value)
    assert text.startswith(f"sources.{name}") and str(folder / "a") in text and "\n" not in text
    assert not re.search(ENGINES_OWN, text), text


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_csv_file_is_told_with_file_line_and_key(case, tmp_path, duckdb_engine):
    check_wrong(duckdb_engine, tmp_path / "in", WRONG[case])


@pytest.mark.parametrize("case", WRONG_JSON)
def test_what_is_wrong_with_lines_of_json_is_told_with_file_and_line(case, tmp_path, duckdb_engine):
    check_wrong(duckdb_engine, tmp_path / "in", WRONG_JSON[case], format="json")


def test_spark_tells_the_same(tmp_path, engine):
    if engine.name != "spark":
        pytest.skip("DuckDB's are all tried above")
    for case in ("late", "field more", "open at the end", "stray", "type", "cut"):
        check_wrong(engine, tmp_path / "in", WRONG[case], name=f"csv_{case.replace(' ', '_')}")
    for case in ("two", "null", "half", "twin"):
        check_wrong(engine, tmp_path / "in", WRONG_JSON[case], name=f"json_{case}", format="json")


def test_bad_rows_are_left_out_and_counted(engine, tmp_path):
    rows = [b"3,c", b"4,d,4,4", b"x,e,5", b"6,\xe9,6", b'7,"f"g,7', b"8,h,many"]
    good = b'9,"a ""b"", c",9\n'
    write(tmp_path / "csv", a=TEXT.encode() + b"\n".join(rows) + b"\n" + good, b=TEXT)
    wanted = [*WANTED, (9, 'a "b", c', 9.0), *WANTED]
    assert read(engine, tmp_path / "csv", bad_rows="skip") == wanted
    found = engine.inputs["log"]
    assert found.bad_rows == len(rows)
    assert found.first_bad == f"'{tmp_path / 'csv' / 'a'}', line 4: 2 field(s) where 3 are due ('3,c')"
    lines = [
        b"{",
        b"5",
        b'{"user": "x"}',
        b'{"item": "\xe9"}',
        b'{"user": 1}{"user": 2}',
        b"null",
        b'{"price": 1, "price": 2}',
    ]
    write(tmp_path / "json", a=LINE.encode() + b"\n".join(lines) + b"\n" + LINE.encode())
    assert read(engine, tmp_path / "json", name="lines", format="json", bad_rows="skip") == WANTED[:1] * 2
    assert engine.inputs["lines"].bad_rows == len(lines)
    write(tmp_path / "none", a=HEADER + "1,2\n3\n")
    with pytest.raises(ValueError, match="sources.none: each of its 2 row.s. is bad, the first: .*line 2: 2 field"):
        read(engine, tmp_path / "none", name="none", bad_rows="skip")


def test_an_object_of_nulls_is_a_row_where_lines_of_null_are_left_out(tmp_path, duckdb_engine):
    write(tmp_path / "in", a=LINE + '{"user": null, "item": null}\nnull\n' + LINE)
    assert read(duckdb_engine, tmp_path / "in", format="json", bad_rows="skip") == [
        *WANTED[:1],
        (None,) * 3,
        *WANTED[:1],
    ]
    assert duckdb_engine.inputs["log"].bad_rows == 1


def test_a_value_behind_quoted_line_ends_is_told_with_its_line(tmp_path, duckdb_engine):
    write(tmp_path / "in", a=HEADER + '1,"a\nb\nc,d",1\n' + '2,"e\n3,x",1\nx,f,1\n')
    with pytest.raises(ValueError, match="line 7: column 'user' holds 'x', which is not int64"):
        read(duckdb_engine, tmp_path / "in")


def test_of_a_line_without_end_the_beginning_is_held(monkeypatch):
    monkeypatch.setattr(decoding, "_LONGEST", 8)
    chunks = ["1234éé"[:5].encode() + b"\xc3", b"\xa96", *[b"x" * 100] * 5, b"yy\nshort\n1234567\xc3", b"\xa9zzz"]
    assert list(decoding.lines(iter(chunks))) == ["1234éé".encode(), b"short", b"1234567"]


def test_a_row_that_is_too_long_is_refused_before_it_is_split(tmp_path, duckdb_engine, monkeypatch):
    monkeypatch.setattr(decoding, "_LONGEST", 3_000_000)
    monkeypatch.setitem(bad_rows.LONGEST, "json", 2_500_000)
    write(tmp_path / "in", a=LINE + "[" + LINE.strip() * 500_000 + "]\n" + LINE)
    with pytest.raises(ValueError, match=r"line 2: an object of \d,\d+,\d+ characters, where 2,500,000 can be read"):
        read(duckdb_engine, tmp_path / "in", format="json")


def test_escaped_quotes_as_spark_and_mysql_write_them(engine, tmp_path):
    write(tmp_path / "in", a=HEADER + '1,"say \\"hi\\", you",1\n2,"back\\\\",2\n3,a\\b,3\n')
    wanted = [(1, 'say "hi", you', 1.0), (2, "back\\", 2.0), (3, "a\\b", 3.0)]
    assert read(engine, tmp_path / "in", escape="\\") == wanted


def test_a_tab_may_be_written_as_a_shell_hands_it_over(tmp_path, duckdb_engine):
    write(tmp_path / "in", a=TEXT.replace(",", "\t"))
    assert read(duckdb_engine, tmp_path / "in", separator="\\t") == WANTED


def test_a_bad_row_that_swallows_others_is_no_row_to_leave_out(tmp_path, duckdb_engine):
    write(tmp_path / "in", a=TEXT + '3,"c,1\n4,d,1\n')
    with pytest.raises(ValueError, match="line 4: a quote .* is not closed"):
        read(duckdb_engine, tmp_path / "in", bad_rows="skip")


def test_interrupted_runs_keep_the_count(tmp_path, duckdb_engine):
    write(tmp_path / "in", a=TEXT + "3\n")
    for _ in range(2):  # the second time from what the first stored
        assert read(duckdb_engine, tmp_path / "in", bad_rows="skip") == WANTED
        assert duckdb_engine.inputs["log"].bad_rows == 1


def test_marks_are_read_where_a_pattern_asks_for_them(tmp_path, duckdb_engine):
    write(tmp_path / "in", _hidden=TEXT, _SUCCESS="")
    assert read(duckdb_engine, tmp_path / "in", files=["_h*"]) == WANTED
    with pytest.raises(ValueError, match="finds marks and checksums alone, such as '.*_SUCCESS'"):
        read(duckdb_engine, tmp_path / "in", files=["?SUCCESS"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "utf8"}, "did you mean 'utf-8'"),
        ({"bad_rows": "drop"}, "sources.log.bad_rows"),
        ({"separator": ""}, "sources.log.separator is ''"),
        ({"escape": "ab"}, "sources.log.escape is 'ab': one ASCII character"),
        ({"escape": "\\", "quote": ""}, "only quoted fields have escapes"),
        ({"quote": ","}, "sources.log.quote and .separator"),
    ],
)
def test_declarations_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Source(**{"files": ["*"], "format": "csv", "columns": COLUMNS, **options}).check("sources.log")


@pytest.mark.parametrize(
    ("line", "escape", "fields", "is_open", "stray"),
    [
        ('a,"b,c",d', "", ["a", "b,c", "d"], False, False),
        ('"a ""b"""', "", ['a "b"'], False, False),
        ('a"b,c', "", ['a"b', "c"], False, False),
        ('"",""', "", ["", ""], False, False),
        ('a,"b', "", ["a", "b"], True, False),
        ('"a"b,c', "", ["ab", "c"], False, True),
        (r'"a\"b","c\\"', "\\", ['a"b', "c\\"], False, False),
        (r'"a\"b"', "", ['a\\b"'], False, True),
    ],
)
def test_rows_of_csv(line, escape, fields, is_open, stray):
    assert csv_rows.split(line, ",", '"', escape) == csv_rows.Row(fields, is_open, stray)


def test_a_pipe_ends_whatever_its_reader_does(tmp_path):
    chunks = [b"x" * (1 << 20)] * 8
    with pipes.pipe(iter(chunks), tmp_path) as path, open(path, "rb") as reader:
        assert reader.read() == b"".join(chunks)
    with pipes.pipe(iter(chunks), tmp_path) as path, open(path, "rb") as reader:
        reader.read(5)
    with pipes.pipe(iter(chunks), tmp_path):
        pass  # never opened
    with pytest.raises(ValueError, match="bad"), pipes.pipe(_failing(), tmp_path) as path, open(path, "rb") as reader:
        assert reader.read() == b"a"
    with pytest.raises(KeyError), pipes.pipe(iter(chunks), tmp_path):
        raise KeyError
    assert not os.listdir(tmp_path)


def _failing():
    yield b"a"
    raise ValueError("bad")


def test_the_report_counts_files_and_bad_rows(tmp_path, capfd):
    write(tmp_path / "in", a="user,label\n" + "1,0\n2,1\n" * 5 + "3\n", b="", _SUCCESS="")
    recipe = {
        "sources": {
            "log": {"files": ["*"], "format": "csv", "columns": {"user": "int64", "label": "int8"}, "bad_rows": "skip"}
        },
        "examples": {"start": "log"},
        "schema": {
            "label": "label",
            "tables": {"user": {"vocabulary": {}}},
            "features": {"user": {"kind": "sparse", "table": "user"}},
        },
    }
    (tmp_path / "shop.yaml").write_text(json.dumps(recipe))
    assert main([f"recipe={tmp_path / 'shop.yaml'}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["rows"] == {"train": 10}
    expected = {"files": 1, "empty": 1, "ignored": 1, "bad_rows": 1}
    assert {key: found["sources"]["log"][key] for key in expected} == expected
    assert "note: sources.log: 1 bad row(s) left out, the first: '" in capfd.readouterr().err
    output = tmp_path / "scored"
    assert main([f"prepared={tmp_path / 'out'}", f"input={tmp_path / 'in'}", f"output={output}"]) == 0
    assert json.loads((output / "report.json").read_text())["sources"]["log"]["bad_rows"] == 1
