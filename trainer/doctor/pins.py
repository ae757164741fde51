"""The versions that `make setup` installs, against those that are there. Standard library only: requirements/install.py asks at
every `make`, in a few milliseconds, with the system's Python.

Something else that pip installs may replace a pinned package (MLflow wants an older pyarrow). A list of constraints in
pip's own settings for the environment has pip refuse that.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s,;]+)[^;]*(?:;\s*(.+?))?\s*$")
MARKER = re.compile(r"""(python_version|sys_platform)\s*(>=|<|==|!=)\s*["']([^"']+)["']""")


def pins(files: Sequence[Path], python: tuple[int, int], platform: str = sys.platform) -> dict[str, str]:
    """Package -> version, of requirement files and those that they include, for a Python (3, 11)."""
    found = {}
    for name, version, marker in map(_parts, lines(files)):
        if marker is None or _holds(marker, python, platform):
            found[normal(name)] = version
    return found


def lines(files: Sequence[Path]) -> Iterator[str]:
    """The requirements of files and of those that they include, without comments."""
    for path in files:
        for line in path.read_text().splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if line.startswith("-r "):
                yield from lines([path.parent / line[3:].strip()])
            elif line:
                yield line


def installed(environment: Path) -> dict[str, set[str]]:
    """Package -> versions (two where pip left an old folder behind), of a virtual environment, by the names of its folders of
    metadata."""
    found: dict[str, set[str]] = {}
    for folder in environment.glob("lib/python3*/site-packages/*.dist-info"):
        name, _, version = folder.name.removesuffix(".dist-info").rpartition("-")
        found.setdefault(normal(name), set()).add(version)
    return found


def changed(wanted: dict[str, str], there: dict[str, set[str]]) -> list[str]:
    """What differs, a line a package: missing, or of another version."""
    differing = []
    for name, version in sorted(wanted.items()):
        found = there.get(name, set())
        if not found:
            differing.append(f"{name} is not installed (pinned: {version})")
        elif not any(f"{each}+".startswith(f"{version}+") for each in found):  # 2.13.0 is also 2.13.0+cu130
            differing.append(f"{name} is {' and '.join(sorted(found))} (pinned: {version})")
    return differing


def differing(environment: Path, files: Sequence[Path]) -> list[str]:
    """What of a virtual environment is not as ``files`` pin it, a line a package; nothing where it does not say its Python."""
    python = python_of(environment)
    return changed(pins(files, python), installed(environment)) if python else []


def python_of(environment: Path) -> tuple[int, int] | None:
    """Of a virtual environment; None where it does not say."""
    try:
        settings = (environment / "pyvenv.cfg").read_text()
    except OSError:
        return None
    found = re.search(r"^version(?:_info)?\s*=\s*(\d+)\.(\d+)", settings, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def normal(name: str) -> str:
    """As pip compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _parts(line: str) -> tuple[str, str, str | None]:
    found = PIN.match(line)
    assert found is not None, f"a requirement that pins no version: {line}"
    return found[1], found[2], found[3]


def _holds(marker: str, python: tuple[int, int], platform: str) -> bool:
    """A comparison of python_version or sys_platform: all that our files use."""
    found = MARKER.fullmatch(marker)
    assert found is not None, f"a marker that this does not know: {marker}"
    name, operator, value = found.groups()
    left: Any
    left, right = (platform, value) if name == "sys_platform" else (python, tuple(map(int, value.split("."))))
    return {">=": left >= right, "<": left < right, "==": left == right, "!=": left != right}[operator]
