"""Tables larger than the memory there is: said, or refused. Files that two versions share count once."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_loaders.errors import UserError
from trainer.config.serve import ServeConfig
from trainer.serve.artifact import TableEntry
from trainer.serve.memory import check_memory, table_bytes


@dataclass
class Version:
    """What of an ``Artifact`` is looked at."""

    path: Path
    tables: list[TableEntry]

    @property
    def version(self):
        return self.path.name


def version(path, sizes):
    path.mkdir()
    for name, size in sizes.items():
        (path / name).write_bytes(bytes(size))
    return Version(path, [TableEntry(name, name, 1, 1, "fp32") for name in sizes])


@pytest.fixture
def versions(tmp_path):
    """3,000 bytes of tables, and the next day's: 2,000 of them the same file, and 1,000 others."""
    first = version(tmp_path / "first", {"a": 2000, "b": 1000})
    second = version(tmp_path / "second", {"b": 1000})
    os.link(first.path / "a", second.path / "a")
    second.tables.append(first.tables[0])
    return first, second


def test_a_file_of_two_versions_is_in_memory_once(versions):
    assert table_bytes(versions[:1]) == 3000 and table_bytes(versions) == 4000


@pytest.mark.parametrize(
    ("kilobytes", "beside", "fits"),
    [(3, False, True), (2, False, False), (4, True, True), (3, True, False)],  # 3072, 2048, 4096 bytes
)
def test_what_does_not_fit_is_said_or_refused(versions, capsys, kilobytes, beside, fits):
    first, second = versions
    new, served = (second, first) if beside else (first, None)
    check_memory(new, served, "warn", kilobytes * 1024)
    said = capsys.readouterr().err
    assert new.version in said and ("read from disk" in said) != fits
    if fits:
        check_memory(new, served, "require", kilobytes * 1024)
    else:
        with pytest.raises(UserError, match="export.tables=int8, free memory, or serve.memory=warn"):
            check_memory(new, served, "require", kilobytes * 1024)


def test_another_word_is_refused():
    with pytest.raises(UserError, match="serve.memory is 'lock': give warn or require"):
        ServeConfig(memory="lock")
