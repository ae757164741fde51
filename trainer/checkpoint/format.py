"""A checkpoint's tensors: pieces written by each rank, an index that says what they are parts of, and their reader.

The index names every tensor once, with one shape whatever the plan (``trainer.sharding.model_state``), and lists the
rectangles it was saved in: file, key, offset, shape. A reader cuts what it is asked for out of these, so a job may be
sharded in any other way than the one that saved. No file of a checkpoint is unpickled or executed, and
torch.distributed is not needed.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from data_loaders.errors import UserError
from data_loaders.state_files import json_text
from trainer.checkpoint.digest import DIGEST
from trainer.checkpoint.manifest import (
    FACTS,
    INDEX,
    MANIFEST,
    check_listing,
    check_text_size,
    fingerprint,
    hashing,
    is_plain,
    read_json,
    read_manifest,
    read_text,
)
from trainer.checkpoint.paths import AnyPath, Unreachable
from trainer.checkpoint.piece import Piece
from trainer.checkpoint.place import place_of
from trainer.checkpoint.tensor_file import (
    CODES,
    LARGEST_SIZE,
    SLAB_BYTES,
    NotFiniteError,
    sizes,
)
from trainer.runtime.checked_json import parse_json

VERSION = 1
CLOCK = "clock"  # the kind of tensors that an option adds to any run (trainer.optim.row_clock)
MOST_CUT = 2  # dimensions of a tensor that parts are cut along: rows and columns
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}


@dataclass(frozen=True)
class Written:
    """A file of pieces: its size, its digest, and by tensor name what the index will say of it."""

    bytes: int
    digest: str
    entries: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Part:
    """A rectangle of a tensor, and where it was saved."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor of the index; its parts cover it exactly once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    widths: tuple[int, ...] | None
    parts: tuple[Part, ...]


def write_pieces(path: AnyPath, pieces: Sequence[Piece], tensors: Sequence[Tensor] | None = None) -> Written:
    """Writes this rank's ``written`` pieces to one new file and returns once it is on disk. ``tensors`` are copies, one
    for each of ``pieces``, to write in place of the live ones.

    Raises ``UserError``, naming the tensor and the place in it, where a floating value is not finite; ``OSError``.
    """
    live = [piece.tensor for piece in pieces] if tensors is None else tensors
    assert len(live) == len(pieces), (len(live), len(pieces))
    entries: dict[str, dict[str, Any]] = {}
    data: dict[str, Tensor] = {}
    places: dict[str, Piece] = {}
    for piece, tensor in zip(pieces, live):
        if not piece.written:
            continue
        entry = entries.setdefault(piece.name, _described(piece, tensor))
        if tensor.numel():  # an empty part has nothing to save
            key = f"{piece.name}@{','.join(map(str, piece.offset))}"
            assert key not in data, f"two pieces {key}"
            entry["pieces"].append({"key": key, "offset": list(piece.offset), "shape": list(tensor.shape)})
            data[key], places[key] = tensor, piece
    try:
        size, digest = place_of(path).write_tensors(path, data)
    except NotFiniteError as error:
        raise _not_finite(error, places[error.key]) from None
    return Written(size, digest, entries)


def build_index(parts: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The index of a checkpoint from every rank's (file name, ``Written`` as a dict). Raises ``UserError`` where the
    pieces of a tensor disagree or do not cover it exactly once."""
    tensors: dict[str, dict[str, Any]] = {}
    for file, written in parts:
        for name, entry in written["entries"].items():
            known = tensors.setdefault(name, {**entry, "pieces": []})
            if {**entry, "pieces": known["pieces"]} != known:
                raise UserError(f"{file}: {name} has another shape, dtype or widths than on another rank")
            known["pieces"] += [{"file": file, **piece} for piece in entry["pieces"]]
    index = {"version": VERSION, "tensors": dict(sorted(tensors.items()))}
    parse_index(index, {file for file, _ in parts})
    return index


def write_commit_files(
    folder: AnyPath, parts: Sequence[tuple[str, Mapping[str, Any]]], facts: Mapping[str, Any], texts: Mapping[str, str]
) -> None:
    """Makes a folder that holds every rank's file a checkpoint: index, facts, texts and, last, the manifest; all of it on
    disk when this returns. Raises ``OSError``; ``UserError`` as ``build_index``."""
    place = place_of(folder)
    sizes = place.sizes(folder)
    for name, written in parts:
        if sizes.get(name) != written["bytes"]:
            raise OSError(
                f"{folder / name} is not as its rank wrote it: checkpoints need a folder that all ranks share"
            )
    assert all(map(is_plain, texts)) and not {FACTS, INDEX, *(name for name, _ in parts)} & set(texts), list(texts)
    texts = {INDEX: json.dumps(build_index(parts)), FACTS: json_text(facts), **texts}
    for name, text in texts.items():
        check_text_size(name, len(text.encode()))
    manifest = {name: {"bytes": written["bytes"], DIGEST: written["digest"]} for name, written in parts}
    for name, text in texts.items():
        place.write(folder / name, text)
        manifest[name] = fingerprint(folder / name)
    place.write(folder / MANIFEST, json_text(manifest))
    place.flush(folder)


def verify(path: AnyPath, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, None where nothing is: its files are those of the manifest, of their sizes and (with
    ``hashes``) bytes, no links among them, and the tensors are where the index says."""
    try:
        manifest = read_manifest(path)
        check_listing(path, manifest)
        problem = next(filter(None, hashing(path, manifest)), None) if hashes else None
        if problem is None:
            for name in manifest:
                if name.endswith(".json") and name != INDEX:
                    read_json(path, name, dict)
            Reader(path).check_files()
    except Unreachable:
        raise
    except (OSError, ValueError) as error:
        return f"not a whole checkpoint ({str(error).removeprefix(f'checkpoint {path}').removeprefix(': ').strip()})"
    return problem


class Reader:
    """Reads tensors of a checkpoint, whole or any rectangle of them, on any device and without other ranks.

    Files are mapped when they are first needed. Raises ``UserError`` where index, manifest and files contradict each
    other; their bytes are for ``verify`` to check.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        text = read_text(path, INDEX)
        try:
            self.entries = parse_index(parse_json(text), read_manifest(path))
        except ValueError as error:
            raise UserError(f"checkpoint {path}: {INDEX} {error}") from None
        self._place = place_of(path)
        self._files: dict[str, Any] = {}
        self._expected: dict[str, dict[str, Any]] = {}  # file: key: dtype and shape
        for entry in self.entries.values():
            for part in entry.parts:
                self._expected.setdefault(part.file, {})[part.key] = (entry.dtype, part.shape)

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].dtype

    def widths(self, name: str) -> tuple[int, ...] | None:
        return self.entries[name].widths

    def files(self, name: str) -> list[str]:
        """The files that hold parts of a tensor."""
        return sorted({part.file for part in self.entries[name].parts})

    def read(self, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor, or its rectangle of ``shape`` at ``offset``, as a new CPU tensor."""
        entry = self.entries.get(name)
        if entry is None:
            raise UserError(f"checkpoint {self.path} holds no tensor {name!r:.200}")
        offset = (0,) * len(entry.shape) if offset is None else offset
        shape = tuple(whole - start for whole, start in zip(entry.shape, offset)) if shape is None else shape
        assert _inside(offset, shape, entry.shape), (name, offset, shape, entry.shape)
        target = torch.empty(shape, dtype=entry.dtype)
        self._assemble(entry, offset, target)
        return target

    def load(self, pieces: Sequence[Piece], weights_only: bool = False) -> list[str]:
        """Fills every piece's tensor in place, on whatever device; returns a line for each tensor whose widths were
        converted.

        Raises ``UserError``, before anything is written, unless the pieces' names are exactly the saved ones of their
        kinds (the part before the first /; with ``weights_only`` all weights of tables and all dense tensors), shapes
        and dtypes included. A rank that holds nothing of a tensor names it by an empty piece. Clocks may be missing, or be
        more than are wanted: what has no clock keeps the values that it has.
        """
        pieces = [piece for piece in pieces if _kind(piece.name) != CLOCK or piece.name in self.entries]
        wanted = {piece.name for piece in pieces}
        self._check_fit(pieces, wanted, weights_only)
        for file in sorted({file for piece in pieces for file in self.files(piece.name)}):
            self._file(file)
        converted = {}
        for piece in pieces:
            saved = self.entries[piece.name]
            if saved.widths == piece.widths:
                self._assemble(saved, piece.offset, piece.tensor.detach())
            else:
                self._convert(saved, piece)
                converted[piece.name] = f"{piece.name}: widths {list(saved.widths)} -> {list(piece.widths)}"
        return list(converted.values())

    def check_files(self) -> None:
        """Opens every file of tensors. Raises ``UserError`` where one is not as the index has it."""
        for file in self._expected:
            self._file(file)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            try:
                file = self._place.tensors(self.path / name)
            except Unreachable:
                raise
            except (OSError, ValueError) as error:
                raise UserError(f"checkpoint {self.path}: {name} {error}") from None
            if {key: found[:2] for key, found in file.tensors.items()} != self._expected[name]:
                raise UserError(f"checkpoint {self.path}: {name} holds other tensors than {INDEX} says")
            self._files[name] = file
        return self._files[name]

    def _check_fit(self, pieces: Sequence[Piece], wanted: set[str], weights_only: bool) -> None:
        kinds = {_kind(name) for name in wanted}
        saved = {
            name for name in self.entries if (_is_weight(name) if weights_only else _kind(name) in kinds - {CLOCK})
        }
        problems = [f"missing {_few(wanted - set(self.entries))}"] if wanted - set(self.entries) else []
        problems += [f"unknown {_few(saved - wanted)}"] if saved - wanted else []
        differing = {piece.name: text for piece in pieces if (text := self._misfit(piece))}
        problems += [f"{name} {text}" for name, text in list(differing.items())[:5]]
        if problems:
            raise UserError(
                f"checkpoint {self.path} does not fit the model: {'; '.join(problems)}: give the model, tables and "
                "optimizers it was saved with"
            )

    def _misfit(self, piece: Piece) -> str | None:
        assert _inside(piece.offset, tuple(piece.tensor.shape), piece.shape), piece
        entry = self.entries.get(piece.name)
        if entry is None:
            return None
        if entry.dtype != piece.tensor.dtype:
            return f"was {entry.dtype}, is {piece.tensor.dtype}"
        if (entry.widths is None) != (piece.widths is None):
            return f"had widths {entry.widths}, has {piece.widths}"
        saved, shape = (_without_parts(it.shape, it.widths) for it in (entry, piece))
        return f"had shape {saved}, has {shape}" if saved != shape else None

    def _assemble(self, entry: Entry, offset: tuple[int, ...], target: Tensor) -> None:
        """Copies the rectangle at ``offset`` of a tensor, of the shape of ``target``, out of the parts it meets."""
        for part in entry.parts:
            starts = [max(a, b) for a, b in zip(offset, part.offset)]
            ends = [min(a + n, b + m) for a, n, b, m in zip(offset, target.shape, part.offset, part.shape)]
            if all(start < end for start, end in zip(starts, ends)):
                into, out = (
                    tuple(slice(start - o, end - o) for start, end, o in zip(starts, ends, origin))
                    for origin in (offset, part.offset)
                )
                self._file(part.file).copy(part.key, out, target[into])

    def _convert(self, entry: Entry, piece: Piece) -> None:
        """One value for each part of a row becomes one for each of other parts, a slab of rows at a time."""
        row, column = piece.offset
        columns = len(entry.widths)
        target = piece.tensor.detach()
        step = max(1, SLAB_BYTES // (8 * columns))
        for start in range(0, len(target), step):
            slab = target[start : start + step]
            saved = torch.empty(len(slab), columns, dtype=entry.dtype)
            self._assemble(entry, (row + start, 0), saved)
            slab.copy_(convert_widths(saved, entry.widths, piece.widths)[:, column : column + target.shape[1]])


def convert_widths(values: Tensor, saved: tuple[int, ...], wanted: tuple[int, ...]) -> Tensor:
    """[rows, len(saved)] -> [rows, len(wanted)]: each wanted part is the mean of the columns it lies on. Parts of equal
    values keep them to the bit."""
    exact = values.double()
    result = torch.empty(len(values), len(wanted), dtype=torch.float64)
    for number, (start, end) in enumerate(_spans(wanted)):
        shares = [(i, min(end, b) - max(start, a)) for i, (a, b) in enumerate(_spans(saved)) if a < end and start < b]
        first = exact[:, shares[0][0]]
        result[:, number] = first + sum(columns / (end - start) * (exact[:, i] - first) for i, columns in shares)
    return result.to(values.dtype)


def parse_index(index: Any, files: Collection[str]) -> dict[str, Entry]:
    """The tensors of an index whose parts lie in ``files``. Raises ``UserError`` unless every type, shape and offset is
    sound and each tensor covered exactly once."""
    if not isinstance(index, dict) or set(index) != {"version", "tensors"} or not isinstance(index["tensors"], dict):
        raise UserError("is no index of tensors")
    if index["version"] != VERSION:
        raise UserError(f"has version {index['version']!r:.50}; this program reads {VERSION}")
    entries = {name: _entry(name, entry, files) for name, entry in index["tensors"].items()}
    places = Counter((part.file, part.key) for entry in entries.values() for part in entry.parts)
    if repeated := [place for place, count in places.items() if count > 1]:
        raise UserError(f"uses the same data twice: {repeated[:3]!r:.200}")
    return entries


def _entry(name: str, entry: Any, files: Collection[str]) -> Entry:
    if not isinstance(entry, dict) or set(entry) - {"widths"} != {"shape", "dtype", "pieces"}:
        raise UserError(f"describes {name!r:.200} as {entry!r:.200}")
    dtype = DTYPE_NAMES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None or not isinstance(entry["pieces"], list):
        raise UserError(f"gives {name!r:.200} the dtype {entry['dtype']!r:.50} and pieces {entry['pieces']!r:.50}")
    shape = sizes(entry["shape"], f"the shape of {name!r:.200}")
    widths = _widths(name, shape, entry["widths"]) if "widths" in entry else None
    parts = tuple(_part(name, part, files) for part in entry["pieces"])
    _check_cover(name, shape, parts)
    return Entry(shape, dtype, widths, parts)


def _widths(name: str, shape: tuple[int, ...], widths: Any) -> tuple[int, ...]:
    """Columns of the parts of a row: one number for each column of the tensor."""
    listed = isinstance(widths, list) and len(shape) == 2 and len(widths) == shape[1]
    if not listed or not all(type(width) is int and 0 < width < LARGEST_SIZE for width in widths):
        raise UserError(f"gives {name!r:.200} of shape {list(shape)} the widths {widths!r:.200}")
    return tuple(widths)


def _part(name: str, part: Any, files: Collection[str]) -> Part:
    keys = {"file", "key", "offset", "shape"}
    if not isinstance(part, dict) or set(part) != keys or not isinstance(part["key"], str):
        raise UserError(f"describes a piece of {name!r:.200} as {part!r:.200}")
    if not isinstance(part["file"], str) or not is_plain(part["file"]) or part["file"] not in files:
        raise UserError(f"places {name!r:.200} in {part['file']!r:.200}, which is no file of {MANIFEST}")
    offset, shape = (sizes(part[key], f"the {key} of a piece of {name!r:.200}") for key in ("offset", "shape"))
    return Part(part["file"], part["key"], offset, shape)


def _check_cover(name: str, shape: tuple[int, ...], parts: Sequence[Part]) -> None:
    for part in parts:
        if not _inside(part.offset, part.shape, shape) or not math.prod(part.shape):
            raise UserError(f"cuts {name!r:.200} of shape {list(shape)} at {list(part.offset)} by {list(part.shape)}")
    covered, whole = sum(math.prod(part.shape) for part in parts), math.prod(shape)
    if covered < whole:
        raise UserError(f"covers {covered} of the {whole} values of {name!r:.200}: pieces are missing")
    if whole and (wrong := _wrong_corner(shape, parts)) is not None:
        raise UserError(f"has pieces of {name!r:.200} that overlap at {wrong}")


def _wrong_corner(shape: tuple[int, ...], parts: Sequence[Part]) -> list[int] | None:
    """Where boxes within ``shape`` first fail to cover it exactly once, None where they do; in time linear in their number.

    How often boxes cover each place follows from their corners, each counted with its sign (+ at the begin of an axis, -
    at its end): it is the sum of these counts over all corners before the place. So boxes cover what one box covers,
    once, just where their corners are its own. Axes that no box cuts are left out."""
    cut = [axis for axis in range(len(shape)) if any(part.shape[axis] != shape[axis] for part in parts)]
    if len(cut) > MOST_CUT:
        raise UserError(f"cuts a tensor along {len(cut)} of its dimensions, which no plan does")
    corners = Counter({corner: -sign for corner, sign in _corners((0,) * len(shape), shape, cut)})
    for part in parts:
        for corner, sign in _corners(part.offset, part.shape, cut):
            corners[corner] += sign
    wrong = min((corner for corner, count in corners.items() if count), default=None)
    if wrong is None:
        return None
    place = dict(zip(cut, wrong))
    return [place.get(axis, 0) for axis in range(len(shape))]


def _corners(offset: Sequence[int], shape: Sequence[int], axes: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Of a box, along some axes: (place, sign)."""
    ends = [((offset[axis], 1), (offset[axis] + shape[axis], -1)) for axis in axes]
    for corner in itertools.product(*ends):
        yield tuple(place for place, _ in corner), math.prod(sign for _, sign in corner)


def _inside(offset: Sequence[int], shape: Sequence[int], whole: Sequence[int]) -> bool:
    return len(offset) == len(shape) == len(whole) and all(
        start >= 0 and start + length <= end for start, length, end in zip(offset, shape, whole)
    )


def _spans(widths: Sequence[int]) -> list[tuple[int, int]]:
    """First and past-the-last column of each part."""
    ends = list(itertools.accumulate(widths))
    return list(zip([0, *ends], ends))


def _without_parts(shape: tuple[int, ...], widths: tuple[int, ...] | None) -> tuple[int, ...]:
    """[rows, parts] -> [rows, dim], which no cut of the columns changes."""
    return shape if widths is None else (shape[0], sum(widths))


def _described(piece: Piece, tensor: Tensor) -> dict[str, Any]:
    assert _inside(piece.offset, tuple(tensor.shape), piece.shape), (piece, tensor.shape)
    entry = {"shape": list(piece.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if piece.widths is not None:
        assert piece.shape[1] == len(piece.widths), piece
        entry["widths"] = list(piece.widths)
    return {**entry, "pieces": []}


def _not_finite(error: NotFiniteError, piece: Piece) -> UserError:
    place = [start + i for start, i in zip(piece.offset, error.place)]
    return UserError(
        f"{piece.name} holds {error.value} at {place}: such a model is not saved; train on from an earlier checkpoint "
        "with a lower learning rate, and look for the rows that caused it"
    )


def _kind(name: str) -> str:
    return name.partition("/")[0]


def _is_weight(name: str) -> bool:
    return _kind(name) == "dense" or (_kind(name) == "tables" and name.endswith("/weight"))


def _few(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
