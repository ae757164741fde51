"""Checkpoints on an object store: ``step-N/`` with the ranks' files, index, facts, texts and, last, the manifest.

A prefix ``step-N/`` without a manifest is no checkpoint. Two attempts at one step must not mix, though both write below the
same prefix and the first one's writers may be alive still (a lost node that comes back late): so each rank's file has its
attempt in its name, ``rank-00000-<attempt>.safetensors``, the manifest names the files of one attempt, and files of other
attempts beside them are nobody's, to be deleted at the next start. Everything is streamed: no local copy is made, nor are
more than ``BACKLOG_BYTES`` held on their way. A process that is killed may leave parts of an unfinished upload, which show
in no listing: have the bucket abort incomplete uploads after some days (a lifecycle rule).
"""

import errno
import math
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

import pyarrow as pa
import torch
from torch import Tensor

from data_loaders.errors import UserError
from data_loaders.messages import one_line
from data_loaders.storage import Storage, StorageError
from trainer.checkpoint.paths import COMMITTED, MANIFEST, Attempt, StorePath, Unreachable
from trainer.checkpoint.tensor_file import SLAB_BYTES, header_bytes, parse_header, stream_tensors

T = TypeVar("T")
RANK_FILE = re.compile(r"rank-[0-9]{5,}-[0-9a-f]{8}\.safetensors")
COMMIT_FILES = ("index.json", "state.json")
PROBE = re.compile(r"\.probe-[0-9a-f]{8}")
BACKLOG_BYTES = 256 << 20  # written and not yet with the store
BLOCK_BYTES = 4 << 20  # what a small read fetches, for those that follow
STREAMS = 4  # requests at a time for a large read, each of BLOCK_BYTES at least


class StoreFailure(Unreachable, StorageError):
    """All attempts were used up; starting again may help."""


class Store:
    """The place of ``StorePath``s with one authority and one set of options."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @staticmethod
    def of(path: StorePath) -> "Store":
        scheme, _, rest = path.address.partition("://")
        return _store(f"{scheme}://{rest.partition('/')[0]}" + (f"?{path.options}" if path.options else ""))

    # Reading

    def is_folder(self, path: StorePath) -> bool:
        return True  # a prefix is there once something lies below it

    def is_checkpoint(self, path: StorePath) -> bool:
        try:
            self._run(path / MANIFEST, lambda: self._storage.stat(str(path / MANIFEST)))
        except FileNotFoundError:
            return False
        return True

    def sizes(self, folder: StorePath) -> dict[str, int | None]:
        return {name: size if "/" not in name else None for name, size in self._below(folder).items()}

    def is_stray(self, name: str) -> bool:
        return RANK_FILE.fullmatch(name) is not None

    def read(self, path: StorePath, most: int = -1) -> bytes:
        def read() -> bytes:
            with self._storage.open(str(path)) as file:
                return file.read(None if most < 0 else most)

        return self._run(path, read)

    def chunks(self, path: StorePath) -> Iterator[Any]:
        file = _Object(self, path)
        for begin in range(0, file.size, SLAB_BYTES):
            yield memoryview(file.read(begin, min(begin + SLAB_BYTES, file.size)).numpy())

    def tensors(self, path: StorePath) -> "StoredTensors":
        return StoredTensors(_Object(self, path))

    # Writing

    def write(self, path: StorePath, text: str) -> None:
        self._upload(path, lambda write: write(text.encode()))

    def write_tensors(self, path: StorePath, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        return self._upload(path, lambda write: stream_tensors(write, tensors))

    def free_bytes(self, folder: StorePath) -> None:
        return None

    def attempt(self, folder: StorePath, name: str) -> Attempt:
        return Attempt(folder / name, f"-{secrets.token_hex(4)}", folder / name)

    def prepare(self, attempt: Attempt) -> None:
        """Prefixes need not be made."""

    def clear(self, attempt: Attempt) -> None:
        """A checkpoint of that step that is there is a damaged one, which was passed over: it goes, its manifest first, so
        that at no instant a manifest stands beside an index or facts of another attempt. So does what an attempt that
        failed has left."""
        names = self._below(attempt.final)
        if MANIFEST in names:
            self._delete(attempt.final / MANIFEST)
        for name in names:
            if name != MANIFEST and not name.endswith(f"{attempt.suffix}.safetensors"):
                self._delete(attempt.final / name)

    def publish(self, attempt: Attempt) -> None:
        """The manifest was the commit."""

    def flush(self, folder: StorePath) -> None:
        """An object is there for all once it is written."""

    # Which there are, and deleting

    def committed(self, folder: StorePath) -> list[StorePath]:
        return [folder / step for step, names in self._steps(folder).items() if MANIFEST in names]

    def folders_below(self, folder: StorePath) -> Iterator[StorePath]:
        paths = [name.split("/")[:-2] for name in self._below(folder) if name.endswith(f"/{MANIFEST}")]
        for parts in sorted({tuple(parts) for parts in paths}):
            yield folder / "/".join(parts) if parts else folder

    def discard(self, attempt: Attempt) -> None:
        with suppress(OSError):
            try:  # writing the manifest may have failed only as far as we were told
                mine = attempt.suffix.encode() in self.read(attempt.final / MANIFEST)
            except FileNotFoundError:
                mine = True
            if mine:
                self.remove(attempt.final)
            else:
                for name in self._below(attempt.final):
                    if name.endswith(f"{attempt.suffix}.safetensors"):
                        self._delete(attempt.final / name)

    def remove(self, path: StorePath) -> None:
        """The manifest first."""
        self._delete(path / MANIFEST)
        self._run(path, lambda: self._storage.delete_folder(str(path)))

    def clean(self, folder: StorePath) -> None:
        for name in self._below(folder):
            if PROBE.fullmatch(name):
                self._delete(folder / name)
        for step, names in self._steps(folder).items():
            strays = {name for name in names if RANK_FILE.fullmatch(name)}
            if MANIFEST in names:
                named = self.read(folder / step / MANIFEST)
                for name in strays:
                    if name.encode() not in named:
                        self._delete(folder / step / name)
            elif strays or names & set(COMMIT_FILES):
                self.remove(folder / step)

    def probe(self, folder: StorePath) -> None:
        path = folder / f".probe-{secrets.token_hex(4)}"
        try:
            self.write(path, "checkpoints can be written here\n")
            self._run(path, lambda: self._storage.delete(str(path)))
        except StoreFailure:
            raise
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"checkpoint.root: {folder} cannot be written ({one_line(error)}): check the bucket, the address and your "
                "permission to write and delete there"
            ) from None

    def _steps(self, folder: StorePath) -> dict[str, set[str]]:
        """The files below each prefix ``step-N``."""
        found: dict[str, set[str]] = {}
        for name in self._below(folder):
            step, _, rest = name.partition("/")
            if rest and COMMITTED.fullmatch(step):
                found.setdefault(step, set()).add(rest)
        return found

    def _below(self, folder: StorePath) -> dict[str, int]:
        return self._run(folder, lambda: self._storage.sizes_below(str(folder)))

    def _delete(self, path: StorePath) -> None:
        with suppress(FileNotFoundError):
            self._run(path, lambda: self._storage.delete(str(path)))

    def _upload(self, path: StorePath, fill: Callable[[Callable[[Any], Any]], T]) -> T:
        def upload() -> T:
            stream = _Stream(self._storage.create(str(path)))
            try:
                result = fill(stream.write)
            except BaseException:
                # pyarrow cannot give an upload up: what there is becomes an object, which no manifest names.
                with suppress(Exception):
                    stream.close()
                raise
            stream.close()
            return result

        return self._run(path, upload)

    def _run(self, path: StorePath, work: Callable[[], T]) -> T:
        """With retries. Raises ``FileNotFoundError``, ``Unreachable``."""
        try:
            return self._storage.retries(str(path)).run(work)
        except FileNotFoundError:
            raise
        except StorageError as error:
            raise StoreFailure(str(error)) from error
        except OSError as error:
            raise Unreachable(f"{path}: {one_line(error)}") from error


class _Stream:
    """Bounds what waits to be sent: a store's client uploads in the background, and takes whatever it is given."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream, self._waiting = stream, 0

    def write(self, data: Any) -> None:
        self._stream.write(data)
        self._waiting += len(data)
        if self._waiting >= BACKLOG_BYTES:
            self._stream.flush()  # waits for what is on its way
            self._waiting = 0

    def close(self) -> None:
        self._stream.close()


class _Object:
    """An object read by ranges: large ones by several requests at once, small ones with what lies behind them."""

    def __init__(self, store: Store, path: StorePath) -> None:
        self._store, self.path = store, path
        self._files: list[Any] = [None] * STREAMS  # each used by one thread at a time
        self._block = (0, torch.empty(0, dtype=torch.uint8))
        self.size: int = store._run(path, lambda: self._file(0).size())

    def read(self, begin: int, end: int) -> Tensor:
        """Bytes ``begin`` to ``end`` as a tensor of its own. Raises ``OSError``."""
        if end - begin > BLOCK_BYTES:
            return self._fetch(begin, end)
        first, data = self._block
        if not first <= begin <= end <= first + len(data):
            first, data = begin, self._fetch(begin, min(begin + BLOCK_BYTES, self.size))
            self._block = first, data
        return data[begin - first : end - first].clone()

    def _fetch(self, begin: int, end: int) -> Tensor:
        target = torch.empty(end - begin, dtype=torch.uint8)
        share = max(BLOCK_BYTES, -(-len(target) // STREAMS))
        parts = [(number, begin + number * share, part) for number, part in enumerate(target.split(share))]
        if len(parts) == 1:
            self._fill(*parts[0])
        else:
            list(_threads().map(lambda part: self._fill(*part), parts))
        return target

    def _fill(self, number: int, begin: int, target: Tensor) -> None:
        def read() -> None:
            try:
                data = self._file(number).read_at(len(target), begin)
            except OSError:
                self._files[number] = None
                raise
            if len(data) != len(target):
                raise OSError(errno.EIO, f"{len(data)} bytes came of the {len(target)} from {begin} on")
            memoryview(target.numpy())[:] = data

        self._store._run(self.path, read)

    def _file(self, number: int) -> Any:
        if self._files[number] is None:
            self._files[number] = self._store._storage.open(str(self.path))
        return self._files[number]


class StoredTensors:
    """``TensorFile``, in a store: of a part that is asked for only its rows are fetched, a slab at a time."""

    def __init__(self, file: _Object) -> None:
        self._file = file
        length = header_bytes(file.read(0, min(8, file.size)).numpy().tobytes(), file.size)
        self._start = 8 + length
        header = file.read(8, self._start).numpy().tobytes()
        self.tensors = parse_header(header, file.size - self._start)

    def copy(self, key: str, part: tuple[slice, ...], target: Tensor) -> None:
        """As ``TensorFile.copy``."""
        dtype, shape, begin = self.tensors[key]
        begin += self._start
        if not shape:
            target.copy_(self._file.read(begin, begin + dtype.itemsize).view(dtype)[0])
            return
        rows, columns = part[0], (slice(None), *part[1:])
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        step = max(1, SLAB_BYTES // row_bytes)
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            data = self._file.read(begin + start * row_bytes, begin + stop * row_bytes)
            slab = data.view(dtype).view(stop - start, *shape[1:])
            target[start - rows.start : stop - rows.start].copy_(slab[columns])


@cache
def _store(root: str) -> Store:
    return Store(Storage(root))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(STREAMS, thread_name_prefix="checkpoint-read")
