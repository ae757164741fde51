"""A checkpoint from a stranger: nothing in it is executed, nothing outside it read or deleted (failure modes S1-S3, S8)."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from tests.helpers.forging import by_command, findings
from tests.helpers.made_checkpoints import FILE, commit, file_of, rewrite, table, values, whole
from trainer.checkpoint import Reader, clean, committed, format, newest, prune, read_text, tensor_file, verify
from trainer.checkpoint import __main__ as command
from trainer.checkpoint.format import Part
from trainer.checkpoint.tensor_file import TensorFile
from trainer.runtime import checked_json


class Exploit:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def saved(tmp_path):
    return commit(tmp_path / "step-5", [whole("tables/a/weight", table())], texts={"data.json": "{}"})


def manifest_of(path):
    return json.loads((path / "MANIFEST.json").read_text())


def everything(path):
    """Whatever one does with a checkpoint; returns what was said."""
    said = []
    for work in (verify, newest_of_folder, all_tensors, lambda it: command.main(["inspect", str(it)])):
        try:
            said.append(str(work(path)))
        except ValueError as error:
            said.append(str(error))
    return " ".join(said)


def newest_of_folder(path):
    return newest(path.parent)


def all_tensors(path):
    reader = Reader(path)
    return [reader.load([whole(name, torch.zeros(reader.shape(name)))]) for name in reader.names]


@pytest.mark.parametrize("name", [".metadata", "model.pkl", "optimizer.pt", FILE, "state.json", "index.json"])
@pytest.mark.parametrize("zipped", [False, True])
def test_no_pickle_is_opened(tmp_path, saved, name, zipped):
    """S1, S2: planted beside the files or in their place, with a manifest that agrees."""
    marker, planted = tmp_path / "executed", tmp_path / "exploit"
    if zipped:
        torch.save(Exploit(marker), planted)
    else:
        planted.write_bytes(pickle.dumps(Exploit(marker)))
    rewrite(saved, name, planted.read_bytes())
    everything(saved)
    assert not marker.exists()
    if zipped:
        torch.load(planted, weights_only=False)
    else:
        pickle.loads(planted.read_bytes())
    assert marker.exists(), "the exploit is no exploit"


def test_nothing_that_could_execute_is_called():
    source = [path.read_text() for path in Path(command.__file__).parent.glob("*.py")]
    for word in ("torch.load", "pickle", "eval(", "exec(", "yaml.load", "unsafe"):
        assert not [text for text in source if word in text.replace("unpickled", "")], word


OUTSIDE = ["../secret", "/etc/hostname", "a/b", "..", ".", "", "a\\b", "x\0y", "./state.json"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_in_the_manifest_are_plain(tmp_path, saved, name):
    """S3."""
    (tmp_path / "secret").write_text("secret")
    manifest = manifest_of(saved)
    (saved / "MANIFEST.json").write_text(json.dumps({**manifest, name: manifest["data.json"]}))
    assert "not a plain file name" in verify(saved)
    with pytest.raises(ValueError, match="not a plain file name"):
        read_text(saved, name)
    assert "secret" not in everything(saved).replace("../secret", "")


@pytest.mark.parametrize("name", [*OUTSIDE, "MANIFEST.json", "unlisted.safetensors", 7, None])
def test_files_in_the_index_are_those_of_the_manifest(tmp_path, saved, name):
    """S3, with a manifest that agrees with the forged index."""
    (tmp_path / "secret").write_bytes((saved / FILE).read_bytes())
    index = json.loads((saved / "index.json").read_text())
    index["tensors"]["tables/a/weight"]["pieces"][0]["file"] = name
    rewrite(saved, "index.json", index)
    assert "which is no file of MANIFEST.json" in verify(saved)
    with pytest.raises(ValueError, match="which is no file of MANIFEST.json"):
        Reader(saved)


@pytest.mark.parametrize("name", [FILE, "state.json", "index.json", "data.json", "MANIFEST.json"])
def test_links_are_not_followed(tmp_path, saved, name):
    """S3: the link leads to the very bytes that the manifest expects."""
    (saved / name).rename(tmp_path / "elsewhere")
    (saved / name).symlink_to(tmp_path / "elsewhere")
    assert ("symbolic links" if name == "MANIFEST.json" else f"{name} is a link") in verify(saved)
    if name == FILE:
        with pytest.raises(ValueError, match=f"step-5: {FILE} .*symbolic links"):
            Reader(saved).read("tables/a/weight")
    else:
        with pytest.raises(ValueError, match="cannot be read"):
            read_text(saved, name if name != "MANIFEST.json" else "data.json")


def test_a_link_to_a_checkpoint_and_devices_are_none(tmp_path, saved):
    link = tmp_path / "step-6"
    link.symlink_to(saved)
    assert "is a link" in verify(link) and committed(tmp_path) == [saved]
    (saved / "data.json").unlink()
    os.mkfifo(saved / "data.json")
    assert "data.json is a link or no file" in verify(saved)
    with pytest.raises(ValueError, match="data.json is not a plain file"):
        read_text(saved, "data.json")


def test_planted_links_and_foreign_folders_survive(tmp_path):
    """S8."""
    folder, precious = tmp_path / "checkpoints", tmp_path / "precious"
    (precious / "deep").mkdir(parents=True)
    for step in (5, 6, 7):
        commit(folder / f"step-{step}", [])
    links = ("step-1", "step-99", ".tmp-step-3-0123abcd", ".trash-step-3-0123abcd")
    foreign = ("step-4-mine", "STEP-3", ".tmp-step-3", ".tmp-step-3-0123abcdef", ".trash-step-x-0123abcd", "data")
    for name in links:
        (folder / name).symlink_to(precious, target_is_directory=True)
    for name in foreign:
        (folder / name).mkdir()
    (folder / "step-7" / "inside").symlink_to(precious, target_is_directory=True)
    (folder / "step-5" / "inside").symlink_to(precious, target_is_directory=True)
    (folder / "best.json").symlink_to(precious / "best.json")
    (precious / "best.json").write_text('{"step": 5, "metric": "m", "value": 1}')
    clean(folder)
    assert prune(folder, 1) == ["step-6", "step-5"]
    assert {it.name for it in folder.iterdir()} == {*links, *foreign, "step-7", "best.json"}
    assert (precious / "deep").exists() and (precious / "best.json").exists()


# Files of tensors that lie about themselves.


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES = {
    "nothing": b"",
    "short": b"\1\0\0",
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}      ",
    "negative header": b"\xff" * 8 + b"{}      ",
    "no header": (0).to_bytes(8, "little"),
    "header past the end": (64).to_bytes(8, "little") + b"{}      ",
    "no json": file_of(b"{'a'}"),
    "no text": file_of(b"\xff\xfe{}"),
    "deep": file_of(b'{"a":' * 100_000),
    "a list": file_of([]),
    "repeated": file_of(b'{"a":{},"a":{}}'),
    "overlap": file_of({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "gap": file_of({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, bytes(20)),
    "not from the start": file_of({"a": entry(4, 12, [2])}, bytes(12)),
    "past the end": file_of({"a": entry(0, 16, [4])}, bytes(8)),
    "rest": file_of({"a": entry(0, 8, [2])}, bytes(12)),
    "backwards": file_of({"a": entry(8, 0, [2])}, bytes(8)),
    "negative offset": file_of({"a": entry(-8, 0, [2])}, bytes(8)),
    "negative shape": file_of({"a": entry(0, 8, [-1, -2])}, bytes(8)),
    "other shape": file_of({"a": entry(0, 8, [3])}, bytes(8)),
    "overflow": file_of({"a": entry(0, 8, [1 << 40, 1 << 40])}, bytes(8)),
    "nothing of much": file_of({"a": entry(0, 0, [0, 1 << 62, 8])}),
    "shape of words": file_of({"a": entry(0, 8, "22")}, bytes(8)),
    "shape of floats": file_of({"a": entry(0, 8, [2.0])}, bytes(8)),
    "shape of truth": file_of({"a": entry(0, 4, [True])}, bytes(4)),
    "dtype": file_of({"a": entry(0, 8, [2], "OBJECT")}, bytes(8)),
    "dtype of lists": file_of({"a": entry(0, 8, [2], ["F32"])}, bytes(8)),
    "three offsets": file_of({"a": {**entry(0, 8, [2]), "data_offsets": [0, 4, 8]}}, bytes(8)),
    "further keys": file_of({"a": {**entry(0, 8, [2]), "code": "print()"}}, bytes(8)),
    "unaligned": file_of({"a": entry(0, 1, [1], "U8"), "b": entry(1, 5, [1])}, bytes(5)),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused(tmp_path, saved, name):
    (tmp_path / "lie").write_bytes(LIES[name])
    with pytest.raises(ValueError):
        TensorFile(tmp_path / "lie")
    rewrite(saved, FILE, LIES[name])
    assert f"{FILE} " in verify(saved)
    with pytest.raises(ValueError, match=f"step-5: {FILE}"):
        Reader(saved).read("tables/a/weight")


def test_a_header_may_not_take_all_memory(saved, monkeypatch):
    monkeypatch.setattr(tensor_file, "LONGEST_HEADER", 8)
    with pytest.raises(ValueError, match="a header of .* bytes in a file of"):
        TensorFile(saved / FILE)


def forged(index, **changes):
    index["tensors"]["tables/a/weight"] |= changes
    return index


PIECE = {"file": FILE, "key": "tables/a/weight@0,0", "offset": [0, 0], "shape": [6, 4]}
FORGED = {
    "no object": lambda index: [],
    "version": lambda index: {**index, "version": 2},
    "no tensors": lambda index: {"version": 1, "tensors": []},
    "entry of words": lambda index: {"version": 1, "tensors": {"a": "b"}},
    "dtype": lambda index: forged(index, dtype="object"),
    "dtype of lists": lambda index: forged(index, dtype=["float32"]),
    "negative shape": lambda index: forged(index, shape=[-6, -4]),
    "overflow": lambda index: forged(index, shape=[1 << 40, 1 << 40]),
    "nothing of much": lambda index: forged(index, shape=[0, 1 << 62], pieces=[]),
    "gap": lambda index: forged(index, shape=[7, 4]),
    "duplicate": lambda index: forged(index, pieces=[PIECE, PIECE]),
    "pieces of words": lambda index: forged(index, pieces="abc"),
    "piece of words": lambda index: forged(index, pieces=["abc"]),
    "negative offset": lambda index: forged(index, pieces=[{**PIECE, "offset": [-6, 0]}]),
    "outside": lambda index: forged(index, pieces=[{**PIECE, "offset": [1, 0]}]),
    "further keys": lambda index: forged(index, pieces=[{**PIECE, "url": "http://localhost"}]),
    "key": lambda index: forged(index, pieces=[{**PIECE, "key": ["a"]}]),
    "other key": lambda index: forged(index, pieces=[{**PIECE, "key": "b@0,0"}]),
    "other dtype": lambda index: forged(index, dtype="int32"),
    "other shape": lambda index: forged(index, shape=[4, 6], pieces=[{**PIECE, "shape": [4, 6]}]),
    "widths": lambda index: forged(index, widths=[2, 2]),
    "no widths": lambda index: forged(index, widths=[1, 1, 1, 0]),
    "twice": lambda index: {"version": 1, "tensors": {**index["tensors"], "b": index["tensors"]["tables/a/weight"]}},
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_index_is_refused(saved, name):
    index = json.loads((saved / "index.json").read_text())
    assert index["tensors"]["tables/a/weight"]["pieces"] == [PIECE]
    rewrite(saved, "index.json", FORGED[name](index))
    assert "not a whole checkpoint (" in (problem := verify(saved)) and str(saved) not in problem
    with pytest.raises(ValueError, match="step-5: "):
        Reader(saved).read("tables/a/weight")


def test_what_is_wrong_with_a_file_of_facts_is_told_once_with_one_remedy(saved):
    rewrite(saved, "state.json", [])
    problem = verify(saved)
    assert problem.startswith("not a whole checkpoint (state.json cannot be read (") and problem.endswith(
        "or replaced)"
    )
    with pytest.raises(ValueError) as raised:
        newest(saved.parent, on_corrupt="error")
    assert str(raised.value).count("checkpoint /") == str(raised.value).count("restore it") == 1


def test_what_is_read_is_a_copy_that_cannot_change_the_file(saved):
    before = (saved / FILE).read_bytes()
    Reader(saved).read("tables/a/weight").fill_(7)
    values(saved, "tables/a/weight")[:] = 7
    assert (saved / FILE).read_bytes() == before and verify(saved) is None


def test_what_stands_in_a_checkpoint_cannot_move_about_the_terminal(tmp_path, capsys):
    name = "tables/[red]\x1b[2J\r/weight"
    path = commit(tmp_path / "step-1", [whole(name, table())], facts={"versions": {"\x1b]0;x": "[link=http://x]y"}})
    assert command.main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert r"[red]\x1b[2J\r" in shown and "[link=http://x]y" in shown and "\x1b" not in shown and "\r" not in shown


# Whoever forges a checkpoint recomputes the digests, too.


def test_forged_checkpoints_end_in_an_answer_or_one_line(tmp_path, capsys):
    """Some of the mutations of which ``tests.helpers.forging`` tries thousands."""
    pieces = [whole("tables/a/weight", table()), whole("tables/a/sum", table(6, 2), widths=(3, 1))]
    pieces += [whole("dense/b", torch.ones(3)), whole("dense/c", torch.tensor(2.0))]
    facts = {
        "progress": {"step": 5, "epoch": 0},
        "plan": [{"table": "a", "optimizer": "adagrad", "sharding": "row_wise"}],
    }
    texts = {"data.json": json.dumps({"files": [["a.parquet", 10, [5, 5]]]}), "config.yaml": "a: 1\n"}
    path = commit(tmp_path / "step-7", pieces[:2], pieces[2:], facts=facts, texts=texts)

    def use(forged):
        by_command(forged)
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("error: ") and len(line) < 2100 and line.isprintable() for line in lines), lines

    assert findings(path, tmp_path / "forged", range(40), use, seconds=60.0) == []


def test_a_cover_of_many_pieces_is_checked_in_linear_time():
    """20,000 strips that all overlap one another in their rows: compared in pairs they took minutes."""
    count = 20_000
    parts = [Part(FILE, str(column), (0, column), (count, 1)) for column in range(count)]
    assert format._wrong_corner((count, count), parts) is None
    parts[7] = Part(FILE, "7", (0, 8), (count, 1))
    assert format._wrong_corner((count, count), parts) == [0, 7]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": ' + b"9" * 10_000 + b"}", "too large for 64 bits"),
        (b'{"a": 1e999}', "not finite"),
        (b'{"a": NaN}', "not finite"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 500 + b"]" * 500, "nested too deeply"),
        (b"\xff{}", "no UTF-8 text: byte 0"),
        (b"[" + b"0," * 20 + b"0]", "more than 10 items"),
    ],
)
def test_json_of_a_stranger_is_bounded(monkeypatch, text, problem):
    monkeypatch.setattr(checked_json, "MOST_ITEMS", 10 if b"0,0" in text else 10**7)
    with pytest.raises(ValueError, match=problem):
        checked_json.parse_json(text)
