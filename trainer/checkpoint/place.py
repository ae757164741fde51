"""Where checkpoints lie: folders of this machine, and object stores. What differs between them is here and in ``store``.

A local checkpoint is written to a fresh temporary folder, and the rename to ``step-N`` is the commit. An object store has
no rename: there the files go to ``step-N`` itself, under names that no other attempt at that step has, and the manifest,
written last, is the commit. pyarrow, which stores need, is imported when the first store is met.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from data_loaders.state_files import sync, write_text
from trainer.checkpoint.tensor_file import TensorFile, open_plain, write_tensors

MANIFEST = "MANIFEST.json"
ELSEWHERE = "elsewhere.txt"  # in a run's ``checkpoints``: the address of the place that holds them
COMMITTED = re.compile(r"step-(0|[1-9][0-9]{0,17})")
OURS_TO_CLEAN = re.compile(r"\.(tmp|trash)-step-[0-9]+-[0-9a-f]{8}")
CHUNK_BYTES = 1 << 22
LONGEST_ADDRESS = 8192


@dataclass(frozen=True)
class StorePath:
    """A name in an object store, with what checkpoints need of ``pathlib.Path``. ``options`` are those after a root's
    ``?`` (``data_loaders.storage``)."""

    address: str
    options: str = field(default="", repr=False)

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(f"{self.address}/{name}", self.options)

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def parent(self) -> "StorePath":
        return StorePath(self.address.rpartition("/")[0], self.options)


AnyPath = Path | StorePath


class Unreachable(OSError):
    """A store does not answer, or refuses: which says nothing about whether a checkpoint there is whole."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a save: the folder its files go to, what their names end with, and the checkpoint they will be."""

    part: AnyPath
    suffix: str
    final: AnyPath

    def file(self, rank: int) -> str:
        return f"rank-{rank:05}{self.suffix}.safetensors"


class Place(Protocol):
    """What is done with the paths of one kind. All raise ``OSError``: ``FileNotFoundError`` for what is not there."""

    def is_folder(self, path: Any) -> bool:
        """Whether there may be files in it; no link."""

    def is_checkpoint(self, path: Any) -> bool:
        """Whether a path names one, damaged or not."""

    def sizes(self, folder: Any) -> dict[str, int | None]:
        """Bytes of what lies in a folder by name; None for what is no plain file."""

    def is_stray(self, name: str) -> bool:
        """Whether a file beside those of the manifest may be of an attempt that came to nothing."""

    def read(self, path: Any, most: int = -1) -> bytes:
        """The first ``most`` bytes of a file, or all."""

    def chunks(self, path: Any) -> Iterator[Any]:
        """A file's bytes, bounded portions in order."""

    def tensors(self, path: Any) -> Any:
        """A ``TensorFile`` or its like."""

    def write(self, path: Any, text: str) -> None:
        """Whole or not at all; on disk when it returns."""

    def write_tensors(self, path: Any, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        """As ``tensor_file.write_tensors``."""

    def committed(self, folder: Any) -> list[Any]:
        """Its checkpoints, in any order."""

    def folders_below(self, folder: Any) -> Iterator[Any]:
        """It and all folders below, but for what is in checkpoints."""

    def free_bytes(self, folder: Any) -> int | None:
        """What this process may still write there; None: no limit is known."""

    def attempt(self, folder: Any, name: str) -> Attempt:
        """A new attempt at the checkpoint ``name`` of ``folder``."""

    def prepare(self, attempt: Attempt) -> None:
        """Before a rank writes."""

    def clear(self, attempt: Attempt) -> None:
        """Before the first file of the commit."""

    def publish(self, attempt: Attempt) -> None:
        """Behind the manifest."""

    def flush(self, folder: Any) -> None:
        """Returns once a folder's list of names is on disk."""

    def discard(self, attempt: Attempt) -> None:
        """Takes away what an attempt has written, as far as that is possible; ``clean`` gets the rest."""

    def remove(self, path: Any) -> None:
        """Takes a checkpoint away; no half of it is ever seen as one."""

    def clean(self, folder: Any) -> None:
        """Takes away what crashed saves and removals left behind."""

    def probe(self, folder: Any) -> None:
        """Makes sure that checkpoints can be written there. Raises ``ValueError``."""


class _Local:
    def is_folder(self, path: Path) -> bool:
        return path.is_dir() and not path.is_symlink()

    def is_checkpoint(self, path: Path) -> bool:
        return path.is_dir() and (COMMITTED.fullmatch(path.name) is not None or (path / MANIFEST).is_file())

    def sizes(self, folder: Path) -> dict[str, int | None]:
        with os.scandir(folder) as entries:
            return {
                entry.name: entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else None
                for entry in entries
            }

    def is_stray(self, name: str) -> bool:
        return False

    def read(self, path: Path, most: int = -1) -> bytes:
        with open_plain(path) as file:
            return file.read(most)

    def chunks(self, path: Path) -> Iterator[bytes]:
        with open_plain(path) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def tensors(self, path: Path) -> TensorFile:
        return TensorFile(path)

    def write(self, path: Path, text: str) -> None:
        write_text(path, text)

    def write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        return write_tensors(path, tensors)

    def committed(self, folder: Path) -> list[Path]:
        return [path for path in folder.glob("step-*") if COMMITTED.fullmatch(path.name) and self.is_folder(path)]

    def folders_below(self, folder: Path) -> Iterator[Path]:
        for found, names, _ in os.walk(folder):
            names[:] = sorted(name for name in names if not COMMITTED.fullmatch(name))
            yield Path(found)

    def free_bytes(self, folder: Path) -> int:
        return shutil.disk_usage(folder).free

    def attempt(self, folder: Path, name: str) -> Attempt:
        return Attempt(fresh(folder, "tmp", name), "", folder / name)

    def prepare(self, attempt: Attempt) -> None:
        attempt.part.mkdir(parents=True, exist_ok=True)

    def clear(self, attempt: Attempt) -> None:
        """The folder is new."""

    def publish(self, attempt: Attempt) -> None:
        """A checkpoint of that step that is there is a damaged one, which was passed over."""
        if attempt.final.exists():
            self.remove(attempt.final)
        os.rename(attempt.part, attempt.final)

    def flush(self, folder: Path) -> None:
        sync(folder)

    def discard(self, attempt: Attempt) -> None:
        if OURS_TO_CLEAN.fullmatch(attempt.part.name) and self.is_folder(attempt.part):
            shutil.rmtree(attempt.part, ignore_errors=True)

    def remove(self, path: Path) -> None:
        """Renamed first."""
        trash = fresh(path.parent, "trash", path.name)
        os.rename(path, trash)
        sync(path.parent)
        shutil.rmtree(trash)

    def clean(self, folder: Path) -> None:
        for path in folder.iterdir():
            if OURS_TO_CLEAN.fullmatch(path.name) and self.is_folder(path):
                shutil.rmtree(path)

    def probe(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"checkpoint.root: {folder} cannot be made ({error}): set it to a writable place"
            ) from None


_LOCAL = _Local()


def place_of(path: AnyPath) -> Place:
    """Raises ``ValueError`` for a store that nobody knows, as ``data_loaders.storage``."""
    if isinstance(path, Path):
        return _LOCAL
    from trainer.checkpoint.store import Store  # pyarrow takes a while

    return Store.of(path)


def parse(text: str) -> AnyPath:
    """A local path or a URI, as a person gives it. Raises ``ValueError`` where it holds credentials."""
    if "://" not in text:
        return Path(text)
    from data_loaders.storage import is_uri, root_name

    name = root_name(text)
    return StorePath(name, text.partition("?")[2]) if is_uri(name) else Path(name)


def chosen(root: str | None, run: Path, *, dated: bool) -> AnyPath:
    """The folder of the checkpoints of the run in ``run``: its own, or under ``root``, by the name of the run's folder; by
    that and its parent's where the name is a date only (``dated``)."""
    if root is None:
        return run / "checkpoints"
    run = run.absolute()
    return parse(root) / (f"{run.parent.name}/{run.name}" if dated else run.name)


def note(run: Path, folder: AnyPath) -> None:
    """Writes down in a run's folder where its checkpoints are, for whoever looks for them by that."""
    address = run / "checkpoints" / ELSEWHERE
    if folder == run / "checkpoints":
        address.unlink(missing_ok=True)
    else:
        options = folder.options if isinstance(folder, StorePath) else ""
        write_text(address, f"{folder}" + (f"?{options}" if options else "") + "\n")


def of_run(run: AnyPath) -> AnyPath:
    """The folder of a run's checkpoints, where ``note`` said; in a store it is the run's folder itself."""
    if isinstance(run, StorePath):
        return run
    address = run / "checkpoints" / ELSEWHERE
    try:
        with open_plain(address) as file:
            text = file.read(LONGEST_ADDRESS + 1).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return run / "checkpoints"
    if not text or len(text) > LONGEST_ADDRESS or not text.isprintable():
        raise ValueError(f"{address} holds no address of checkpoints: write it there, or delete the file")
    return parse(text)


def fresh(folder: Path, prefix: str, name: str) -> Path:
    """A new name for a folder that is being written (``tmp``) or removed (``trash``)."""
    return folder / f".{prefix}-{name}-{secrets.token_hex(4)}"
