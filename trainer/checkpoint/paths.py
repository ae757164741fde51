"""Where a checkpoint lies, and what is done there: the contract that ``local`` and ``store`` fulfil."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

MANIFEST = "MANIFEST.json"
COMMITTED = re.compile(r"step-(0|[1-9][0-9]{0,17})")


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

    part: Any
    suffix: str
    final: Any

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
        """Makes sure that checkpoints can be written there. Raises ``UserError``."""
