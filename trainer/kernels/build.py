"""Compiles the kernels for the CPU of this machine: ``python -m trainer.kernels``, which `make setup` does, too.

Standard library only: requirements/install.py imports this before there is an environment. A library lies in ``build/``, under a
name made of the CPU, the sources and the compiler, so that machines with different CPUs can share one folder.
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARIES = SOURCES / "build"
COMPILERS = ("g++", "clang++")
# The same results from every CPU and compiler: no reordered sums and no fused multiply-add, NaN and infinities as IEEE 754 has
# them. What is given up is errno and floating-point traps, which keep loops from becoming vector instructions.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-fvisibility=hidden", "-Wall"),
)
THREADS = "-fopenmp"  # a clang++ without OpenMP's library compiles for one thread
CPU_LINES = re.compile(r"^(vendor_id|cpu family|model|flags|CPU implementer|CPU part|Features)\s*:.*$", re.MULTILINE)


class BuildError(Exception):
    """Why there is no library, and how to mend it."""


def ensure(folder: Path = LIBRARIES) -> Path:
    """The library for this CPU in ``folder``, compiled unless it is there. Raises ``BuildError``."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler ({' or '.join(COMPILERS)}); Debian and Ubuntu: sudo apt install g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    library = folder / f"{_stem()}-{_digest(compiler, version)}.so"
    if not library.exists():
        try:
            _compile(compiler, library)
        except OSError as error:
            raise BuildError(f"{folder} cannot be written ({error.strerror})") from None
    return library


def find(folder: Path = LIBRARIES) -> Path | None:
    """The library of these sources for this CPU, whichever compiler made it."""
    return next(folder.glob(f"{_stem()}-*.so"), None)


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cpp"))


def _compile(compiler: str, library: Path) -> None:
    """Several at once do not harm each other: each writes a file of its own and renames it."""
    library.parent.mkdir(exist_ok=True)
    handle, name = tempfile.mkstemp(dir=library.parent, suffix=".part")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, *map(str, sources()), "-o", name]
        done = subprocess.run([*command, THREADS], capture_output=True, text=True)
        if done.returncode:
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise BuildError(f"{compiler} failed: {next((line for line in lines if 'error' in line), lines[0])}")
        os.replace(name, library)
    finally:
        Path(name).unlink(missing_ok=True)
    for earlier in library.parent.glob(f"{_cpu()}-*.so"):
        if earlier != library:
            earlier.unlink(missing_ok=True)


def _stem() -> str:
    texts = [path.read_text() for path in sorted([*sources(), *SOURCES.glob("*.h")])]
    return f"{_cpu()}-{_digest(*FLAGS, THREADS, *texts)}"


def _cpu() -> str:
    """Of the first CPU: vendor, model and instructions."""
    described: list[str] = []
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        described = [line.group() for line in CPU_LINES.finditer(first)]
    return _digest(platform.system(), platform.machine(), *described)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
