"""Whether what is installed belongs together and loads."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

from trainer.doctor.check_install import NOT_CHECKED
from trainer.doctor.finding import Finding, failed, passed, warned

ROOT = Path(__file__).resolve().parents[2]
SHOWN = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy", "pyarrow")
OLDEST = (3, 10)


def python() -> list[Finding]:
    message = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST:
        return [failed("python", message, "make clean setup PYTHON=/path/to/python3.10 or newer")]
    return [passed("python", message)]


def versions() -> list[Finding]:
    """What is there by name; whether it fits is ``fits``' business."""
    found = []
    for name in SHOWN:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return [passed("versions", ", ".join(found) or "none of the packages is installed")]


def fits(device: str | None, seconds: float) -> list[Finding]:
    """torch, torchrec and fbgemm belong together, load, and look embeddings up right; in a process of its own, as a build
    for another torch may crash."""
    command = [sys.executable, "-m", "trainer.doctor.check_install", *(["--device", device] if device else [])]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return [
            failed(
                "installation", f"no answer within {seconds:.0f} s", "make clean setup; look for a hanging GPU driver"
            )
        ]
    notes = [_note(line) for line in done.stderr.splitlines() if line.startswith("note: ")]
    if done.returncode == 0:
        return [passed("installation", "torch, torchrec and fbgemm load and work together"), *notes]
    if done.returncode == NOT_CHECKED:
        remedy = "run the doctor on a machine with an NVIDIA driver; in a container: --gpus all"
        return [warned("installation", "the CUDA packages do not load without an NVIDIA driver", remedy), *notes]
    if done.returncode < 0:
        remedy = "make clean setup (with DEVICE=cuda for GPUs): builds of different versions do not fit"
        return [failed("installation", f"torch, torchrec or fbgemm crashed (signal {-done.returncode})", remedy)]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    message, _, remedy = (
        (errors or done.stderr.splitlines()[-1:] or ["no message"])[0].removeprefix("error: ").rpartition(": ")
    )
    return [failed("installation", message or remedy, remedy if message else "make clean setup")]


def _note(line: str) -> Finding:
    message, _, remedy = line.removeprefix("note: ").rpartition(": ")
    return warned("packages", message or remedy, remedy if message else "see that this is meant")
