"""A file of another kind is never written over."""

from pathlib import Path

import pytest

from data_loaders.output_files import check_output, head_of


def check(path):
    check_output("--picture", Path(path), [".png", ".svg"], lambda path: head_of(path).startswith(b"\x89PNG"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("data.parquet", "only .png, .svg can be written"),
        ("none", "only .png, .svg can be written"),
        ("folder.png", "is a folder"),
        ("data.png", "exists and is not what this command writes"),
        ("s3://bucket/a.png", "is an address"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    Path("data.png").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=rf"^--picture {name.replace('//', '/')}.*{says}"):
        check(name)


def test_a_new_file_and_an_earlier_one_are_written(tmp_path):
    (tmp_path / "old.png").write_bytes(b"\x89PNG and more")
    for name in ("old.png", "new.svg", "folder/new.png"):
        check(tmp_path / name)
