"""A file of another kind is never written over."""

from pathlib import Path

import pytest

from data_loaders.output_files import PICTURES, check_output, is_picture


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("data.parquet", "only .png, .pdf, .svg can be written"),
        ("none", "only .png, .pdf, .svg can be written"),
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
        check_output("--picture", Path(name), PICTURES, is_picture)


def test_a_new_file_and_an_earlier_picture_are_written(tmp_path):
    (tmp_path / "old.png").write_bytes(b"\x89PNG and more")
    for name in ("old.png", "new.svg", "folder/new.pdf"):
        check_output("--picture", tmp_path / name, PICTURES, is_picture)
