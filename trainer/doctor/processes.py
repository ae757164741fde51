"""GPUs, collectives and the installation, checked in processes of their own with a time limit."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.doctor.check_install import ANEW, ROOT
from trainer.doctor.finding import Finding, at_least, failed, passed, warned

GIB = 2**30
INSTALLATION = (sys.executable, "-m", "trainer.doctor.check_install", "--json")
PROBE = (sys.executable, "-m", "trainer.doctor.probe")
CARD = (sys.executable, "-m", "trainer.doctor.card")
FUSED = (sys.executable, "-m", "trainer.doctor.fused")
MOST_RANKS = 8


class ProbeError(Exception):
    """The last line of a probe's error output, or that it did not end."""


def installation(device: str | None, seconds: float) -> list[Finding]:
    """In a process of its own, as a build for another torch may crash."""
    try:
        (found,) = run_probes([["--device", device] if device else []], seconds, INSTALLATION)
    except ProbeError as error:
        remedy = f"{ANEW}; look for a GPU driver that hangs"
        return [failed("installation", f"torch, torchrec or fbgemm cannot be checked ({error})", remedy)]
    return [Finding(**each) for each in found]


def gpus(device: str | None, seconds: float) -> tuple[list[Finding], int]:
    """What PyTorch sees, and how many."""
    try:
        (seen,) = run_probes([["gpus"]], seconds)
    except ProbeError as error:
        remedy = (
            "look at nvidia-smi and dmesg; a driver older than torch's CUDA build must be updated, or torch be replaced"
        )
        return [failed("GPUs", f"PyTorch cannot use them ({error})", remedy)], 0
    return judged(seen, device)


def judged(seen: dict[str, Any], device: str | None) -> tuple[list[Finding], int]:
    """Of what the probe ``gpus`` printed: findings, and how many GPUs can train."""
    if seen["unusable"]:
        remedy = "CUDA_VISIBLE_DEVICES chooses other GPUs, device=cpu none"
        return [failed("GPUs", each, remedy) for each in seen["unusable"]], 0
    installed = driver()
    devices = seen["devices"]
    if not devices:
        return [_none(device, installed, seen["build"])], 0
    free = min(gpu["free"] for gpu in devices) / GIB
    total = min(gpu["total"] for gpu in devices) / GIB
    kinds = ", ".join(sorted({gpu["name"] for gpu in devices}))
    message = (
        f"{len(devices)} x {kinds}, {free:.1f} of {total:.1f} GiB free; driver {installed or '?'}, CUDA {seen['build']}"
    )
    remedy = "end the other programs on it: nvidia-smi names them"
    found = [at_least("GPUs", free / total, 0.8, 0.2, message, remedy)]
    return found + _peers(len(devices), seen["apart"]), len(devices)


def collectives(backend: str, ranks: int, seconds: float) -> list[Finding]:
    """``ranks`` processes sum a tensor over each other."""
    ranks = min(ranks, MOST_RANKS)
    remedies = {
        "gloo": "let this host's name resolve to its own address (getent hosts $(hostname)), or set GLOO_SOCKET_IFNAME "
        "to a network interface (ip link)",
        "nccl": "set NCCL_DEBUG=INFO and start again; NCCL_P2P_DISABLE=1 or NCCL_SHM_DISABLE=1 show which way fails; "
        "NCCL_SOCKET_IFNAME names the network interface",
    }
    try:
        with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
            store = str(Path(folder) / "store")
            ranks_found = run_probes(
                [["collectives", backend, str(r), str(ranks), store] for r in range(ranks)], seconds
            )
    except ProbeError as error:
        return [failed(backend, f"{ranks} ranks do not reach each other ({error})", remedies[backend])]
    slowest = {name: 1000 * max(rank["seconds"][name] for rank in ranks_found) for name in ("one", "mib")}
    message = f"{ranks} ranks: an all-reduce takes {slowest['one']:.2f} ms, of 1 MiB {slowest['mib']:.2f} ms"
    slow = "look for other jobs on these cores, and a slow network interface"
    return [at_least(backend, -slowest["mib"], -200, -float("inf"), message, slow)]


def run_probes(arguments: Sequence[Sequence[str]], seconds: float, probe: Sequence[str] | None = None) -> list[Any]:
    """Runs probes (``PROBE``'s where not given) side by side; none outlives ``seconds``. Raises ``ProbeError`` for the first
    one that fails."""
    with tempfile.TemporaryFile("w+") as errors:
        started = [
            subprocess.Popen(
                [*(probe or PROBE), *each],
                cwd=ROOT,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
            for each in arguments
        ]
        deadline = time.monotonic() + seconds
        try:
            return [_answer(process, deadline, seconds, errors) for process in started]
        finally:
            for process in started:
                process.kill()
                process.communicate()


def _answer(process: subprocess.Popen[str], deadline: float, seconds: float, errors: Any) -> Any:
    try:
        text, _ = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer within {seconds:.0f} s") from None
    if process.returncode < 0:
        raise ProbeError(f"crashed by signal {-process.returncode}")
    if process.returncode:
        errors.seek(0)
        lines = [line.strip() for line in errors.read().splitlines() if "Error" in line] or ["no message"]
        raise ProbeError(lines[-1][:300])
    return json.loads(text.splitlines()[-1])


def _none(device: str | None, driver: str | None, build: str | None) -> Finding:
    if driver is not None:
        why = "torch is a CPU build" if build is None else f"torch is built for CUDA {build}"
        remedy = "make clean setup DEVICE=cuda, with a driver new enough for it (nvidia-smi), and look at CUDA_VISIBLE_DEVICES"
        return warned("GPUs", f"there is a driver ({driver}), but PyTorch sees no GPU; {why}", remedy)
    if device == "cuda":
        return failed("GPUs", "none is seen", "install the NVIDIA driver; in a container start it with --gpus all")
    return passed("GPUs", "none: training is on the CPU, with gloo")


def _peers(count: int, apart: list[list[int]]) -> list[Finding]:
    if count < 2:
        return []
    if not apart:
        return [passed("peer access", f"all {count} GPUs reach each other's memory")]
    pairs = ", ".join(f"{a}-{b}" for a, b in apart[:4])
    remedy = (
        "expected without NVLink on some boards (slower); else disable ACS and IOMMU, or pass all GPUs to the container"
    )
    return [warned("peer access", f"{len(apart)} pairs of GPUs do not reach each other's memory ({pairs})", remedy)]


def driver() -> str | None:
    """Of the NVIDIA driver; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None
