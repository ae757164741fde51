"""An output is whole or not there, and what was there before stays until then."""

import pytest

from data_loaders.prepare.outputs import REPORT, Folder


def make(path, text, overwrite=False, fingerprint="f"):
    with Folder(path, overwrite) as folder:
        folder.resume(fingerprint)
        (folder.made / REPORT).write_text(text)
        folder.commit()


def test_the_output_appears_at_once_and_nothing_else_stays(tmp_path):
    make(tmp_path / "out", "one")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / REPORT).read_text() == "one"


def test_an_output_is_replaced_only_when_asked_for(tmp_path):
    make(tmp_path / "out", "one")
    with pytest.raises(ValueError, match="exists already.*overwrite=true"):
        make(tmp_path / "out", "two")
    make(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / REPORT).read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="not a prepared data set"):
        make(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_a_failure_leaves_the_old_output_and_intermediate_tables_for_the_next_try(tmp_path):
    make(tmp_path / "out", "one")
    with pytest.raises(OSError), Folder(tmp_path / "out", True) as folder:
        folder.resume("f")
        folder.tables.mkdir()
        (folder.tables / "examples.parquet").touch()
        raise OSError("disk full")
    assert (tmp_path / "out" / REPORT).read_text() == "one"
    with Folder(tmp_path / "out", True) as folder:
        folder.resume("f")
        assert (folder.tables / "examples.parquet").exists() and list(folder.made.iterdir()) == []
    with Folder(tmp_path / "out", True) as folder:
        folder.resume("other files")
        assert not (folder.tables / "examples.parquet").exists()


def test_two_at_once_are_refused(tmp_path):
    with (
        Folder(tmp_path / "out", False),
        pytest.raises(ValueError, match="another process"),
        Folder(tmp_path / "out", False),
    ):
        pass


def test_a_kill_between_the_two_renames_is_mended(tmp_path):
    make(tmp_path / "out", "one")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(ValueError, match="exists already"):
        make(tmp_path / "out", "two")
    assert (tmp_path / "out" / REPORT).read_text() == "one"
