"""A checkpoint's list of its files: what may be read from it, and whether it is what was written.

``MANIFEST.json`` gives every other file's size and digest and is written last. Its names are plain: nothing outside the
folder is ever opened, nor anything through a link.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.checkpoint.digest import DIGEST, digest_of, new_digest
from trainer.checkpoint.place import MANIFEST, AnyPath, Unreachable, place_of
from trainer.checkpoint.tensor_file import parse_json

FACTS = "state.json"
INDEX = "index.json"
LARGEST_MANIFEST = 100 << 20


def read_manifest(path: AnyPath) -> dict[str, dict[str, Any]]:
    """``bytes`` and ``blake3`` of every file of a checkpoint. Raises ``ValueError`` for a folder that is none, ``OSError``
    for one that cannot be read."""
    place = place_of(path)
    if not place.is_folder(path):
        raise ValueError("is a link or no folder")
    manifest = parse_json(place.read(path / MANIFEST, LARGEST_MANIFEST))
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} is no object")
    for name, expected in manifest.items():
        _check_entry(name, expected)
    missing = {FACTS, INDEX} - set(manifest)
    if missing:
        raise ValueError(f"{MANIFEST} lists no {' or '.join(sorted(missing))}")
    return manifest


def is_plain(name: str) -> bool:
    """Whether ``name`` can only mean a file in the folder at hand."""
    return Path(name).name == name and name not in ("", ".", "..", MANIFEST) and "\0" not in name and "\\" not in name


def check_listing(path: AnyPath, manifest: dict[str, dict[str, Any]]) -> None:
    """Raises ``ValueError`` unless the folder holds exactly the files of the manifest, of their sizes and no links."""
    place = place_of(path)
    found = {name: size for name, size in place.sizes(path).items() if name != MANIFEST}
    for name, size in found.items():
        if name not in manifest:
            if place.is_stray(name):
                continue
            raise ValueError(f"{name} is not in {MANIFEST}")
        if size is None:
            raise ValueError(f"{name} is a link or no file")
    for name, expected in manifest.items():
        if name not in found:
            raise ValueError(f"{name} is missing")
        size = found[name]
        if size != expected["bytes"]:
            raise ValueError(f"{name} has {size} bytes, not {expected['bytes']} as in {MANIFEST}: damaged or replaced")


def verify_files(path: AnyPath, names: Iterable[str]) -> str | None:
    """What is wrong with the bytes of some of a checkpoint's files, None where nothing is; ranks can share the hashing.
    (``verify`` looks at everything else.)"""
    try:
        manifest = read_manifest(path)
        for name in names:
            if fingerprint(path / name) != manifest[name]:
                return f"{name} differs from {MANIFEST}: damaged or replaced"
    except Unreachable:
        raise
    except (OSError, ValueError) as error:
        return f"not a whole checkpoint ({error})"
    return None


def read_facts(path: AnyPath) -> dict[str, Any]:
    """The facts of a committed checkpoint: ``progress``, ``identity``, ``world_size`` … Raises ``ValueError`` as
    ``read_text``."""
    text = read_text(path, FACTS)
    try:
        facts = parse_json(text)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {FACTS} cannot be read ({error})") from None
    if not isinstance(facts, dict):
        raise ValueError(f"checkpoint {path}: {FACTS} is no object")
    return facts


def read_text(path: AnyPath, name: str) -> str:
    """One text file of a committed checkpoint, held against its manifest; tensors are not looked at. Raises
    ``ValueError`` where the checkpoint lacks it or it is damaged."""
    try:
        expected = read_manifest(path).get(name)
        if expected is not None:
            content = place_of(path).read(path / name)
    except Unreachable:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path} cannot be read ({error})") from None
    if expected is None:
        raise ValueError(
            f"checkpoint {path} has no {name}: another version of this program wrote it; start anew with another run.dir"
        )
    if expected != {"bytes": len(content), DIGEST: digest_of(content)}:
        raise ValueError(f"checkpoint {path}: {name} differs from {MANIFEST}: damaged or replaced")
    return content.decode(errors="replace")


def check_identity(path: AnyPath, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises ``ValueError``, with every difference, unless a job goes on as the one that saved ``path``."""
    current = json.loads(json.dumps(current))
    changed = [key for key in sorted({*saved, *current}) if saved.get(key) != current.get(key)]
    if changed:
        shown = "; ".join(f"{key}: {difference(saved.get(key), current.get(key))}" for key in changed)
        raise ValueError(
            f"checkpoint {path} belongs to another job ({shown}): restore these settings, or start anew with another "
            "run.dir"
        )


def difference(saved: Any, current: Any, prefix: str = "") -> str:
    """The first five places where two JSON values differ."""
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = [key for key in sorted({*saved, *current}) if saved.get(key) != current.get(key)]
        return ", ".join(difference(saved.get(key), current.get(key), f"{prefix}{key}.") for key in keys[:5])
    return f"{prefix.rstrip('.')} was {saved!r}, is {current!r}".strip()


def fingerprint(path: AnyPath) -> dict[str, Any]:
    """Bytes and digest of a file, which is no link."""
    digest, size = new_digest(), 0
    for chunk in place_of(path).chunks(path):
        digest.update(chunk)
        size += len(chunk)
    return {"bytes": size, DIGEST: digest.hexdigest()}


def _check_entry(name: str, expected: Any) -> None:
    if not is_plain(name):
        raise ValueError(f"{MANIFEST} names {name!r:.200}, which is not a plain file name")
    known = isinstance(expected, dict) and set(expected) == {"bytes", DIGEST}
    if not known or type(expected["bytes"]) is not int or not isinstance(expected[DIGEST], str):
        raise ValueError(f"{MANIFEST} describes {name} as {expected!r:.200}")
