"""Bytes of a text file as UTF-8 lines: decompressed, decoded, its line ends made one. Streams, in bounded memory."""

import codecs
import lzma
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from data_loaders.errors import UserError
from data_loaders.prepare.declaration import ENCODINGS
from data_loaders.storage import Storage, is_uri

_CHUNK = 1 << 20
_LONGEST = 1 << 26  # bytes of a line, and more than the characters of bad_rows.LONGEST take
_OPENERS = {"xz": lambda stream, _: lzma.LZMAFile(stream)}  # noqa: SIM115 - the others are pyarrow's
_PLAIN_NAMES = {"bz2": "bzip2"}


def opened(storage: Storage, file: str) -> Any:
    """For reading bytes. Not memory-mapped, as a file that shrinks meanwhile would end the process. Raises ``OSError``."""
    return storage.open(file) if is_uri(file) else open(file, "rb")


def stored(storage: Storage, file: str) -> Iterator[bytes]:
    """The bytes as they lie there."""
    with opened(storage, file) as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def unpacked(where: str, storage: Storage, file: str, compression: str) -> Iterator[bytes]:
    """The decompressed bytes; checksums and ends are checked. ``compression``: as pyarrow calls it, or xz. Raises
    ``UserError`` for data that are damaged or cut off, ``OSError`` where the storage fails."""
    done = 0
    with opened(storage, file) as stream:
        try:
            source = _OPENERS.get(compression, pa.CompressedInputStream)(stream, compression)
            while chunk := source.read(_CHUNK):
                done += len(chunk)
                yield chunk
        except (EOFError, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            cut = isinstance(error, EOFError) or "Truncated" in str(error)
            raise UserError(
                f"{where}: '{file}' is {'cut off' if cut else 'damaged'}: its {_PLAIN_NAMES.get(compression, compression)} "
                f"data cannot be decompressed to their end ({done:,} bytes can); copy or download the file again"
            ) from error


def without(parts: Iterator[bytes], mark: int) -> Iterator[bytes]:
    """All but the first ``mark`` bytes."""
    yield next(parts, b"")[mark:]
    yield from parts


def with_line_feeds(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Every line ends in a line feed, whether it ended in a carriage return, a line feed or both."""
    held = b""
    for chunk in parts:
        chunk = held + chunk
        held = b"\r" if chunk.endswith(b"\r") else b""  # a line feed may follow
        yield chunk[: len(chunk) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if held:
        yield b"\n"


def lines(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their line feeds. Of one that is longer than any reader takes, the beginning alone."""
    rest, held = [], 0
    for chunk in parts:
        first, *others = chunk.split(b"\n")
        if held < _LONGEST:
            rest.append(first)
            held += len(first)
        for line in others:
            yield _joined(rest, held)
            rest, held = [line], len(line)
    if held:
        yield _joined(rest, held)


def _joined(parts: list[bytes], size: int) -> bytes:
    """A line, without a last character that may be cut."""
    line = b"".join(parts)
    if size < _LONGEST:
        return line
    begins = next((place for place in range(1, 5) if line[-place] & 0xC0 != 0x80), 0)
    return line[:-begins] if begins else line


def as_utf8(where: str, file: str, codec: str, parts: Iterator[bytes]) -> Iterator[bytes]:
    """Text of another encoding. Raises ``UserError``, with the line, for bytes that it does not have, for those of
    latin-1 that are characters in cp1252 only, and for text that is really UTF-8."""
    decoder, check, line = codecs.getincrementaldecoder(codec)(), _Utf8Check(), 1
    for chunk in parts:
        check.feed(chunk)
        text = _decoded(where, file, codec, decoder, chunk, line)
        _check_controls(where, file, codec, text, line)
        yield text.encode("utf-8", "surrogatepass")
        line += text.count("\n")
    _decoded(where, file, codec, decoder, b"", line)
    if check.is_utf8 and not codec.startswith("utf-"):
        raise UserError(
            f"{where}: '{file}' is utf-8, and {codec} is declared, which makes several characters of each accented one: "
            f"{where}.encoding=utf-8"
        )


class _Utf8Check:
    """Whether bytes are UTF-8 with characters beyond ASCII, which text of another encoding is by accident alone never."""

    def __init__(self) -> None:
        self._decoder, self._valid, self._ascii = codecs.getincrementaldecoder("utf-8")(), True, True

    def feed(self, chunk: bytes) -> None:
        self._ascii = self._ascii and chunk.isascii()
        if self._valid:
            try:
                self._decoder.decode(chunk)
            except UnicodeDecodeError:
                self._valid = False

    @property
    def is_utf8(self) -> bool:
        return self._valid and not self._ascii


def _decoded(where: str, file: str, codec: str, decoder: codecs.IncrementalDecoder, chunk: bytes, line: int) -> str:
    """The chunk, or the end of all (no bytes)."""
    try:
        return decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].decode(codec, "ignore").count("\n")
        raise UserError(
            f"{where}: '{file}', line {line:,}: byte 0x{error.object[error.start]:02x} is not {codec}: declare "
            f"another {where}.encoding ({', '.join(ENCODINGS)}), or mend the file"
        ) from error


def _check_controls(where: str, file: str, codec: str, text: str, line: int) -> None:
    """Between 0x80 and 0x9f latin-1 has control characters, which no text has, and cp1252 its quotes and the euro."""
    if codec != "latin-1" or text.isascii():
        return
    for place, character in enumerate(text):
        if "\x80" <= character <= "\x9f":
            raise UserError(
                f"{where}: '{file}', line {line + text.count(chr(10), 0, place):,}: byte 0x{ord(character):02x} is a control "
                f"character in latin-1: the file is cp1252 (Windows) rather, {where}.encoding=cp1252"
            )


def utf8_line(where: str, file: str, number: int, line: bytes) -> str:
    """A line of UTF-8. Raises ``UserError`` for other bytes, with the encoding that they may be."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        near = line[max(0, error.start - 12) : error.end + 12]
        codec = "latin-1"
        if any(0x80 <= byte <= 0x9F for byte in near):
            codec = "cp1252"
        raise UserError(
            f"{where}: '{file}', line {number:,}: byte 0x{line[error.start]:02x} is not utf-8: declare the file's encoding, such "
            f"as {where}.encoding={codec} (it would read {near.decode(codec, 'replace')!r} there), or mend the file"
        ) from error
