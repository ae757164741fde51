"""Checkpoints in folders of this machine: written to a fresh temporary folder, whose rename to ``step-N`` is the commit."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from data_loaders.errors import UserError
from data_loaders.state_files import sync, write_text
from trainer.checkpoint.paths import COMMITTED, MANIFEST, Attempt
from trainer.checkpoint.tensor_file import TensorFile, open_plain, write_tensors

OURS_TO_CLEAN = re.compile(r"\.(tmp|trash)-step-[0-9]+-[0-9a-f]{8}")
CHUNK_BYTES = 1 << 22


class Local:
    """The place of ``Path``s."""

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
            raise UserError(f"checkpoint.root: {folder} cannot be made ({error}): set it to a writable place") from None


def fresh(folder: Path, prefix: str, name: str) -> Path:
    """A new name for a folder that is being written (``tmp``) or removed (``trash``)."""
    return folder / f".{prefix}-{name}-{secrets.token_hex(4)}"
