"""The output folder: made beside its place, renamed into it when whole.

::

    OUTPUT/
      train/ valid/ test/        part-00000.parquet …
      vocabulary/<table>.parquet raw value, id, count, unseen (days since it was last seen); rare/: values without an id
      statistics.json            what number transforms learnt from train
      preparation.yaml           the declaration, complete
      data/<name>.yaml           the filled-in data set: --config-dir OUTPUT data=<name>
      report.json                rows, positives, vocabularies, seconds
  .prepared.json             which files these are: an output is replaced only if nothing else is there

Until then all of it is in ``.OUTPUT.unfinished`` beside it, intermediate tables too: the same command resumes there.
"""

import dataclasses
import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from data_loaders.errors import UserError
from data_loaders.prepare import compose, owned
from data_loaders.prepare.declaration import Declaration
from data_loaders.schema import Schema
from data_loaders.state_files import sync, sync_below, write_text

STATISTICS, DECLARATION, REPORT = "statistics.json", "preparation.yaml", "report.json"
_OF_WORK = re.compile(r"lock|tables|output|fingerprint|\.fingerprint\.\d+\.part")  # the last: of a killed write_text


class Folder:
    """A context: ``made`` is the output in the making, ``tables`` the intermediate tables. Raises ``UserError`` where
    the output exists already, or another process is making it."""

    def __init__(self, output: Path, overwrite: bool) -> None:
        self.output = Path(output).expanduser().absolute()
        self.overwrite = overwrite
        self._work = self.output.with_name(f".{self.output.name}.unfinished")
        self._old = self.output.with_name(f".{self.output.name}.old")
        self.made, self.tables = self._work / "output", self._work / "tables"
        self._lock: Any = None

    def __enter__(self) -> "Folder":
        self._check_place()
        self._check_work()
        self._work.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._work / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"output={self.output}: another process is preparing it; wait for it or end it") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def resume(self, fingerprint: str) -> None:
        """Keeps the intermediate tables of an interrupted run of the same declaration and files; begins anew otherwise."""
        mark = self._work / "fingerprint"
        if not mark.is_file() or mark.read_text() != fingerprint:
            shutil.rmtree(self.tables, ignore_errors=True)
            write_text(mark, fingerprint)
        shutil.rmtree(self.made, ignore_errors=True)
        self.made.mkdir()

    def commit(self) -> None:
        """The output appears, whole, in the place of an older one. Raises ``UserError`` where something else has come to
        lie in that one."""
        write_text(self.made / owned.MARKER, owned.record(self.made))
        sync_below(self.made)
        self._check_place()
        if self.output.exists():
            os.rename(self.output, self._old)
        os.rename(self.made, self.output)
        sync(self.output.parent)
        if self._old.exists():
            owned.delete(self._old)
        shutil.rmtree(self._work, ignore_errors=True)

    def _check_place(self) -> None:
        """Raises ``UserError`` unless everything in the way is an earlier output, and may be replaced."""
        if self.output.is_symlink():
            raise UserError(f"output={self.output} is a link: name the folder itself")
        if self._old.exists():  # a kill around the two renames of commit
            self._check_owned(self._old)
            if self.output.exists():
                owned.delete(self._old)
            else:
                os.rename(self._old, self.output)
        if not self.output.exists():
            return
        if not self.output.is_dir():
            raise UserError(f"output={self.output} is a file: name the folder to make")
        if any(self.output.iterdir()):
            self._check_owned(self.output)
            if not self.overwrite:
                raise UserError(
                    f"output={self.output} exists already: name another place, or replace it: overwrite=true"
                )

    def _check_owned(self, folder: Path) -> None:
        others = owned.foreign(folder)
        if others is None:
            raise UserError(
                f"output={self.output}: {folder} exists and is not a prepared data set (it has no {owned.MARKER} of "
                "clicktrainer prepare): name another place, or move it away"
            )
        if others:
            raise UserError(
                f"output={self.output}: {folder} holds {len(others)} file(s) or folder(s) that clicktrainer prepare did not "
                f"write, or that have changed since ({', '.join(others[:5])}{', …' if len(others) > 5 else ''}): move them "
                "away, or name another place"
            )

    def _check_work(self) -> None:
        """That the folder of unfinished work is ours."""
        names = [path.name for path in self._work.iterdir()] if self._work.is_dir() else []
        others = [name for name in names if not _OF_WORK.fullmatch(name)]
        if others or self._work.is_symlink():
            raise UserError(f"output={self.output}: {self._work} is in the way, and not of this command: move it away")


def write_facts(
    folder: Folder,
    declaration: Declaration,
    statistics: dict[str, Any],
    report: dict[str, Any],
    schema: Schema,
    splits: list[str],
) -> None:
    """Everything but the rows and vocabularies."""
    made = folder.made
    write_text(made / STATISTICS, json.dumps(statistics, indent=1) + "\n")
    write_text(made / DECLARATION, _yaml(compose.record(declaration)))
    data = {
        "name": declaration.name,
        "root": str(folder.output),
        **{name: [name] if name in splits else [] for name in ("train", "valid", "test")},
        "prepared": "${.root}",
        "schema": _without_defaults(schema),
    }
    (made / "data").mkdir()
    head = "# Train on it: clicktrainer train --config-dir <this file's folder's folder> data=<this file's name>\n"
    write_text(made / "data" / f"{declaration.name}.yaml", head + _yaml(data))
    write_text(made / REPORT, json.dumps(report, indent=1) + "\n")


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, width=120, allow_unicode=True)


def _without_defaults(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kind: Any = type(value)
        empty = kind()
        found = {}
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if inner != getattr(empty, field.name) or field.name == "label":
                found[field.name] = _without_defaults(inner)
        return found
    return {key: _without_defaults(inner) for key, inner in value.items()} if isinstance(value, dict) else value
