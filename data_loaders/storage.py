"""Files in folders of this machine and in object stores, under one kind of name.

A *root* is a local folder or a URI such as ``s3://bucket/prefix``; a *name* is a file's full name, a local absolute path
or ``scheme://authority/key``. pyarrow reads s3, gs, abfs, hdfs and file by itself; any other scheme that an installed
fsspec plug-in knows goes through that. Options of a file system follow a root's ``?``, as pyarrow defines them:
``s3://bucket/prefix?endpoint_override=http%3A//localhost:9000&scheme=http`` or ``…?region=eu-west-1``; an S3 endpoint may
also stand in ``AWS_ENDPOINT_URL``. What follows ``scheme://authority/`` is taken literally, as ``aws s3`` does: no
``%20``, and in a path ``?`` is a glob's. Credentials come from the environment, configuration files or the instance's
role, and are never part of a URI: it would end up in logs and recorded configurations.

An operation with a transient error (timeout, lost connection, "slow down", EIO) is tried ``ATTEMPTS`` times in all, with
growing pauses; then comes a ``StorageError``. pyarrow's S3 client retries each request a few times by itself.
"""

import contextlib
import errno
import fnmatch
import glob
import logging
import os
import posixpath
import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote

import fsspec
import pyarrow as pa
from pyarrow import fs

from data_loaders.errors import UserError
from data_loaders.messages import one_line
from data_loaders.secrets import holds_credentials

T = TypeVar("T")
ATTEMPTS = 5
_SUFFIX = ".parquet"
_FIRST_PAUSE = 0.5  # seconds; doubled from attempt to attempt, and shortened at random by up to a half
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/?]*)(.*)", re.DOTALL)
_TRANSIENT_NUMBERS = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EAGAIN", "EINTR", "EBUSY", "ESTALE", "ETIMEDOUT", "ENETDOWN", "ENETUNREACH", "ENETRESET"),
        *("ECONNABORTED", "ECONNRESET", "ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH", "EPIPE", "EREMOTEIO"),
    )
    if hasattr(errno, name)
)
# Clients of object stores say it in words: "AWS Error SLOW_DOWN", "curlCode: 28, Timeout was reached", "HTTP status 503".
_TRANSIENT_WORDS = re.compile(
    r"timed?.?out|connection|network|curlCode|slow.?down|throttl|too.many.requests|unavailable|internal.(error|failure)"
    r"|temporar|try.again|HTTP\D{0,20}\b(408|429|5\d\d)\b",
    re.IGNORECASE,
)
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_LOG = logging.getLogger(__name__)


class NoParquetError(UserError):
    """A folder has no Parquet file."""


class StorageError(OSError):
    """A file could not be read for now: all attempts were used up, or it is gone. To start again is safe and loses
    nothing, as a run resumes from its checkpoint."""


@dataclass(frozen=True)
class Stat:
    """A file's metadata: ``name`` in full, ``size`` in bytes, ``mtime_ns`` since 1970 (0 where the storage
    reports none)."""

    name: str
    size: int
    mtime_ns: int


class Storage:
    """The files under one root, and under any other name given in full. Threads may share it."""

    def __init__(self, root: str) -> None:
        """``root``: a local folder or a URI. Raises ``UserError`` for an unknown scheme, a missing plug-in (naming what to
        install), an option the file system does not have, and credentials in the URI."""
        self.root = root_name(root)
        self._scheme, self._query = "", ""
        if is_uri(self.root):
            self._scheme, _, rest = _parts(root)
            self._query = rest.partition("?")[2]
        self._lock = threading.Lock()
        self._mounts: dict[tuple[str, str], _Mount] = {}
        self._warned: set[str] = set()
        if self._scheme:
            self._mount(self.root)

    @property
    def local(self) -> bool:
        """Whether the root is a folder of this machine."""
        return not self._scheme

    def expand(self, paths: Iterable[str]) -> list[Stat]:
        """The files that ``paths`` stand for: files, folders (the ``*.parquet`` below them) and globs of both as in Python's
        ``glob`` with ``**``, relative to the root or full names. Each path's files come sorted, each file once. Raises
        ``UserError`` for a path without files, ``StorageError`` where the storage does not answer."""
        found: dict[str, Stat] = {}
        for path in paths:
            name = self._absolute(path)
            try:
                files = self.retries(name).run(partial(self._expand, name))
            except StorageError:
                raise
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"data path '{name}' cannot be read ({error}): check data.root and the path") from error
            for file in files:
                found.setdefault(file.name, file)
        return list(found.values())

    def stands_for(self, path: str, name: str) -> bool:
        """Whether ``path``, as for ``expand``, means the local Parquet file ``name`` too, be it there or not yet."""
        pattern = self._absolute(path)
        if is_uri(pattern):
            return False
        parts, wanted = (os.path.realpath(each).strip("/").split("/") for each in (name, pattern))
        return _below(parts, wanted)

    def stat(self, name: str) -> Stat:
        """Raises ``OSError``, ``FileNotFoundError`` among them."""
        if not is_uri(name):
            found = os.stat(name)
            return Stat(name, found.st_size, found.st_mtime_ns)
        mount, path = self._mount(name)
        info = mount.filesystem.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(errno.ENOENT, "No such file", name)
        return mount.stat(info)

    def open(self, name: str) -> pa.NativeFile:
        """For random access. Raises ``OSError``."""
        mount, path = self._mount(name)
        return mount.filesystem.open_input_file(path)

    def sizes_below(self, name: str) -> dict[str, int]:
        """Bytes of every file in and below a folder, by its name from there on; nothing where it does not exist. Raises
        ``OSError``."""
        mount, path = self._mount(name)
        folder = path.strip("/")
        try:
            files = mount.files_below(path)
        except FileNotFoundError:
            return {}
        return {info.path.strip("/")[len(folder) :].lstrip("/"): info.size for info in files}

    def create(self, name: str) -> pa.NativeFile:
        """For writing, one byte after the other; in an object store it is there, in place of another, once it is closed.
        Raises ``OSError``."""
        mount, path = self._mount(name)
        try:
            return mount.filesystem.open_output_stream(path)
        except FileNotFoundError:  # a plug-in whose folders are more than parts of names
            mount.filesystem.create_dir(posixpath.dirname(path))
            return mount.filesystem.open_output_stream(path)

    def delete(self, name: str) -> None:
        """Raises ``OSError``, ``FileNotFoundError`` among them."""
        mount, path = self._mount(name)
        mount.filesystem.delete_file(path)

    def delete_folder(self, name: str) -> None:
        """With all below it, whether it exists or not. Raises ``OSError``."""
        mount, path = self._mount(name)
        with contextlib.suppress(FileNotFoundError):
            mount.filesystem.delete_dir(path)

    def retries(self, name: str, where: str | None = None) -> "Retries":
        """The attempts of one operation on a file; ``where`` says more than its name."""
        return Retries(where or f"'{name}'", lambda error: self._warn(name, error))

    def _warn(self, name: str, error: BaseException) -> None:
        with self._lock:
            if name in self._warned:
                return
            self._warned.add(name)
        _LOG.warning("'%s': trying again after: %s (said once per file)", name, one_line(error))

    def _absolute(self, path: str) -> str:
        alone = is_uri(path) or os.path.isabs(path)
        return path_name(path if alone else f"{self.root}/{path}")

    def _mount(self, name: str) -> tuple["_Mount", str]:
        """The file system of a name, and its path there."""
        if not is_uri(name):
            scheme, authority, rest = "", "", name
        else:
            scheme, authority, rest = _parts(name)
        with self._lock:
            mount = self._mounts.get((scheme, authority))
        if mount is None:
            query = self._query if scheme == self._scheme else ""
            mount = self.retries(name).run(lambda: _make_mount(scheme, authority, query))
            with self._lock:
                self._mounts[scheme, authority] = mount
        return mount, mount.base + rest

    def _expand(self, name: str) -> list[Stat]:
        mount, path = self._mount(name)
        info = mount.filesystem.get_file_info(path)
        # A file first: a name may well contain '[' or '*'.
        if info.type == fs.FileType.File:
            return [mount.stat(info)]
        if info.type == fs.FileType.Directory:
            infos = [info for info in mount.files_below(path) if info.path.endswith(_SUFFIX)]
        else:
            infos = _glob(mount, path) if glob.has_magic(path) else []
        if not infos:
            raise _nothing(name, is_folder=info.type == fs.FileType.Directory)
        return sorted(map(mount.stat, infos), key=lambda stat: stat.name)


class Retries:
    """Counts the attempts of one operation, and pauses between them."""

    def __init__(self, where: str, warn: Callable[[BaseException], None]) -> None:
        self._where, self._warn = where, warn
        self._failed = 0

    def run(self, work: Callable[[], T]) -> T:
        """``work()``; raises what it raises, or ``StorageError``."""
        while True:
            try:
                return work()
            except OSError as error:
                self.again(error)

    def again(self, error: OSError) -> None:
        """Waits before another attempt. Raises ``error`` where that would not help, ``StorageError`` where there have
        been enough."""
        if not is_transient(error):
            raise error
        self._failed += 1
        if self._failed == ATTEMPTS:
            raise StorageError(
                f"{self._where}: storage failed {ATTEMPTS} times, the last time with: {error}. Start the same command "
                "again once the storage works: the run resumes from its last checkpoint"
            ) from error
        self._warn(error)
        time.sleep(_FIRST_PAUSE * 2 ** (self._failed - 1) * random.uniform(0.5, 1.0))


def is_transient(error: BaseException) -> bool:
    """Whether to try again may help: not for missing files, refused access and damaged content."""
    if not isinstance(error, OSError) or isinstance(error, (StorageError, *_PERMANENT)):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)) or error.errno in _TRANSIENT_NUMBERS:
        return True
    return error.errno is None and _TRANSIENT_WORDS.search(str(error)) is not None


# Names


def is_uri(name: str) -> bool:
    return _URI.match(name) is not None


def root_name(root: str) -> str:
    """The name of a root: absolute, normal (no ``..``, no ``/`` at the end), without its options. Raises ``UserError``
    where a URI holds credentials."""
    if not is_uri(root):
        return path_name(root)
    if holds_credentials(root):
        raise _credentials(root)
    return path_name(root.partition("?")[0])


def path_name(path: str) -> str:
    """Likewise, of a path without options."""
    if not is_uri(path):
        return os.path.abspath(path)
    scheme, authority, rest = _parts(path)
    if holds_credentials(path) or (scheme in ("s3", "gs", "gcs") and ":" in authority):
        raise _credentials(path)
    if scheme == "file":
        return os.path.abspath(unquote(rest))
    key = posixpath.normpath(rest.lstrip("/")) if rest.strip("/") else "."
    return f"{scheme}://{authority}" + ("" if key == "." else f"/{key}")


def relative_name(name: str, root: str) -> str:
    """``name`` from ``root`` (both as ``root_name`` gives them) on, with ``/``; in full where it is elsewhere."""
    prefix = root.rstrip("/") + "/"
    if name.startswith(prefix):
        return name[len(prefix) :].replace(os.sep, "/")
    if is_uri(name) or is_uri(root):
        return name
    return os.path.relpath(name, root).replace(os.sep, "/")


def full_name(relative: str, root: str) -> str:
    """The inverse of ``relative_name``."""
    if is_uri(relative) or os.path.isabs(relative):
        return relative
    return f"{root}/{relative}" if is_uri(root) else os.path.normpath(os.path.join(root, relative))


def _parts(uri: str) -> tuple[str, str, str]:
    """Scheme, authority, and the rest with its leading ``/``."""
    scheme, authority, rest = _URI.match(uri).groups()
    return scheme.lower(), authority, rest


def _credentials(uri: str) -> UserError:
    return UserError(
        f"a {_parts(uri)[0]}:// address holds credentials (not shown here): leave them out, and give them by environment "
        "variables (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, …) or the machine's role"
    )


# File systems


class _Mount:
    """A file system; ``base`` is its path for ``origin`` (``scheme://authority``); ``plug_in`` is fsspec's, if it is one."""

    def __init__(self, filesystem: fs.FileSystem, base: str, origin: str, plug_in: Any = None) -> None:
        self.filesystem, self.base, self.origin = filesystem, base.rstrip("/"), origin
        self._plug_in = plug_in

    def stat(self, info: fs.FileInfo) -> Stat:
        # A plug-in's paths may lack the leading slash.
        path = info.path if info.path.startswith(self.base) else f"/{info.path}"
        name = f"{self.origin}/{path[len(self.base) :].lstrip('/')}"
        return Stat(name, info.size, self._modified(info))

    def listing(self, folder: str) -> list[fs.FileInfo]:
        """A folder's entries; none where it does not exist."""
        try:
            if not self.origin:  # links to nothing included
                return self.filesystem.get_file_info([os.path.join(folder, name) for name in os.listdir(folder)])
            if self._plug_in is None:
                return self.filesystem.get_file_info(fs.FileSelector(folder))
            return [_info(entry) for entry in self._plug_in.ls(folder, detail=True)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def files_below(self, folder: str) -> list[fs.FileInfo]:
        if not self.origin:
            return self._local_files_below(folder)
        if self._plug_in is None:
            infos = self.filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
            return [info for info in infos if info.type == fs.FileType.File]
        infos = self.listing(folder)
        folders = [info.path for info in infos if info.type == fs.FileType.Directory]
        files = [info for info in infos if info.type == fs.FileType.File]
        return files + [info for below in folders for info in self.files_below(below)]

    def _local_files_below(self, folder: str) -> list[fs.FileInfo]:
        """Links to folders are not followed: there may be circles."""

        def fail(error: OSError) -> None:
            raise error

        walk = os.walk(folder, onerror=fail)
        names = (os.path.join(inside, name) for inside, _, names in walk for name in names)
        return _files(self.filesystem.get_file_info([name for name in names if name.endswith(_SUFFIX)]))

    def _modified(self, info: fs.FileInfo) -> int:
        """Of plug-ins, each has its own name for it."""
        if self._plug_in is None:
            return info.mtime_ns or 0
        try:
            return int(self._plug_in.modified(info.path).timestamp() * 1e9)
        except NotImplementedError:
            return 0


def _files(infos: Iterable[fs.FileInfo]) -> list[fs.FileInfo]:
    """Without folders. Raises ``FileNotFoundError`` for a link to nothing."""
    found = [info for info in infos if info.type in (fs.FileType.File, fs.FileType.NotFound)]
    for info in found:
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(errno.ENOENT, "A link to nothing", info.path)
    return found


def _info(entry: dict[str, Any]) -> fs.FileInfo:
    kinds = {"file": fs.FileType.File, "directory": fs.FileType.Directory}
    kind = kinds.get(entry["type"], fs.FileType.Unknown)
    return fs.FileInfo(entry["name"].rstrip("/"), kind, size=entry.get("size"))


def _make_mount(scheme: str, authority: str, query: str) -> _Mount:
    if not scheme:
        # Not mapped into memory: a mapped file that somebody cuts short ends the process by SIGBUS.
        return _Mount(fs.LocalFileSystem(), "", "")
    origin = f"{scheme}://{authority}"
    try:
        filesystem, base = fs.FileSystem.from_uri(f"{origin}/" + (f"?{query}" if query else ""))
        return _Mount(filesystem, base, origin)
    except (pa.ArrowNotImplementedError, ImportError):  # left out of this build of pyarrow
        return _plug_in(scheme, origin, query)
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem type" in str(error):
            return _plug_in(scheme, origin, query)
        raise UserError(f"'{origin}' cannot be opened ({error}): correct the address") from error
    except OSError as error:
        if is_transient(error):
            raise
        hint = "; it needs Java and Hadoop's libhdfs (JAVA_HOME, HADOOP_HOME)" if scheme == "hdfs" else ""
        raise UserError(f"'{origin}' cannot be opened ({error}): check the address{hint}") from error


def _plug_in(scheme: str, origin: str, query: str) -> _Mount:
    """A file system of fsspec; a root's options are its arguments."""
    try:
        # A listing kept by the plug-in would hide that a file has changed.
        plug_in, base = fsspec.core.url_to_fs(f"{origin}/", use_listings_cache=False, **dict(parse_qsl(query)))
    except ImportError as error:
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        package = (cause.name or "").split(".")[0] or f"the fsspec plug-in for {scheme}"
        raise UserError(f"'{origin}': {scheme}:// needs a package that is not here: pip install {package}") from error
    except (ValueError, TypeError) as error:
        raise UserError(
            f"'{origin}' cannot be opened ({error}): use a local path, s3://, gs://, abfs:// or hdfs://, or pip install "
            f"the fsspec plug-in for {scheme}://"
        ) from error
    return _Mount(fs.PyFileSystem(fs.FSSpecHandler(plug_in)), base, origin, plug_in)


# Folders and globs. By hand: fsspec's walk, find and glob (ArrowFSWrapper's among them, and pyarrow's use of them) leave out
# the folders that they fail to list below the first, whatever on_error says, and glob lists what its pattern rules out.


def _nothing(name: str, *, is_folder: bool) -> UserError:
    if is_folder:
        return NoParquetError(f"data folder '{name}' holds no *{_SUFFIX} file: check the path")
    what = "glob matches no file" if glob.has_magic(name) else "path does not exist"
    options = "; options after '?' belong in data.root" if is_uri(name) and re.search(r"\?\w+=", name) else ""
    return UserError(f"data {what}: '{name}'; check data.root and the path{options}")


def _glob(mount: _Mount, pattern: str) -> list[fs.FileInfo]:
    """The files that a pattern matches, as ``glob.glob(…, recursive=True)`` finds them, and the ``*.parquet`` below the
    folders that it matches: folder by folder, so that a large bucket is not listed whole."""
    parts = pattern.split("/")
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    folders = ["/".join(parts[:fixed]) or "/"]
    for part in parts[fixed:-1]:
        folders = [found for folder in folders for found in _subfolders(mount, folder, part)]
    last = parts[-1]
    if last == "**":
        folders, last = [found for folder in folders for found in _subfolders(mount, folder, "**")], "*"
    inside = (info for folder in folders for info in mount.listing(folder))
    matched = {info.path: info for info in inside if _matches(info.base_name, last)}
    below = (mount.files_below(path) for path, info in matched.items() if info.type == fs.FileType.Directory)
    found = {info.path: info for files in below for info in files if info.path.endswith(_SUFFIX)}
    return list({**found, **{info.path: info for info in _files(matched.values())}}.values())


def _subfolders(mount: _Mount, folder: str, part: str) -> list[str]:
    if part == "**":  # any number of folders, none included
        below = _subfolders(mount, folder, "*")
        return [folder, *(found for each in below for found in _subfolders(mount, each, "**"))]
    if not glob.has_magic(part):
        return [f"{folder}/{part}"]
    infos = mount.listing(folder)
    return [info.path for info in infos if info.type == fs.FileType.Directory and _matches(info.base_name, part)]


def _below(parts: list[str], pattern: list[str]) -> bool:
    """Whether a name matches, or a folder above it."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_below(parts[first:], pattern[1:]) for first in range(len(parts) + 1))
    same = bool(parts) and (parts[0] == pattern[0] or _matches(parts[0], pattern[0]))
    return same and _below(parts[1:], pattern[1:])


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) and (not name.startswith(".") or pattern.startswith("."))
