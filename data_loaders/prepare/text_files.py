"""What a text file is, by its first bytes: how it is compressed and in which encoding. Its name is not believed."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_loaders.errors import UserError
from data_loaders.prepare import decoding
from data_loaders.prepare.declaration import Source
from data_loaders.storage import Storage

_HEAD = 1 << 16  # bytes that are looked at
_TAIL = 64
# First bytes -> the compression.
_COMPRESSIONS = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
_READ = "gzip, zstd, bzip2, xz and lz4 are read"
_PAGE = ("a web page (an error page in the place of the file?)", "download the file again")
# First bytes -> what it is, what to do.
_FOREIGN = {
    b"\xff\x06\x00\x00sNaPpY": ("compressed with snappy", f"compress it anew ({_READ})"),
    b"PK\x03\x04": ("a zip archive", f"unpack it ({_READ})"),
    b"PK\x05\x06": ("an empty zip archive", "leave it out"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", f"unpack it ({_READ})"),
    b"Rar!\x1a\x07": ("a rar archive", f"unpack it ({_READ})"),
    b"\x1f\x9d": ("compressed with compress (.Z)", f"compress it anew ({_READ})"),
    b"PAR1": ("Parquet", "declare it: sources.{name}.format=parquet"),
    b"ORC": ("ORC", "convert it to Parquet"),
    b"Obj\x01": ("Avro", "convert it to Parquet"),
    b"ARROW1": ("Arrow IPC (Feather)", "convert it to Parquet"),
    b"SQLite format 3\x00": ("an SQLite database", "export its table as CSV or Parquet"),
    b"%PDF-": ("a PDF document", "name the data files alone"),
    b"\x89HDF\r\n": ("HDF5", "convert it to Parquet"),
    b"\x93NUMPY": ("a NumPy array", "convert it to Parquet"),
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
}
# UTF-32 before UTF-16: its little-endian mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Which bytes of four are zero in ASCII text.
_ZEROS = {"utf-32-le": "0111", "utf-32-be": "1110", "utf-16-le": "0101", "utf-16-be": "1010"}


@dataclass(frozen=True)
class TextFile:
    """``compression``: a key of ``_COMPRESSIONS``' values; empty for none. ``codec``: Python's name of the encoding.
    ``mark``: bytes of the byte order mark. ``lone_returns``: its lines end in a carriage return alone."""

    storage: Storage = field(repr=False, compare=False)
    name: str
    compression: str = ""
    codec: str = "utf-8"
    mark: int = 0
    lone_returns: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether its bytes are lines of UTF-8 as they lie there."""
        return not (self.compression or self.mark or self.lone_returns) and self.codec == "utf-8"


def sniff(name: str, source: Source, storage: Storage, file: str) -> TextFile | None:
    """Looks at the beginning of a file of ``sources.<name>``; None for an empty one. Raises ``UserError`` for what is no
    text, for another encoding than declared, and for compressed data that are damaged at the beginning."""
    where = f"sources.{name}"
    head, tail = _ends(storage, file)
    _check_kind(name, file, head)
    compression = _compression(head)
    if compression:
        head = next(decoding.unpacked(where, storage, file, compression), b"")[:_HEAD]
        _check_kind(name, file, head)
        if _compression(head):
            raise UserError(f"{where}: '{file}' is compressed twice: decompress it once ({_READ})")
    mark, marked = next(((len(mark), codec) for mark, codec in _MARKS.items() if head.startswith(mark)), (0, ""))
    if len(head) < _HEAD and not head[mark:].strip():
        return None
    codec = _codec(where, source, file, head, marked, b"" if compression else tail)
    text = head[mark:].decode(codec, "ignore")
    return TextFile(storage, file, compression, codec, mark, "\r" in text[:-1] and "\n" not in text)


def chunks(name: str, file: TextFile, *, line_feeds: bool = False) -> Iterator[bytes]:
    """The text as UTF-8 without a byte order mark, in chunks that end anywhere. ``line_feeds``: every line ends in one
    (in a file with ``lone_returns`` it does in any case). Raises ``UserError`` for what cannot be decompressed or decoded;
    bytes that are no UTF-8 where that is declared are left to the reader."""
    where, place = f"sources.{name}", (file.storage, file.name)
    text = decoding.unpacked(where, *place, file.compression) if file.compression else decoding.stored(*place)
    text = decoding.without(text, file.mark)
    if file.codec != "utf-8":
        text = decoding.as_utf8(where, file.name, file.codec, text)
    return decoding.with_line_feeds(text) if line_feeds or file.lone_returns else text


def lines(name: str, file: TextFile) -> Iterator[bytes]:
    """The text's lines as UTF-8, without their ends."""
    return decoding.lines(chunks(name, file, line_feeds=True))


def has_mixed_line_ends(name: str, file: TextFile) -> bool:
    """Reads the whole file. (Where a chunk ends between the two characters of a line end this may be wrong.)"""
    both = feeds = returns = 0
    for chunk in chunks(name, file):
        pairs = chunk.count(b"\r\n")
        both, feeds, returns = both + pairs, feeds + chunk.count(b"\n") - pairs, returns + chunk.count(b"\r") - pairs
    return (both > 0) + (feeds > 0) + (returns > 0) > 1


def _compression(head: bytes) -> str:
    return next((kind for magic, kind in _COMPRESSIONS.items() if head.startswith(magic)), "")


def _check_kind(name: str, file: str, head: bytes) -> None:
    begin = head.lstrip()[:32].lower() if head.lstrip().startswith(b"<") else head
    kind = next((kind for magic, kind in _FOREIGN.items() if begin.startswith(magic)), None)
    if kind is None and head[257:262] == b"ustar":
        kind = ("a tar archive", f"unpack it ({_READ})")
    if kind is not None:
        what, remedy = kind
        raise UserError(f"sources.{name}: '{file}' is {what}, not text: {remedy.format(name=name)}")


def _ends(storage: Storage, file: str) -> tuple[bytes, bytes]:
    """The first and the last bytes."""
    with decoding.opened(storage, file) as stream:
        head = stream.read(_HEAD)
        stream.seek(max(0, stream.seek(0, 2) - _TAIL))
        return head, stream.read()


def _codec(where: str, source: Source, file: str, head: bytes, marked: str, tail: bytes) -> str:
    """The declared encoding with its byte order. Raises ``UserError`` where the bytes speak against it."""
    found, declared = marked or _by_zeros(head), source.encoding
    if found and found.startswith(declared):
        return found
    if found:
        family = found.removesuffix("-le").removesuffix("-be")
        raise UserError(
            f"{where}: '{file}' is {family}, and {declared} is declared: {where}.encoding={family}, or convert the file"
        )
    if declared.startswith(("utf-16", "utf-32")):
        return _wide(where, declared, file, head)
    if 0 in head or 0 in tail:
        end = "ends in" if 0 not in head else "holds"
        raise UserError(
            f"{where}: '{file}' {end} zero bytes, which text has not: it is damaged, or another format; copy it again, or "
            f"leave it out of {where}.files"
        )
    return declared


def _wide(where: str, declared: str, file: str, head: bytes) -> str:
    """The byte order of UTF-16 and UTF-32 without a mark, whose commas, digits and line ends have zero bytes."""
    odd, even = head[1::2].count(0), head[::2].count(0)
    if not odd + even:
        raise UserError(f"{where}: '{file}' is not {declared}, as {where}.encoding says: utf-8?")
    return f"{declared}-{'le' if odd >= even and not head.startswith(bytes(1)) else 'be'}"


def _by_zeros(head: bytes) -> str:
    """The encoding of text without a mark that is mostly ASCII, by where its zero bytes lie."""
    size = len(head) // 4
    if not size or 0 not in head:
        return ""
    zeros = [head[place : 4 * size : 4].count(0) / size for place in range(4)]
    for codec, shape in _ZEROS.items():
        if all(zero > 0.7 if wanted == "1" else zero < 0.05 for zero, wanted in zip(zeros, shape)):
            return codec
    return ""
