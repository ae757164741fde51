"""Footers that lie, break or crash the Parquet library end in one line that names the file, and lose no row."""

import os
import random
import signal

import pyarrow.parquet as pq
import pytest

from data_loaders import footers
from data_loaders.manifest import Manifest
from data_loaders.reader import Handle, RowGroups
from tests.helpers.bad_data import loader, log, read, write

ROWS, GROUP = 30, 10


@pytest.fixture
def content(tmp_path):
    return write(tmp_path / "whole" / "part-0.parquet", log()).read_bytes()


def footer_of(content):
    """Where it begins and ends, its length and the magic bytes left out."""
    end = len(content) - 8
    return end - int.from_bytes(content[end : end + 4], "little"), end


def varint(number):
    """Thrift's, of a number from 0 to 63 (zigzag)."""
    return bytes([number << 1])


def rows_read(folder, content):
    """None where the file is refused as it should be."""
    (folder / "a.parquet").write_bytes(content)
    try:
        return read(folder).rows
    except ValueError as error:
        assert "a.parquet" in str(error) and "Error" not in str(error)
        return None


def test_no_mutation_of_a_footer_loses_a_row_or_ends_otherwise(tmp_path, content):
    begin, end = footer_of(content)
    whole, outcomes = rows_read(tmp_path, content), []
    for seed in range(120):
        chance = random.Random(seed)
        mutated = bytearray(content)
        for _ in range(chance.choice([1, 1, 2, 4])):
            mutated[chance.randrange(begin, end)] = chance.choice([0, 255, chance.randrange(256)])
        rows = rows_read(tmp_path, bytes(mutated))
        assert rows is None or rows == whole, seed
        outcomes.append(rows is None)
    assert 20 < sum(outcomes) < 120


def test_every_count_of_rows_that_is_wrong_is_found(tmp_path, content):
    """Each place that holds 10, a row group's rows or a column's values among others, says 9 or 11."""
    begin, end = footer_of(content)
    whole, said = rows_read(tmp_path, content), set()
    for place in (place for place in range(begin, end) if content[place : place + 1] == varint(GROUP)):
        for wrong in (GROUP - 1, GROUP + 1):
            (tmp_path / "a.parquet").write_bytes(content[:place] + varint(wrong) + content[place + 1 :])
            try:
                manifest = Manifest.scan(["a.parquet"], str(tmp_path), [])
            except ValueError as error:
                said.add(str(error).split("(")[1].split(")")[0])
            else:
                assert manifest.num_rows == ROWS
    assert "its footer is damaged: it counts 30 rows, its row groups 29" in said
    assert "its footer is damaged: it counts 30 rows, its row groups 31" in said
    assert "its footer is damaged: row group 0, column 'label' has 9 values for 10 rows" in said
    assert rows_read(tmp_path, content) == whole


def test_a_footer_of_another_file_is_refused(tmp_path, content):
    """Its offsets lie beyond this file."""
    longer = write(tmp_path / "longer" / "a.parquet", log(3000), row_group_size=1000).read_bytes()
    begin, _ = footer_of(longer)
    (tmp_path / "a.parquet").write_bytes(content[:2000] + longer[begin:])
    with pytest.raises(ValueError, match=r"a\.parquet' cannot be read as Parquet .*row group 0, column .* takes bytes"):
        Manifest.scan(["a.parquet"], str(tmp_path), [])


@pytest.mark.parametrize("crash", ["os.abort()", "os.kill(os.getpid(), 11)", "[0 for _ in iter(int, 1)]"])
def test_where_the_library_crashes_the_file_is_named_and_others_are_read(tmp_path, monkeypatch, crash):
    write(tmp_path / "a.parquet", log())
    write(tmp_path / "b.parquet", log().append_column("crashes", [[0] * ROWS]))
    write(tmp_path / "c.parquet", log())
    crashing = (
        "from data_loaders import footer_checks as f; import os; facts = f.facts; f._CPU_SECONDS = 1; "
        f"f.facts = lambda footer, size: {crash} if b'crashes' in footer else facts(footer, size); "
    )
    monkeypatch.setattr(
        footers, "_CHILD", footers._CHILD.replace("from data_loaders", crashing + "from data_loaders", 1)
    )
    monkeypatch.setattr(footers, "_CHECKER", footers._Checker())
    with pytest.raises(ValueError, match=r"b\.parquet' cannot be read as Parquet \(its footer is damaged\)"):
        Manifest.scan(["."], str(tmp_path), [])
    assert Manifest.scan(["a.parquet", "c.parquet"], str(tmp_path), []).num_rows == 2 * ROWS


def test_a_child_that_was_killed_or_had_nothing_to_do_is_started_again(tmp_path):
    write(tmp_path / "a.parquet", log())
    for _ in range(2):
        assert Manifest.scan(["a.parquet"], str(tmp_path), []).num_rows == ROWS
        os.kill(footers._CHECKER._process.pid, signal.SIGKILL)


def test_an_interrupted_question_leaves_no_answers_to_the_next(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", log())
    write(tmp_path / "b.parquet", log(20))
    monkeypatch.setattr(footers, "_CHECKER", footers._Checker())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(footers.json, "loads", _interrupt)
        Manifest.scan(["a.parquet"], str(tmp_path), [])
    assert Manifest.scan(["b.parquet"], str(tmp_path), []).num_rows == 20


def _interrupt(_):
    raise KeyboardInterrupt


def test_pages_with_fewer_rows_than_the_footer_counts_are_named(tmp_path):
    """The bytes of a file of 9 rows a group, under a footer that says 10 wherever they said 9."""
    shorter = write(tmp_path / "shorter" / "a.parquet", log(27).select(["row"]), row_group_size=9, compression="none")
    mutated = bytearray(shorter.read_bytes())
    begin, end = footer_of(mutated)
    for place in range(begin, end):
        if mutated[place : place + 1] == varint(9):
            mutated[place : place + 1] = varint(10)
        elif mutated[place : place + 1] == varint(27):
            mutated[place : place + 1] = varint(30)
    (tmp_path / "a.parquet").write_bytes(mutated)
    assert pq.read_metadata(tmp_path / "a.parquet").num_rows == 30
    groups = RowGroups(Manifest.scan(["a.parquet"], str(tmp_path), ["row"]), ["row"], set())
    with pytest.raises(ValueError, match=r"a\.parquet', row group 0: its pages hold 9 rows, its footer counts 10"):
        list(groups.read(0, GROUP, Handle()))


@pytest.mark.parametrize("how", ["cut", "rewritten"])
def test_a_file_that_is_written_over_while_it_is_read_is_named(tmp_path, how):
    """In place, so that the open file is the same: a mapped file would end the process by SIGBUS."""
    path = write(tmp_path / "data" / "a.parquet", log(20_000), row_group_size=10_000)
    batches = loader(tmp_path / "data", batch_size=100, prefetch_batches=1).epoch(0)
    next(batches)
    content = path.read_bytes()
    with open(path, "r+b") as file:
        if how == "cut":
            file.truncate(len(content) // 3)
        else:
            file.write(content[:4] + content[4:][::-1])
    with pytest.raises(ValueError, match=r"a\.parquet.* has changed since it was scanned"):
        list(batches)
