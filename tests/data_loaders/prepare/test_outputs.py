"""An output is whole or not there, and what was there before stays until then."""

import pytest

from data_loaders.prepare.outputs import REPORT, Folder
from data_loaders.prepare.owned import MARKER
from data_loaders.prepare.pipeline import Options, prepare
from data_loaders.prepare.progress import Progress


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
    (tmp_path / "out" / REPORT).write_text("[]")  # as launch.incremental has one
    with pytest.raises(ValueError, match="not a prepared data set"):
        make(tmp_path / "out", "two", overwrite=True)
    (tmp_path / "out" / MARKER).write_text("{}")
    with pytest.raises(ValueError, match="not a prepared data set"):
        make(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("where", ["out", ".out.old"])
def test_what_somebody_put_into_an_output_or_changed_there_is_named_and_stays(tmp_path, where):
    make(tmp_path / "out", "one")
    out = (tmp_path / "out").rename(tmp_path / where)
    for name, text in (("notes.txt", "mine"), (REPORT, "one, edited"), ("models/day-0/weights", "a model")):
        before = (out / name).read_text() if (out / name).exists() else None
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
        with pytest.raises(ValueError, match=f"did not write, or that have changed since .*{name.split('/')[0]}"):
            make(tmp_path / "out", "two", overwrite=True)
        assert (out / name).read_text() == text
        (out / name).unlink() if before is None else (out / name).write_text(before)
    (out / "models" / "day-0").rmdir()
    (out / "models").rmdir()
    make(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / REPORT).read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_comes_to_an_output_while_the_next_is_made_stays(tmp_path):
    make(tmp_path / "out", "one")
    with pytest.raises(ValueError, match=r"notes\.txt"), Folder(tmp_path / "out", True) as folder:
        folder.resume("f")
        (tmp_path / "out" / "notes.txt").write_text("mine")
        folder.commit()
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine" and (tmp_path / "out" / REPORT).read_text() == "one"


def test_links_and_work_folders_of_others_are_refused(tmp_path):
    make(tmp_path / "there", "one")
    (tmp_path / "out").symlink_to("there")
    with pytest.raises(ValueError, match="is a link"):
        make(tmp_path / "out", "two", overwrite=True)
    (tmp_path / "out").unlink()
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "mine").touch()
    with pytest.raises(ValueError, match=r"\.out\.unfinished is in the way"):
        make(tmp_path / "out", "two")
    assert (tmp_path / "there" / REPORT).read_text() == "one"


def test_what_a_kill_leaves_in_folders_of_ours_is_in_nobodys_way(tmp_path):
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / ".fingerprint.4711.part").touch()
    (tmp_path / ".out.old").mkdir()
    make(tmp_path / "out", "one")
    (tmp_path / ".out.old").mkdir()
    make(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / REPORT).read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("output", "source"),
    [("raw", "raw"), ("raw/out", "raw"), ("out", "out/raw"), ("./raw/../raw", "raw"), ("link", "raw")],
)
@pytest.mark.parametrize("key", ["input", "extend"])
def test_an_output_lies_apart_from_what_it_is_made_from(tmp_path, output, source, key):
    (tmp_path / source).mkdir(parents=True)
    (tmp_path / "link").symlink_to("raw")
    places = {"input": str(tmp_path / "elsewhere"), "extend": None} | {key: tmp_path / source}
    options = Options(str(places["input"]), tmp_path / output, extend=places["extend"], overwrite=True)
    with pytest.raises(ValueError, match=f"and {key}=.* lie in each other"):
        prepare(None, options, Progress(quiet=True))


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
