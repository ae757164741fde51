"""Mutations of a checkpoint by someone who recomputes the digests: seeded, so that a finding can be repeated.

``python -m tests.helpers.forging FOLDER COUNT [FIRST_SEED]`` tries many on a checkpoint in FOLDER (a run's step-N),
by ``verify``, ``inspect`` and ``diff``, and says which ended in anything but an answer or one line.
"""

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.checkpoint.manifest import fingerprint

ODD = [
    *(None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, 2**31, 2**53, 2**62, 2**63, 2**64 - 1, -(2**63), 10**30),
    *("", "a", "../x", "/etc/passwd", "a/b", "\x1b[2J", "\0", "ü\ud800", "x" * 5000, "NaN", "object", "F32", "float32"),
    *([], [[]], [0], [-1], [1 << 40, 1 << 40], [0, 1 << 62], {}, {"a": {}}, [None], ["x"] * 100),
]
TEXTS = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"7",
    b'"a"',
    b"{",
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b'{"a": NaN}',
    b'{"a": -Infinity}',
    b'{"a": 1e999}',
    b'{"a": ' + b"9" * 400 + b"}",
    b'{"a": ' + b"9" * 10_000 + b"}",
    b'{"a": 1, "a": 2}',
    b"[" * 100_000,
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b"[" * 500 + b"]" * 500,
    b"[" + b"[]," * 200_000 + b"[]]",
    b'"' + b"x" * 1_000_000 + b'"',
    bytes(4096),
]


def forge(path: Path, seed: int) -> str:
    """Changes a checkpoint in one to three places, digests recomputed; says how."""
    chance = random.Random(seed)
    told = [chance.choice(WAYS)(path, chance) for _ in range(chance.randint(1, 3))]
    return "; ".join(told)


def value_of_json(path: Path, chance: random.Random) -> str:
    """Another value, key or order somewhere in a file's JSON."""
    names = [it.name for it in path.iterdir() if it.suffix == ".json" and it.is_file()]
    name = chance.choice(names or ["state.json"])
    try:
        tree = json.loads((path / name).read_text())
    except (ValueError, OSError, RecursionError):
        return "nothing"
    how = change(tree, chance) if isinstance(tree, (dict, list)) and tree else "nothing"
    return write(path, name, json.dumps(tree).encode()) + f": {how}"


def change(tree: Any, chance: random.Random) -> str:
    place, way = tree, []
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = chance.choice(keys)
        way.append(key)
        inner = place[key]
        if not (isinstance(inner, (dict, list)) and inner) or chance.random() < 0.15:
            break
        place = inner
    return f"{'.'.join(map(str, way))[:150]} {ALTERATIONS[chance.randrange(len(ALTERATIONS))](place, key, chance)}"


def _replace(place: Any, key: Any, chance: random.Random) -> str:
    place[key] = chance.choice(ODD)
    return f"is {place[key]!r:.60}"


def _near(place: Any, key: Any, chance: random.Random) -> str:
    if type(place[key]) is int:
        place[key] += chance.choice([-1, 1, 8, 1 << 20])
    return "is near"


def _delete(place: Any, key: Any, chance: random.Random) -> str:
    del place[key]
    return "is gone"


def _repeat(place: Any, key: Any, chance: random.Random) -> str:
    times = chance.choice([1, 3, 20_000])
    if isinstance(place, dict):
        place.update({f"{key}{number}": place[key] for number in range(times)})
    else:
        place += [place[key]] * times
    return f"comes {times} times more"


ALTERATIONS = [_replace, _replace, _replace, _near, _delete, _repeat]


def other_text(path: Path, chance: random.Random) -> str:
    name = chance.choice([it.name for it in path.iterdir() if it.is_file()])
    return write(path, name, chance.choice(TEXTS))


def flipped_bytes(path: Path, chance: random.Random) -> str:
    """Bits of a file, mostly of its begin, where headers are; or another length."""
    name = chance.choice([it.name for it in path.iterdir() if it.is_file()])
    content = bytearray((path / name).read_bytes())
    for _ in range(chance.randint(1, 8)):
        if content:
            limit = len(content) if chance.random() < 0.3 else min(len(content), 600)
            content[chance.randrange(limit)] = chance.randrange(256)
    if chance.random() < 0.3:
        content = content[: chance.randrange(len(content) + 1)] if chance.random() < 0.5 else content + bytes(64)
    return write(path, name, bytes(content))


def header_of_tensors(path: Path, chance: random.Random) -> str:
    """A tensor file's header, changed as JSON."""
    names = [it.name for it in path.iterdir() if it.suffix == ".safetensors" and it.is_file()]
    if not names:
        return "nothing"
    name = chance.choice(names)
    content = (path / name).read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        how = change(header, chance)
    except (ValueError, IndexError, TypeError, RecursionError):
        return "nothing"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write(path, name, len(text).to_bytes(8, "little") + text + content[8 + length :]) + f": {how}"


def odd_file(path: Path, chance: random.Random) -> str:
    """A link, pipe, folder or strange name in the place of a file or beside."""
    names = [it.name for it in path.iterdir() if it.is_file() and not it.is_symlink()]
    name = chance.choice([*names, "further", "\x1b[31m", "ü"])
    target = path / name
    target.unlink(missing_ok=True)
    what = chance.choice(["link", "device", "pipe", "folder", "loop", "gone"])
    if what in ("link", "device", "loop"):
        target.symlink_to({"link": "state.json", "device": "/dev/zero", "loop": name}[what])
    elif what == "pipe":
        os.mkfifo(target)
    elif what == "folder":
        target.mkdir()
    return f"{name!r} is a {what}"


WAYS = [value_of_json, value_of_json, value_of_json, header_of_tensors, other_text, flipped_bytes, odd_file]


def write(path: Path, name: str, content: bytes) -> str:
    """Puts other bytes in the place of a file and makes the manifest agree, as far as it is one."""
    (path / name).unlink(missing_ok=True)  # which other folders may share
    (path / name).write_bytes(content)
    if name == "MANIFEST.json" or not (path / "MANIFEST.json").is_file():
        return name
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        manifest[name] = fingerprint(path / name)
    except (ValueError, OSError, TypeError, RecursionError):
        return name
    (path / "MANIFEST.json").unlink()
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    return name


def copied(source: Path, target: Path) -> Path:
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, copy_function=os.link)
    return target


def findings(source: Path, scratch: Path, seeds: range, use: Callable[[Path], Any], seconds: float) -> list[str]:
    """What ``use`` did with forged copies of ``source`` that was neither an answer nor a ``ValueError`` or ``OSError`` of our
    own: its exceptions are for ``use`` to judge, by raising ``AssertionError``. Slow ones are findings, too."""
    found = []
    for seed in seeds:
        path = copied(source, scratch / source.name)
        how, started = forge(path, seed), time.monotonic()
        try:
            use(path)
        except BaseException as error:  # noqa: BLE001 - each is a finding
            found.append(f"seed {seed} ({how}): {type(error).__name__}: {error!s:.300}")
        if time.monotonic() - started > seconds:
            found.append(f"seed {seed} ({how}): {time.monotonic() - started:.1f} s")
    return found


def by_command(path: Path) -> None:
    """verify, inspect and diff, as a person calls them."""
    from trainer.checkpoint.__main__ import main

    for arguments in (["verify", path], ["inspect", path], ["inspect", "--json", path], ["diff", path, path]):
        assert main([str(it) for it in arguments]) in (0, 1, 2)


if __name__ == "__main__":
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    scratch = folder.parent / "forged"
    for line in findings(folder, scratch, range(first, first + count), by_command, 30.0):
        print(line, file=sys.stderr, flush=True)
