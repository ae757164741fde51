"""Tensors to files and back, whatever the cuts; what damages a checkpoint, and what does not fit a model, is told."""

import json
import math

import numpy as np
import pytest
import torch

from tests.helpers.made_checkpoints import FILE, commit, cut, file_of, table, values, whole
from tests.helpers.tensors import bits, of_every_dtype
from trainer.checkpoint import (
    Reader,
    build_index,
    format,
    read_facts,
    read_manifest,
    verify,
    write_commit_files,
    write_pieces,
)
from trainer.checkpoint import tensor_file as tensor_files
from trainer.checkpoint.format import convert_widths
from trainer.checkpoint.manifest import hashing
from trainer.checkpoint.piece import Piece
from trainer.checkpoint.tensor_file import TensorFile, slabs


def test_every_dtype_comes_back_bit_by_bit(tmp_path):
    tensors = of_every_dtype()
    path = commit(tmp_path / "step-1", [whole(name, tensor) for name, tensor in tensors.items()])
    reader = Reader(path)
    assert set(reader.names) == set(tensors)
    for name, tensor in tensors.items():
        found = reader.read(name)
        assert (reader.dtype(name), reader.shape(name)) == (tensor.dtype, tuple(tensor.shape))
        assert found.dtype == tensor.dtype and bits(found) == bits(tensor), name
        target = torch.zeros_like(tensor)
        reader.load([whole(other, target if other == name else torch.zeros_like(tensors[other])) for other in tensors])
        assert bits(target) == bits(tensor), name


def test_the_file_has_the_layout_of_safetensors(tmp_path):
    """Read with numpy, from the description of the format alone."""
    tensors = of_every_dtype()
    path = tmp_path / FILE
    written = write_pieces(path, [whole(name, tensor) for name, tensor in tensors.items()])
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert (length % 8, written.bytes) == (0, len(content))
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        entry = header[f"{name}@{','.join('0' * tensor.dim())}"]
        begin, end = (8 + length + place for place in entry["data_offsets"])
        assert begin % tensor.element_size() == 0 and content[begin:end] == bits(tensor), name
        if entry["dtype"] == "F32":
            assert np.frombuffer(content[begin:end], "<f4").tolist() == tensor.flatten().tolist()


def test_the_safetensors_package_reads_what_we_write_and_we_what_it_writes(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {name: tensor for name, tensor in of_every_dtype().items() if tensor.numel()}
    write_pieces(tmp_path / FILE, [whole(name, tensor) for name, tensor in tensors.items()])
    found = safetensors.load_file(tmp_path / FILE)
    assert {key.partition("@")[0]: bits(value) for key, value in found.items()} == {
        name: bits(tensor) for name, tensor in tensors.items()
    }
    safetensors.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    theirs = TensorFile(tmp_path / "theirs.safetensors")
    assert {key: bits(theirs[key]) for key in theirs.tensors} == {name: bits(it) for name, it in tensors.items()}


@pytest.mark.parametrize("make", [lambda t: t.t(), lambda t: t[:, 3:7], lambda t: t[::2], lambda t: t])
def test_slabs_are_the_items_in_order_and_small(monkeypatch, make):
    monkeypatch.setattr(tensor_files, "SLAB_BYTES", 64)
    for tensor in (make(table(40, 23)), table(1, 100).t()[10:], torch.arange(100)[::3]):
        parts = list(slabs(tensor))
        assert torch.equal(torch.cat(parts), tensor.reshape(-1))
        assert all(part.is_contiguous() and part.nbytes <= 64 for part in parts)


def test_a_big_tensor_is_written_without_a_second_copy(tmp_path):
    tensor = torch.zeros(1000, 4)
    assert all(slab.data_ptr() >= tensor.data_ptr() for slab in slabs(tensor))
    assert next(slabs(tensor)).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("seed", range(8))
def test_any_cuts_are_read_in_any_other_cuts(tmp_path, seed):
    """Saved by three ranks in random rectangles, read in random rectangles of another grid."""
    generator = np.random.default_rng(seed)
    rows, dim = generator.integers(1, 40, 2).tolist()
    weight, state = table(rows, dim, seed), table(rows, dim, seed + 100)
    pieces = [*cut(generator, weight, "tables/a/weight"), *cut(generator, state, "tables/a/sum")]
    ranks = np.array_split(generator.permutation(len(pieces)), 3)
    path = commit(tmp_path / "step-1", *([pieces[i] for i in rank] for rank in ranks))
    assert verify(path) is None
    np.testing.assert_array_equal(values(path, "tables/a/weight"), weight.numpy())
    targets = {"weight": torch.full((rows, dim), -1.0), "sum": torch.full((rows, dim), -1.0)}
    wanted = [piece for name, it in targets.items() for piece in cut(generator, it, f"tables/a/{name}")]
    assert Reader(path).load(wanted) == []
    assert torch.equal(targets["weight"], weight) and torch.equal(targets["sum"], state)
    top, left = generator.integers(0, rows), generator.integers(0, dim)
    assert torch.equal(Reader(path).read("tables/a/sum", (top, left)), state[top:, left:])
    assert torch.equal(Reader(path).read("tables/a/sum", (top, 0), (1, dim)), state[top : top + 1])


def test_what_other_ranks_write_and_empty_pieces_are_left_out(tmp_path):
    weight = table()
    mine = [
        Piece("tables/a/weight", (6, 4), (0, 0), weight),
        Piece("tables/b/weight", (5, 4), (0, 0), torch.empty(0, 4), written=False),
        Piece("dense/c", (3,), (0,), torch.ones(3), written=False),
    ]
    path = tmp_path / FILE
    written = write_pieces(path, mine, [weight + 1, torch.empty(0, 4), torch.ones(3)])
    assert list(written.entries) == ["tables/a/weight"] and list(TensorFile(path).tensors) == ["tables/a/weight@0,0"]
    assert torch.equal(TensorFile(path)["tables/a/weight@0,0"], weight + 1)
    with pytest.raises(FileExistsError):
        write_pieces(path, mine)
    assert write_pieces(tmp_path / "rank-00001.safetensors", []).entries == {}


# Row-wise states under cuts of other columns.


def naive(values, saved, wanted):
    """A value for each column, then the mean over the columns of each wanted part."""
    columns = np.repeat(np.asarray(values, dtype=np.float64), saved, axis=1)
    return np.stack([part.mean(axis=1) for part in np.split(columns, np.cumsum(wanted)[:-1], axis=1)], axis=1)


@pytest.mark.parametrize(
    ("saved", "wanted"), [((8,), (4, 4)), ((4, 4), (8,)), ((3, 5), (4, 4)), ((1, 2, 5), (4, 3, 1)), ((2, 6), (2, 6))]
)
def test_parts_of_other_widths_are_means_over_columns(tmp_path, monkeypatch, saved, wanted):
    monkeypatch.setattr(format, "SLAB_BYTES", 8 * len(saved))  # a row at a time
    state = table(7, len(saved)).abs()
    np.testing.assert_allclose(convert_widths(state, saved, wanted).numpy(), naive(state, saved, wanted), rtol=1e-6)
    path = commit(tmp_path / "step-1", [whole("tables/a/sum", state, widths=saved)])
    target = torch.zeros(3, len(wanted) - 1 or 1)
    piece = Piece("tables/a/sum", (7, len(wanted)), (2, len(wanted) - target.shape[1]), target, widths=wanted)
    lines = Reader(path).load([piece, piece])
    expected = naive(state, saved, wanted)[2:5, len(wanted) - target.shape[1] :]
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-6)
    assert lines == ([] if saved == wanted else [f"tables/a/sum: widths {list(saved)} -> {list(wanted)}"])


def test_equal_parts_stay_equal_to_the_bit():
    state = torch.rand(100, 1).expand(100, 3)
    assert torch.equal(convert_widths(state, (3, 5, 7), (4, 11)), state[:, :2])
    assert torch.equal(convert_widths(convert_widths(state[:, :1], (15,), (1, 6, 8)), (1, 6, 8), (15,)), state[:, :1])


# Strictly both ways.


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(tmp_path):
    saved = [whole("tables/a/weight", table()), whole("tables/a/sum", table(), widths=(1,) * 4)]
    path = commit(tmp_path / "step-1", [*saved, whole("dense/w", torch.ones(3)), whole("optimizer/w/m", torch.ones(3))])
    reader = Reader(path)
    target = torch.zeros(6, 4)
    fits = [whole("tables/a/weight", target), whole("tables/a/sum", torch.zeros(6, 4), widths=(1,) * 4)]
    for others, expected in (
        ([whole("dense/v", torch.zeros(3))], "missing dense/v; unknown dense/w"),
        ([whole("dense/w", torch.zeros(4))], r"dense/w had shape \(3,\), has \(4,\)"),
        ([whole("dense/w", torch.zeros(3, dtype=torch.float64))], "dense/w was torch.float32, is torch.float64"),
        ([whole("dense/w", torch.zeros(3)), whole("optimizer/x", torch.zeros(1))], "unknown optimizer/w/m"),
    ):
        with pytest.raises(ValueError, match=f"step-1 does not fit the model: .*{expected}"):
            reader.load([*fits, *others])
    with pytest.raises(ValueError, match="unknown tables/a/sum"):
        reader.load(fits[:1])
    with pytest.raises(ValueError, match=r"sum had widths \(1, 1, 1, 1\), has None"):
        reader.load([fits[0], whole("tables/a/sum", torch.zeros(6, 4))])
    with pytest.raises(ValueError, match=r"sum had shape \(6, 4\), has \(6, 5\)"):
        reader.load([fits[0], whole("tables/a/sum", torch.zeros(6, 2), widths=(2, 3))])
    assert not target.any()
    reader.load(fits)  # tables alone: of the other kinds nothing was asked for
    assert torch.equal(target, table())


def test_a_model_alone_asks_for_all_weights_and_dense_tensors(tmp_path):
    saved = [whole("tables/a/weight", table()), whole("tables/a/sum", table()), whole("dense/w", torch.ones(3))]
    reader = Reader(commit(tmp_path / "step-1", saved))
    target = torch.zeros(3)
    reader.load([whole("tables/a/weight", torch.zeros(6, 4)), whole("dense/w", target)], weights_only=True)
    assert target.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="unknown tables/a/weight"):
        reader.load([whole("dense/w", target)], weights_only=True)
    elsewhere = Piece("tables/a/weight", (6, 4), (0, 0), torch.empty(0, 4))  # on another rank
    reader.load([whole("dense/w", target), elsewhere], weights_only=True)


# What is not saved.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_with_its_place(tmp_path, monkeypatch, value):
    monkeypatch.setattr(tensor_files, "SLAB_BYTES", 64)
    weight = table(40, 6)
    weight[33, 4] = weight[35, 0] = value
    piece = Piece("tables/a/weight", (100, 8), (20, 2), weight)
    with pytest.raises(ValueError, match=rf"tables/a/weight holds {value} at \[53, 6\].*not saved"):
        write_pieces(tmp_path / FILE, [whole("dense/w", torch.ones(2)), piece])
    with pytest.raises(ValueError, match=rf"dense/w holds {value} at \[\]"):
        write_pieces(tmp_path / "other", [whole("dense/w", torch.tensor(value, dtype=torch.bfloat16))])


def test_large_finite_values_are_saved(tmp_path):
    """Their sum is not finite."""
    large = torch.full((3,), 3e38)
    assert values(commit(tmp_path / "step-1", [whole("dense/w", large)]), "dense/w").tolist() == large.tolist()


# What makes no index.


def parts_of(*places, shape=(4, 4), **changes):
    entry = {"shape": list(shape), "dtype": "float32", **changes}
    pieces = [{"key": f"t@{n}", "offset": offset, "shape": size} for n, (offset, size) in enumerate(places)]
    return [(FILE, {"entries": {"t": {**entry, "pieces": pieces}}})]


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        ([([0, 0], [4, 3])], "covers 12 of the 16 values of 't': pieces are missing"),
        ([], "covers 0 of the 16"),
        ([([0, 0], [4, 4]), ([3, 3], [1, 1])], r"overlap at \[3, 3\]"),
        ([([0, 0], [4, 4]), ([0, 0], [4, 4])], r"overlap at \[0, 0\]"),
        ([([0, 0], [2, 4]), ([2, 0], [2, 2]), ([1, 2], [3, 2])], "overlap"),
        ([([1, 0], [4, 4])], "cuts 't'"),
        ([([0], [4, 4])], "cuts 't'"),
        ([([0, 0], [4, 4]), ([0, 0], [0, 4])], "cuts 't'"),
        ([([-1, 0], [5, 4])], "the offset of a piece of 't'"),
    ],
)
def test_pieces_must_cover_a_tensor_exactly_once(places, problem):
    with pytest.raises(ValueError, match=problem):
        build_index(parts_of(*places))


def test_an_index_needs_ranks_that_agree():
    whole_table = ([0, 0], [4, 4])
    assert build_index(parts_of(whole_table))["tensors"]["t"]["pieces"][0]["file"] == FILE
    for changes in ({"shape": (5, 4)}, {"dtype": "float64"}, {"widths": [1, 1, 1, 1]}):
        other = [("rank-00001.safetensors", parts_of(**changes)[0][1])]
        with pytest.raises(ValueError, match="rank-00001.safetensors: t has another shape, dtype or widths"):
            build_index(parts_of(whole_table) + other)


# What damage is found.


@pytest.fixture
def saved(tmp_path):
    pieces = [whole("tables/a/weight", table(100, 8)), whole("dense/w", torch.ones(3))]
    return commit(tmp_path / "step-5", pieces, facts={"progress": {"step": 5}}, texts={"data.json": "{}"})


def edited(path, edit):
    content = bytearray(path.read_bytes())
    path.write_bytes(edit(content))


DAMAGE = {
    "bit flip": (FILE, lambda content: content[:-5] + bytes([content[-5] ^ 4]) + content[-4:], "differs from MANIFEST"),
    "truncated": (FILE, lambda content: content[:-1], f"{FILE} has 7307 bytes, not 7308"),
    "zero-filled": (FILE, lambda content: bytes(len(content)), "differs from MANIFEST"),
    "empty": (FILE, lambda content: b"", "has 0 bytes"),
    "facts": ("state.json", lambda content: b"", "state.json has 0 bytes"),
    "corrupt facts": ("state.json", lambda content: content.replace(b"5", b"6"), "state.json differs"),
    "index": ("index.json", lambda content: b"", "index.json has 0 bytes"),
    "corrupt index": ("index.json", lambda content: content.replace(b"100", b"101"), "index.json differs"),
    "empty manifest": ("MANIFEST.json", lambda content: b"", "not a whole checkpoint"),
    "manifest of no object": ("MANIFEST.json", lambda content: b"[]", "MANIFEST.json is a list of 0, not an object"),
    "manifest of nothing": ("MANIFEST.json", lambda content: b"{}", "lists no index.json or state.json"),
    "deep manifest": ("MANIFEST.json", lambda content: b"[" * 100_000, "nested too deeply"),
    "repeated": ("MANIFEST.json", lambda content: b'{"a": 1, "a": 1}', "a key is repeated"),
    "manifest of words": (
        "MANIFEST.json",
        lambda content: b'{"state.json": "fine"}',
        "state.json is 'fine', not an object",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(saved, name):
    assert verify(saved) is None
    file, edit, problem = DAMAGE[name]
    edited(saved / file, edit)
    assert problem in verify(saved)


def test_damage_without_hashes_and_by_shares(saved):
    edited(saved / FILE, lambda content: content[:-1] + b"!")
    assert verify(saved, hashes=False) is None
    manifest = read_manifest(saved)
    assert not any(hashing(saved, {name: manifest[name] for name in ("state.json", "index.json")}))
    *_, found = hashing(saved, {FILE: manifest[FILE]})
    assert found == f"{FILE} differs from MANIFEST.json: damaged or replaced"
    assert "no.such.file cannot be read" in next(hashing(saved, {"no.such.file": manifest[FILE]}))


def test_clocks_may_be_missing_or_more_than_are_wanted(tmp_path):
    """Of checkpoints from before there were any, and of tables whose clock was turned on or off since."""
    weights, clock = torch.rand(3, 4), torch.tensor([[5], [0], [7]], dtype=torch.int32)
    old = commit(tmp_path / "step-1", [whole("tables/a/weight", weights)])
    new = commit(tmp_path / "step-2", [whole("tables/a/weight", weights), whole("clock/a", clock)])
    kept = torch.full_like(clock, 9)
    Reader(old).load([whole("tables/a/weight", torch.zeros(3, 4)), whole("clock/a", kept)])
    assert kept.eq(9).all()
    Reader(new).load([whole("tables/a/weight", torch.zeros(3, 4)), whole("clock/a", kept)])
    assert torch.equal(kept, clock)
    Reader(new).load([whole("tables/a/weight", torch.zeros(3, 4)), whole("clock/b", torch.zeros_like(clock))])


def test_missing_and_further_files_are_found(saved):
    (saved / "further.txt").write_text("")
    assert "further.txt is not in MANIFEST.json" in verify(saved)
    (saved / "further.txt").unlink()
    (saved / "data.json").unlink()
    assert "data.json is missing" in verify(saved)
    assert "no folder" in verify(saved / FILE) and "no folder" in verify(saved.with_name("step-6"))
    with pytest.raises(ValueError, match=r"step-5 cannot be read.*no folder|step-6 cannot be read"):
        read_facts(saved.with_name("step-6"))


def test_a_reader_finds_files_that_are_not_as_the_index_says(saved):
    (saved / FILE).write_bytes(file_of({}))
    with pytest.raises(ValueError, match=f"{FILE} holds other tensors than index.json says"):
        Reader(saved).read("dense/w")
    target = torch.zeros(3)
    with pytest.raises(ValueError, match="holds other tensors"):
        Reader(saved).load([whole("dense/w", target)])
    (saved / FILE).unlink()
    with pytest.raises(ValueError, match=f"step-5: {FILE} .*No such file"):
        Reader(saved).read("dense/w")


def test_a_rank_s_file_that_is_not_there_is_no_commit(tmp_path):
    written = write_pieces(tmp_path / FILE, [whole("dense/w", torch.ones(3))]).to_dict()
    (tmp_path / FILE).write_bytes(b"")
    with pytest.raises(OSError, match="checkpoints need a folder that all ranks share"):
        write_commit_files(tmp_path, [(FILE, written)], {}, {})
    assert not (tmp_path / "MANIFEST.json").exists()
