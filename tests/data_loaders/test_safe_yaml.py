"""No YAML file hangs its reader, runs code or means two things; each mistake is a line with file, line and remedy."""

import pytest

from data_loaders import safe_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "line 6: aliases such as *e repeat too much"),
        ("a: &a {b: [*a]}", "*a stands within what it names"),
        ("{a: " * 2000 + "1" + "}" * 2000, "nested more than 50 deep"),
        ("[" * 100_000, "nested more than 50 deep"),
        ("- " * 5000 + "x", "nested more than 50 deep"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: the tag !!python/object/apply:os.system names a type"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice"),
        ("b: {c: 1, c: 2}", "the key 'c' is given twice"),
        ("? [a]\n: 1", "a key that is a list"),
        ("a:\n\tb: 1", "line 2: a tab: indent with spaces"),
        ("a: b: c", "line 1: a ':' where none is expected"),
        ("a: [1, 2", "a '[' or '{' that is not closed"),
        ("a: {b: ${c}}", "a '${…}' between them without quotes"),
        ('a: "x', "a quote that is not closed"),
        ("a: *.parquet", "quote a text such as '*.parquet'"),
        ("a:\n  b: 1\n c: 2", "line 3: the indentation does not fit"),
        ("a: 1\nb", "line 2: a key without ': '"),
        ("a: 1\n---\nb: 2", "a second document"),
        ("a: \x07", "a character that no text file holds"),
        ("a: " + "9" * 5000, "a number that is too long"),
    ],
)
def test_what_is_refused(text, expected):
    with pytest.raises(ValueError, match="^f.yaml") as caught:
        safe_yaml.parse(text, "f.yaml")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_scalars_are_as_omegaconf_reads_them():
    text = "a: 1e-3\nb: 2026-11-01\nc: 1_000\nd: yes\ne: 0x1f\nf: .5\ng: &x {h: 1}\ni: {<<: *x, j: ~}\nk: '1'\n"
    found = {"a": 0.001, "b": "2026-11-01", "c": 1000, "d": True, "e": 31, "f": 0.5, "g": {"h": 1}, "k": "1"}
    assert safe_yaml.parse(text, "f") == {**found, "i": {"h": 1, "j": None}}
    assert safe_yaml.parse("on: [no]\nnull: {y: on}", "f") == {"on": [False], "null": {"y": True}}
    assert safe_yaml.parse("time: 10:00:00\nn: 07", "f", strings=True) == {"time": "10:00:00", "n": "07"}


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "f.yaml"
    for content, expected in (("a: ä\n".encode("latin1"), "line 1: this is not UTF-8"), (b"#" * (9 << 20), "8 MiB")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=expected):
            safe_yaml.read(path)
    path.write_bytes("a: ä".encode("utf-8-sig"))
    assert safe_yaml.read(path) == {"a": "ä"}
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\)"):
        safe_yaml.read(tmp_path)
