"""An exported model on disk.

``EXPORT/<version>/`` holds one model, ``EXPORT/current.json`` names the version to serve:

========================  ==================================================================================================
serving.json              format, run, step, tables (file, shape, form), correction of the logits, metrics, columns' types
config.yaml               the run's configuration: model, hyperparameters, schema
table-<n>.safetensors     one table, mapped when it is read
dense.safetensors         parameters and buffers of the dense layers, averages in place
golden.arrow              rows of held-out data, with the logit that this export gave them
MANIFEST.json             bytes and BLAKE3 of every other file; written last
========================  ==================================================================================================

It is written under another name and renamed, so a version is whole or not there. Nothing of it is executed or unpickled.
"""

import base64
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_loaders.errors import UserError
from data_loaders.state_files import json_text, sync, write_text
from trainer.checkpoint.digest import DIGEST
from trainer.checkpoint.manifest import check_listing, fingerprint, hashing, listed
from trainer.checkpoint.paths import MANIFEST
from trainer.config.compose import from_yaml
from trainer.config.export import TABLE_FORMS
from trainer.config.job import TrainConfig
from trainer.runtime.checked_json import Number, Whole, check_form, parse_json
from trainer.serve.versions import current

FORMAT = 1
LOGIT = "logit"  # the column of ``golden.arrow`` that is none of the data's
SERVING, CONFIG, DENSE, GOLDEN = "serving.json", "config.yaml", "dense.safetensors", "golden.arrow"
TABLE = {"name": str, "file": str, "rows": Whole(1), "dim": Whole(1), "form": str}
FORM = {
    "format": Whole(),
    "run": str,
    "step": Whole(),
    "model": str,
    "correction": Number(),
    "tolerance": Number(0.0),
    "tables": list,
    "types": str,
    "metrics": dict,
    "made_with": dict,
}
LARGEST_TEXT = 64 << 20  # bytes


@dataclass(frozen=True)
class TableEntry:
    """A table of ``rows`` rows of ``dim`` values, in ``file``; ``form``: how they are stored (``trainer.serve.tables``)."""

    name: str
    file: str
    rows: int
    dim: int
    form: str


class Artifact:
    """One exported version. Raises ``UserError`` where it is no export, or not whole: files, sizes and, with ``hashes``, every
    byte are those of its manifest."""

    def __init__(self, path: Path, *, hashes: bool = True) -> None:
        self.path = path
        try:
            manifest = listed(path, {SERVING, CONFIG, DENSE, GOLDEN})
            check_listing(path, manifest)
            problem = next(filter(None, hashing(path, manifest)), None) if hashes else None
            self.serving = parse_json((path / SERVING).read_text()) if problem is None else {}
        except (OSError, ValueError) as error:
            raise UserError(f"export {path}: {error}") from None
        if problem is not None:
            raise UserError(f"export {path}: {problem}")
        self.manifest = manifest
        self._check()

    def _check(self) -> None:
        try:
            check_form({"format": self.serving.get("format")}, {"format": Whole()}, SERVING)
            if self.serving["format"] != FORMAT:
                raise UserError(f"format {self.serving['format']}: this program reads {FORMAT}; export the run again")
            check_form(self.serving, FORM, SERVING)
            for entry in self.serving["tables"]:
                check_form(entry, TABLE, f"{SERVING}: tables")
            self.tables = [TableEntry(**entry) for entry in self.serving["tables"]]
            for table in self.tables:
                if table.form not in TABLE_FORMS or table.file not in self.manifest:
                    raise UserError(f"table {table.name!r:.200} has form {table.form!r:.50}, file {table.file!r:.200}")
        except ValueError as error:
            raise UserError(f"export {self.path}: {error}") from None

    @property
    def version(self) -> str:
        return self.path.name

    @cached_property
    def config(self) -> TrainConfig:
        return from_yaml(self.path / CONFIG).config

    @cached_property
    def types(self) -> dict[str, pa.DataType]:
        """The Arrow type of each column that the model reads, as in the training data."""
        try:
            schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.serving["types"], validate=True)))
        except (pa.ArrowException, OSError, ValueError):
            raise UserError(f"export {self.path}: {SERVING}: types are no Arrow schema") from None
        return {field.name: field.type for field in schema}

    def golden(self) -> pa.Table:
        """Rows of held-out data and, as ``LOGIT``, what this export gave them."""
        with pa.OSFile(str(self.path / GOLDEN)) as file:
            return pa.ipc.open_file(file).read_all()


def types_text(types: Mapping[str, pa.DataType]) -> str:
    """For ``serving.json``, and back by ``Artifact.types``."""
    return base64.b64encode(pa.schema(list(types.items())).serialize()).decode()


@contextmanager
def new_version(export: Path, step: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields a folder to write the files of a version to and a dict for the content of ``serving.json``, and commits both when
    left without an error: ``published`` is then its path. Files equal to those of the version served until then become
    links to them, so that they take no second copy of disk and memory."""
    export.mkdir(parents=True, exist_ok=True)
    folder = export / f".tmp-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    serving: dict[str, Any] = {}
    try:
        yield folder, serving
        write_text(folder / SERVING, json_text({"format": FORMAT, "step": step, **serving}))
        manifest = {path.name: fingerprint(path) for path in sorted(folder.iterdir())}
        _share(folder, manifest, export)
        write_text(folder / MANIFEST, json_text(manifest))
        for path in folder.iterdir():
            sync(path)
        sync(folder)
        target = export / f"step-{step}-{fingerprint(folder / MANIFEST)[DIGEST][:8]}"
        if target.exists():  # the same bytes
            shutil.rmtree(folder)
        else:
            os.rename(folder, target)
        sync(export)
        serving["published"] = target
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _share(folder: Path, manifest: Mapping[str, Mapping[str, Any]], export: Path) -> None:
    try:
        before = current(export)
        known = {tuple(entry.values()): name for name, entry in listed(before, set()).items()}
    except (OSError, ValueError):
        return
    for name, entry in manifest.items():
        same = known.get(tuple(entry.values()))
        if same is not None and fingerprint(before / same) == entry:
            (folder / name).unlink()
            os.link(before / same, folder / name)
