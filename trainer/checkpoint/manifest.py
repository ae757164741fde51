"""A checkpoint's list of its files: what may be read from it, and whether it is what was written.

``MANIFEST.json`` gives every other file's size and digest and is written last. Its names are plain: nothing outside the
folder is ever opened, nor anything through a link.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_loaders.errors import UserError
from trainer.checkpoint.digest import DIGEST, digest_of, new_digest
from trainer.checkpoint.paths import MANIFEST, AnyPath, Unreachable
from trainer.checkpoint.place import place_of
from trainer.runtime.checked_json import Mapped, Whole, check_form, parse_json

FACTS = "state.json"
INDEX = "index.json"
LARGEST_TEXT = 512 << 20  # bytes of a file that is read whole
LARGEST_FILE = 1 << 60
MOST_SHOWN = 20  # settings that differ
# What every job's checkpoint says; its ``State`` says more.
JOB_FACTS = {"progress": {name: Whole() for name in ("step", "rows", "epoch", "epoch_step")}, "identity": dict}
ENTRY = {"bytes": Whole(0, LARGEST_FILE), DIGEST: str}


def read_manifest(path: AnyPath) -> dict[str, dict[str, Any]]:
    """``bytes`` and ``blake3`` of every file of a checkpoint. Raises ``UserError`` for a folder that is none, ``OSError``
    for one that cannot be read."""
    return listed(path, (FACTS, INDEX))


def listed(path: AnyPath, needed: Collection[str]) -> dict[str, dict[str, Any]]:
    """``read_manifest`` of any folder committed by a manifest, which lists the files ``needed``."""
    place = place_of(path)
    if not place.is_folder(path):
        raise UserError("is a link or no folder")
    try:
        manifest = parse_json(place.read(path / MANIFEST, LARGEST_TEXT))
    except ValueError as error:
        raise UserError(f"{MANIFEST}: {error}") from None
    check_form(manifest, Mapped(dict), MANIFEST)
    for name, expected in manifest.items():
        _check_entry(name, expected)
    missing = set(needed) - set(manifest)
    if missing:
        raise UserError(f"{MANIFEST} lists no {' or '.join(sorted(missing))}")
    return manifest


def is_plain(name: str) -> bool:
    """Whether ``name`` can only mean a file in the folder at hand."""
    plain = Path(name).name == name and name not in ("", ".", "..", MANIFEST) and not {"\0", "\\"} & set(name)
    return plain and not any(0xD800 <= ord(letter) < 0xE000 for letter in name)  # halves of a letter: no file has them


def check_listing(path: AnyPath, manifest: dict[str, dict[str, Any]]) -> None:
    """Raises ``UserError`` unless the folder holds exactly the files of the manifest, of their sizes and no links."""
    place = place_of(path)
    found = {name: size for name, size in place.sizes(path).items() if name != MANIFEST}
    for name, size in found.items():
        if name not in manifest:
            if place.is_stray(name):
                continue
            raise UserError(f"{name:.200} is not in {MANIFEST}")
        if size is None:
            raise UserError(f"{name:.200} is a link or no file")
    for name, expected in manifest.items():
        if name not in found:
            raise UserError(f"{name:.200} is missing")
        size = found[name]
        if size != expected["bytes"]:
            raise UserError(f"{name} has {size} bytes, not {expected['bytes']} as in {MANIFEST}: damaged or replaced")


def hashing(path: AnyPath, expected: Mapping[str, Mapping[str, Any]]) -> Iterator[str | None]:
    """Hashes some of a checkpoint's files and yields, after each bounded portion, what is wrong with them: None so far, and
    at last what was found. ``expected``: their entries in the manifest. Raises ``Unreachable``."""
    for name, entry in expected.items():
        digest, size = new_digest(), 0
        try:
            for chunk in place_of(path).chunks(path / name):
                digest.update(chunk)
                size += len(chunk)
                yield None
        except Unreachable:
            raise
        except (OSError, ValueError) as error:
            yield f"{name} cannot be read ({error})"
            return
        if {"bytes": size, DIGEST: digest.hexdigest()} != entry:
            yield f"{name} differs from {MANIFEST}: damaged or replaced"
            return


def read_facts(path: AnyPath) -> dict[str, Any]:
    """The facts of a committed checkpoint: ``progress``, ``identity``, ``world_size`` … Raises ``UserError`` as
    ``read_text``."""
    return read_json(path, FACTS, dict)


def read_json(path: AnyPath, name: str, form: Any) -> Any:
    """One JSON file of a committed checkpoint, of a ``form`` (``checked_json``). Raises ``UserError`` as ``read_text``, and
    where it is of another form."""
    text = read_text(path, name)
    try:
        value = parse_json(text)
        check_form(value, form, name)
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {name} cannot be read ({error}): damaged or replaced") from None
    return value


def read_text(path: AnyPath, name: str) -> str:
    """One text file of a committed checkpoint, held against its manifest; tensors are not looked at. Raises
    ``UserError`` where the checkpoint lacks it or it is damaged."""
    try:
        expected = read_manifest(path).get(name)
        if expected is not None:
            check_text_size(name, expected["bytes"])
            content = place_of(path).read(path / name, expected["bytes"] + 1)
    except Unreachable:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} cannot be read ({error})") from None
    if expected is None:
        raise UserError(
            f"checkpoint {path} has no {name}: another version of this program wrote it; start anew with another run.dir"
        )
    if expected != {"bytes": len(content), DIGEST: digest_of(content)}:
        raise UserError(f"checkpoint {path}: {name} differs from {MANIFEST}: damaged or replaced")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"checkpoint {path}: {name} is no UTF-8 text (byte {error.start})") from None


def check_text_size(name: str, size: int) -> None:
    """Raises ``UserError`` for a file that is too large to be read whole."""
    if size > LARGEST_TEXT:
        raise UserError(f"{name:.200} of {size:,} bytes is larger than a checkpoint's texts may be, {LARGEST_TEXT:,}")


def check_identity(path: AnyPath, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raises ``UserError``, with the differences, unless a job goes on as the one that saved ``path``."""
    current = json.loads(json.dumps(current))
    changed = [key for key in sorted({*saved, *current}) if saved.get(key) != current.get(key)]
    if changed:
        shown = "; ".join(f"{key:.200}: {difference(saved.get(key), current.get(key))}" for key in changed[:MOST_SHOWN])
        raise UserError(
            f"checkpoint {path} belongs to another job ({shown}): restore these settings, or start anew with another "
            "run.dir"
        )


def difference(saved: Any, current: Any, prefix: str = "") -> str:
    """The first five places where two JSON values differ."""
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = [key for key in sorted({*saved, *current}) if saved.get(key) != current.get(key)]
        return ", ".join(difference(saved.get(key), current.get(key), f"{prefix}{key}.") for key in keys[:5])
    return f"{prefix.rstrip('.'):.200} was {saved!r:.200}, is {current!r:.200}".strip()


def fingerprint(path: AnyPath) -> dict[str, Any]:
    """Bytes and digest of a file, which is no link."""
    digest, size = new_digest(), 0
    for chunk in place_of(path).chunks(path):
        digest.update(chunk)
        size += len(chunk)
    return {"bytes": size, DIGEST: digest.hexdigest()}


def _check_entry(name: str, expected: Any) -> None:
    if not is_plain(name):
        raise UserError(f"{MANIFEST} names {name!r:.200}, which is not a plain file name")
    if set(expected) != set(ENTRY):
        raise UserError(f"{MANIFEST} describes {name:.200} as {expected!r:.200}")
    check_form(expected, ENTRY, f"{MANIFEST}: {name:.200}")
