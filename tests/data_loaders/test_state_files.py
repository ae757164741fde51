"""State files: the old text or the new one, whole, on disk; and what is read back where they are damaged."""

import errno
import json
import os

import pytest

from data_loaders import state_files


@pytest.fixture
def calls(monkeypatch):
    """What reaches the disk, in order: names synced, and renames."""
    found = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        found.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renamed(part, path):
        found.append(("rename", os.path.basename(path)))
        replace(part, path)

    monkeypatch.setattr(state_files.os, "fsync", synced)
    monkeypatch.setattr(state_files.os, "replace", renamed)
    return found


def test_the_text_is_on_disk_before_its_name_and_its_name_before_the_return(tmp_path, calls):
    path = tmp_path / "status.json"
    state_files.write_json(path, {"a": [1.5, float("nan")], "b": float("inf")})
    assert json.loads(path.read_text()) == {"a": [1.5, None], "b": None}
    assert calls == [("sync", f".status.json.{os.getpid()}.part"), ("rename", "status.json"), ("sync", tmp_path.name)]
    assert [each.name for each in tmp_path.iterdir()] == ["status.json"]


def test_what_was_there_stays_where_the_new_text_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_files.os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'") as error:
        state_files.write_text(path, "new")
    assert error.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is not JSON"),
        (bytes(64), "it is not JSON"),
        (b'{"a": 1', "it is not JSON"),
        (b"\xff\xfe{}", "it is not JSON"),
        (b"[" * 200_000, "it is not JSON"),
        (b"[1]", "it holds no map"),
        (b"null", "it holds no map"),
        (None, "Is a directory"),
    ],
)
def test_a_damaged_file_is_passed_over_with_a_line(tmp_path, content, reason, capsys):
    path = tmp_path / "x.json"
    path.mkdir() if content is None else path.write_bytes(content)
    assert state_files.read_json(path, {"of": "old"}) == {"of": "old"}
    assert capsys.readouterr().err == f"warning: {path} cannot be read ({reason}) and is passed over\n"
    assert state_files.read_json(path, {}, quiet=True) == {} and capsys.readouterr().err == ""


def test_a_whole_file_is_read_and_one_that_is_not_there_is_no_damage(tmp_path, capsys):
    state_files.write_json(tmp_path / "x.json", [1, 2])
    assert state_files.read_json(tmp_path / "x.json", []) == [1, 2]
    assert state_files.read_json(tmp_path / "absent.json", {}) == {}
    assert state_files.read_json(tmp_path / "x.json" / "below.json", {}) == {}
    assert capsys.readouterr().err == ""
