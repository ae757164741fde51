"""Checkpoints in an object store, a real S3 server: the manifest is the commit, reading is by ranges, and a store that does
not answer is no damaged checkpoint."""

import itertools
import json
import re

import numpy as np
import pytest
import torch

from data_loaders import storage
from tests.helpers.flaky import Flaky
from tests.helpers.made_checkpoints import cut, table, whole
from tests.helpers.object_store import BUCKET, serve
from tests.helpers.tensors import bits, of_every_dtype
from trainer.checkpoint import (
    Reader,
    chosen,
    clean,
    committed,
    newest,
    note,
    of_run,
    parse,
    place_of,
    prune,
    read_best,
    read_text,
    store,
    verify,
    write_best,
    write_commit_files,
    write_pieces,
)
from trainer.checkpoint.__main__ import main
from trainer.checkpoint.paths import StorePath, Unreachable
from trainer.run import load, training_files
from trainer.warm_start.start import source_checkpoint

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def s3():
    with serve() as server:
        yield server


@pytest.fixture
def folder(s3):
    """A new prefix."""
    return parse(f"s3://{BUCKET}/runs/{next(NUMBERS)}?{s3[0]}")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.0)


def write(folder, step, *ranks, manifest=True, texts=None):
    """As ranks do; without ``manifest`` as far as they come before the commit."""
    place = place_of(folder)
    attempt = place.attempt(folder, f"step-{step}")
    place.prepare(attempt)
    parts = [
        (attempt.file(rank), write_pieces(attempt.part / attempt.file(rank), pieces).to_dict())
        for rank, pieces in enumerate(ranks)
    ]
    if manifest:
        place.clear(attempt)
        write_commit_files(attempt.part, parts, {"mine": 7}, texts or {})
        place.publish(attempt)
    return attempt


def names(folder):
    return sorted(place_of(folder)._below(folder))


def test_what_is_saved_comes_back_bit_by_bit_whatever_the_cuts(s3, folder, monkeypatch):
    monkeypatch.setattr(store, "BLOCK_BYTES", 64)  # so that small reads share a request, and large ones take several
    monkeypatch.setattr(store, "SLAB_BYTES", 500)
    monkeypatch.setattr(store, "BACKLOG_BYTES", 1000)
    big, tensors = table(300, 7), of_every_dtype()
    pieces = [whole(name, tensor) for name, tensor in tensors.items()]
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.uint8)):
        tensors[f"tables/{seed}/weight"] = (big * 100).to(dtype)
        pieces += cut(np.random.default_rng(seed), tensors[f"tables/{seed}/weight"], f"tables/{seed}/weight")
    path = write(folder, 3, pieces[::2], pieces[1::2], texts={"notes.txt": "ä\n"}).final
    assert verify(path) is None and committed(folder) == [path] and newest(folder) == path
    assert read_text(path, "notes.txt") == "ä\n"
    reader = Reader(path)
    assert set(reader.names) == set(tensors)
    for name, tensor in tensors.items():
        assert bits(reader.read(name)) == bits(tensor), name
    for seed in range(3):
        name = f"tables/{seed}/weight"
        assert torch.equal(reader.read(name, (37, 2), (150, 3)), tensors[name][37:187, 2:5])
    target = torch.zeros(7, 300).T  # not contiguous
    assert (
        reader.load([whole("tables/0/weight", target), *(p for p in pieces if p.name[:8] in ("tables/1", "tables/2"))])
        == []
    )
    assert torch.equal(target, tensors["tables/0/weight"])


def test_a_file_in_a_store_is_the_same_as_on_a_disk(folder, tmp_path):
    pieces = [whole(name, tensor) for name, tensor in of_every_dtype().items()]
    here = write_pieces(tmp_path / "file", pieces)
    there = write_pieces(folder / "file", pieces)
    assert here == there
    assert place_of(folder).read(folder / "file") == (tmp_path / "file").read_bytes()


def test_only_the_rows_that_are_asked_for_are_fetched(folder, monkeypatch):
    monkeypatch.setattr(store, "BLOCK_BYTES", 1 << 10)
    path = write(folder, 1, [whole("tables/a/weight", table(100_000, 4)), whole("dense/b", torch.ones(3))]).final
    fetched = []
    real = store._Object._fetch
    monkeypatch.setattr(
        store._Object, "_fetch", lambda self, begin, end: fetched.append(end - begin) or real(self, begin, end)
    )
    found = Reader(path).read("tables/a/weight", (50_000, 0), (1000, 2))
    assert torch.equal(found, table(100_000, 4)[50_000:51_000, :2])
    assert max(fetched) == 16_000 and sum(fetched) < 24_000  # the rows, and the header in its 4,096 bytes


def test_without_a_manifest_it_does_not_exist_and_the_next_start_takes_it_away(s3, folder, capsys):
    place = place_of(folder)
    first = write(folder, 1, [whole("tables/a/weight", table())])
    torn = write(folder, 2, [whole("tables/a/weight", table())], manifest=False)
    for name in ("step-3/mine.txt", "step-x/rank-00000-01234567.safetensors", "notes/index.json", "README"):
        place.write(folder / name, "a person's")
    late = first.final / "rank-00001-89abcdef.safetensors"  # of another attempt, whose writer was believed dead
    place.write(late, "late")
    place.write(folder / ".probe-01234567", "")
    assert committed(folder) == [first.final] and newest(folder) == first.final and verify(first.final) is None
    assert capsys.readouterr().err == ""
    assert "cannot be read" in _problem(lambda: Reader(torn.final))
    before = set(names(folder))
    clean(folder)
    gone = before - set(names(folder))
    assert gone == {f"step-2/{torn.file(0)}", "step-1/rank-00001-89abcdef.safetensors", ".probe-01234567"}
    assert newest(folder) == first.final and not place.is_checkpoint(torn.final)


def _problem(action):
    with pytest.raises(ValueError) as error:
        action()
    return str(error.value)


def test_attempts_at_the_same_step_do_not_mix(folder):
    first = write(folder, 5, [whole("tables/a/weight", table(seed=1))])
    place = place_of(folder)
    place.write(first.final / "index.json", "{}")  # damaged, passed over: the step comes again
    second = write(folder, 5, [whole("tables/a/weight", table(seed=2))], manifest=False)
    assert first.file(0) != second.file(0) and "index.json has 2 bytes" in verify(first.final)
    place.discard(second)  # it failed: what was there stays as it was
    assert names(first.final) == sorted([first.file(0), "MANIFEST.json", "index.json", "state.json"])
    place.clear(place.attempt(folder, "step-5"))
    assert committed(folder) == [] and names(first.final) == []  # before anything of the new one is beside it
    third = write(folder, 5, [whole("tables/a/weight", table(seed=3))])
    assert verify(third.final) is None and torch.equal(Reader(third.final).read("tables/a/weight"), table(seed=3))
    assert first.file(0) not in names(third.final)
    place.discard(third)  # the writer of the manifest was told of a failure
    assert names(third.final) == []


def test_damage_is_noticed(s3, folder, capsys):
    for step in range(1, 7):
        write(folder, step, [whole("tables/a/weight", table())])
    place = place_of(folder)
    rank = {step: next(name for name in names(folder / f"step-{step}") if name[:4] == "rank") for step in range(1, 7)}
    content = place.read(folder / "step-6" / rank[6])
    bucket, key = str(folder)[5:].split("/", 1)
    for step, damaged in ((6, content[:-1] + b"\1"), (5, content[:-4])):
        with s3[1].open_output_stream(f"{bucket}/{key}/step-{step}/{rank[step]}") as file:
            file.write(damaged)
    s3[1].delete_file(f"{bucket}/{key}/step-4/{rank[4]}")
    place.write(folder / "step-3" / "state.json", "{}")
    place.write(folder / "step-2" / "further.json", "{}")
    assert newest(folder) == folder / "step-1"
    told = capsys.readouterr().err.splitlines()
    for line, problem in zip(
        told, ("differs", "has .* bytes, not", "is missing", "state.json", "further.json is not"), strict=True
    ):
        assert re.search(f"passed over.*{problem}", line), told
    with pytest.raises(ValueError, match=r"step-6: .* differs .*checkpoint.on_corrupt=fallback"):
        newest(folder, "error")


def test_pruning_and_the_best(s3, folder, monkeypatch):
    for step in (1, 2, 3, 4):
        write(folder, step, [whole("tables/a/weight", table())])
    assert read_best(folder) is None
    write_best(folder, {"step": 2, "metric": "valid.auc", "value": 0.8})
    assert read_best(folder) == {"step": 2, "metric": "valid.auc", "value": 0.8}
    seen = []
    real = storage.Storage.delete_folder
    monkeypatch.setattr(
        storage.Storage,
        "delete_folder",
        lambda self, name: seen.append(names(parse(f"{name}?{s3[0]}"))) or real(self, name),
    )
    assert prune(folder, 2) == ["step-1"]
    assert len(seen) == 1 and seen[0] and "MANIFEST.json" not in seen[0]  # it goes first
    assert {name.split("/")[0] for name in names(folder)} == {"step-2", "step-3", "step-4", "best.json"}
    assert prune(folder, 2) == []


# A store that does not answer


@pytest.fixture
def flaky(tmp_path):
    Flaky.failures.clear()
    yield parse(f"flaky://{tmp_path}/deep/run")
    Flaky.failures.clear()


def test_what_fails_for_a_moment_is_tried_again(flaky):
    Flaky.fail("open", 2)
    path = write(flaky, 1, [whole("tables/a/weight", table(1000, 4))], texts={"data.json": "{}"}).final
    for operation in ("open", "read", "ls"):
        Flaky.fail(operation, 3)
        assert newest(flaky) == path
        assert Flaky.calls[operation] > 3
    Flaky.fail("read", 2, after=4)
    assert torch.equal(Reader(path).read("tables/a/weight"), table(1000, 4))


@pytest.mark.parametrize("operation", ["open", "read", "ls"])
def test_a_store_that_does_not_answer_is_no_damage(flaky, operation):
    """Else a run would begin anew, or go on from an older checkpoint, for a network that was down."""
    path = write(flaky, 1, [whole("tables/a/weight", table())]).final
    write_best(flaky, {"step": 1, "metric": "valid.auc", "value": 0.8})
    Flaky.fail(operation, 1000)
    for ask in (newest, clean):
        with pytest.raises(Unreachable, match="storage failed 5 times") as error:
            ask(flaky)
        assert isinstance(error.value, storage.StorageError)  # another start may help
    if operation != "ls":
        for ask in (lambda: verify(path), lambda: Reader(path), lambda: read_best(flaky)):
            with pytest.raises(Unreachable):
                ask()


def test_mistakes_are_one_line(s3, tmp_path):
    for address, told in (
        (f"s3://nobody/x?{s3[0]}", r"checkpoint.root: s3://nobody/x cannot be written \(.*NoSuchBucket|NO_SUCH_BUCKET"),
        ("nope://x/y", "'nope://x' cannot be opened .*use a local path"),
        ("s3://AKIA:hunter2@bucket/x", "credentials"),
    ):
        with pytest.raises(ValueError, match=told) as error:
            path = parse(address)
            place_of(path).probe(path)
        assert "hunter2" not in str(error.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="checkpoint.root: .*/file/run cannot be made"):
        place_of(tmp_path).probe(tmp_path / "file" / "run")


def test_a_probe_leaves_nothing(folder):
    place_of(folder).probe(folder)
    assert names(folder) == []


# Names


def test_where_the_checkpoints_of_a_run_are(tmp_path, s3):
    run = tmp_path / "day" / "run"
    (run / "checkpoints").mkdir(parents=True)
    assert chosen(None, run, dated=True) == run / "checkpoints" == of_run(run)
    there = chosen(f"s3://b/p/?{s3[0]}", run, dated=False)
    assert str(there) == "s3://b/p/run" and there.options == s3[0]
    assert str(chosen("s3://b", run, dated=True)) == "s3://b/day/run"
    assert chosen(f"file://{tmp_path}/x", run, dated=False) == tmp_path / "x" / "run"
    for place in (there, tmp_path / "x" / "run"):
        note(run, place)
        assert of_run(run) == place
    note(run, run / "checkpoints")
    assert of_run(run) == run / "checkpoints" and not list((run / "checkpoints").iterdir())
    assert isinstance(there, StorePath) and of_run(there) == there and there.parent / "run" == there


def test_whoever_goes_on_from_a_run_finds_it_in_the_store(s3, folder, tmp_path):
    """warm_start.path, data.new_since, and evaluate and predict by the run's folder."""
    for step in (3, 4):
        write(folder, step, [whole("tables/a/weight", table())])
    address = f"?{s3[0]}"
    (tmp_path / "checkpoints").mkdir()
    note(tmp_path, folder)
    for find in (training_files.find, source_checkpoint):
        for given in (f"{folder}{address}", f"{folder}/step-4{address}", str(tmp_path)):
            assert find(given) == folder / "step-4"
        assert find(f"{folder}/step-3{address}") == folder / "step-3"
        with pytest.raises(ValueError, match="nor the folder of a run that has saved one"):
            find(f"{folder}/nothing{address}")
    write_best(folder, {"step": 3, "metric": "valid.auc", "value": 0.8})
    for name, step in ((None, 4), ("step-3", 3), ("best", 3)):
        assert load.find_checkpoint(tmp_path, name, prefer_best=False) == folder / f"step-{step}"


def test_the_command_reads_stores(s3, folder, capsys):
    for step, change in ((9, 0.0), (10, 1.0)):
        write(folder, step, [whole("tables/a/weight", table() + change)])
    for address in (f"{folder}?{s3[0]}", f"{folder}/step-10?{s3[0]}"):
        assert main(["inspect", "--json", address]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["path"] == f"{folder}/step-10" and found["facts"] == {"mine": 7}
    assert main(["verify", f"s3://{BUCKET}/runs?{s3[0]}"]) in (0, 1)  # with other tests' damaged ones
    assert f"{folder}/step-10: whole\n{folder}/step-9: whole" in capsys.readouterr().out
    assert main(["diff", f"{folder}/step-9?{s3[0]}", f"{folder}?{s3[0]}"]) == 1
    assert "6 of 6" in capsys.readouterr().out
    for address in (f"{folder}/nowhere?{s3[0]}", f"s3://nobody/x?{s3[0]}", "s3://AKIA:hunter2@b/x"):
        assert main(["inspect", address]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "hunter2" not in err


def test_what_waits_to_be_sent_is_bounded(monkeypatch):
    class Stream:
        waiting, most = 0, 0

        def write(self, data):
            self.waiting += len(data)
            self.most = max(self.most, self.waiting)

        def flush(self):
            self.waiting = 0

    monkeypatch.setattr(store, "BACKLOG_BYTES", 1000)
    stream = Stream()
    bounded = store._Stream(stream)
    for _ in range(100):
        bounded.write(bytes(300))
    assert stream.most == 1200


def test_memory_of_fsspec_is_a_store(capsys):
    folder = parse("memory://here/run")
    path = write(folder, 1, [whole("tables/a/weight", table())]).final
    assert newest(folder) == path and torch.equal(Reader(path).read("tables/a/weight"), table())
    write(folder, 2, [], manifest=False)
    write(folder, 3, [whole("tables/a/weight", table())])
    clean(folder)
    assert prune(folder, 1) == ["step-1"] and [it.name for it in committed(folder)] == ["step-3"]
