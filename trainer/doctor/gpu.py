"""`clicktrainer doctor --gpu`: whether everything that training needs of a GPU is right, and how fast, in some minutes.

Prints a page and writes all figures as JSON, to keep, or to send in. Each part runs in processes of its own, which have a
time limit.
"""

import datetime
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_loaders.messages import note
from trainer.doctor import training
from trainer.doctor.finding import Finding, bounded, failed, passed, shown
from trainer.doctor.processes import CARD, FUSED, MOST_RANKS, ProbeError, driver, judged, run_probes

NAME = "doctor-gpu.json"
PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "nvidia-nccl-cu13")
PROBE_SECONDS, TRAINING_SECONDS = 300.0, 600.0
Part = Callable[[], tuple[list[Finding], Any]]


def main(folder: Path, seconds: float, as_json: bool) -> int:
    """Exit code 0; 1 where anything fails; 2 without a GPU. ``folder``: where runs go, whose disk is written to."""
    try:
        (seen,) = run_probes([["gpus"]], seconds)
    except ProbeError as error:
        return _stop(f"--gpu: PyTorch cannot look for GPUs ({error}): `clicktrainer doctor` says more")
    if not (seen["devices"] or seen["unusable"]):
        return _stop(no_gpu(seen["build"]))
    found: list[Finding] = []
    measured: dict[str, Any] = {"machine": machine()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="doctor-gpu-", dir=folder))
    except OSError as error:
        return _stop(f"{folder} cannot be written ({error.strerror}): name another place, --folder DIR")
    for name, findings, figures in parts(seen, scratch, seconds):
        found += findings
        measured[name] = figures
        if not as_json:
            for finding in findings:
                print(shown(finding, colour=sys.stdout.isatty()), flush=True)
    failures = sum(each.state == "fail" for each in found)
    if not failures:  # else the run folders are kept for inspection
        shutil.rmtree(scratch, ignore_errors=True)
    page = {"ok": not failures, "findings": [asdict(each) for each in found], "measured": measured}
    text = json.dumps(page, indent=1)
    (folder / NAME).write_text(text + "\n")
    print(text if as_json else f"{len(found)} checks: {failures} failed; all figures: {folder / NAME}")
    return int(failures > 0)


def no_gpu(build: str | None) -> str:
    torch = "a CPU build" if build is None else f"built for CUDA {build}"
    installed = driver()
    why = f"driver {installed}" if installed else "no NVIDIA driver"
    remedy = "start it on a machine with one, installed with DEVICE=cuda"
    return f"--gpu: PyTorch sees no GPU here ({why}, torch is {torch}): {remedy}"


def parts(seen: dict[str, Any], scratch: Path, seconds: float) -> Iterator[tuple[str, list[Finding], Any]]:
    """One part after the other; without a GPU that can train, the first alone. ``seen``: the probe's."""
    findings, count = judged(seen, "cuda")
    yield "GPUs", findings, seen
    count = min(count, MOST_RANKS)
    if not count:
        return
    yield _bounded("lookups", lambda: lookups(PROBE_SECONDS), PROBE_SECONDS)
    yield _bounded("nccl", lambda: nccl(count, PROBE_SECONDS), PROBE_SECONDS)
    yield _bounded("pinned writes", lambda: pinned(scratch, seconds), seconds)
    for model in training.MODELS:
        part = partial(training.check, model, count, scratch, TRAINING_SECONDS)
        yield _bounded(f"training {model}", part, 3 * TRAINING_SECONDS)


def lookups(seconds: float) -> tuple[list[Finding], Any]:
    remedy = "the card, its driver or FBGEMM's build computes wrong values: send in the JSON file"
    (cases,) = run_probes([[]], seconds, FUSED)
    found = []
    for optimizer in dict.fromkeys(case["optimizer"] for case in cases):
        own = [case for case in cases if case["optimizer"] == optimizer]
        wrong = [
            f"{c['precision']}, {'pooled' if c['pooled'] else 'sequence'}, {c['dim']}" for c in own if not c["right"]
        ]
        worst = {kind: max(case[kind] for case in own) for kind in ("lookup", "update")}
        message = (
            f"{len(own)} cases, within {worst['lookup']:.1e} (lookups) and {worst['update']:.1e} (updates) of float64"
        )
        name = f"fused {optimizer}"
        found.append(failed(name, f"{message}; wrong: {'; '.join(wrong)}", remedy) if wrong else passed(name, message))
    return found, cases


def nccl(count: int, seconds: float) -> tuple[list[Finding], Any]:
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        store = str(Path(folder) / "store")
        ranks = run_probes([["nccl", str(rank), str(count), store] for rank in range(count)], seconds, CARD)
    rates = {name: min(rank["gb_per_s"][name] for rank in ranks) for name in ranks[0]["gb_per_s"]}
    speed = ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items()) if count > 1 else "nothing leaves it"
    message = f"{count} GPU(s): {speed}"
    if not all(rank["right"] for rank in ranks):
        remedy = "NCCL_P2P_DISABLE=1 or NCCL_SHM_DISABLE=1 shows which way is wrong; see dmesg for errors of the links"
        return [failed("NCCL", f"wrong sums or parts on {message}", remedy)], ranks
    return [passed("NCCL", message)], ranks


def pinned(scratch: Path, seconds: float) -> tuple[list[Finding], Any]:
    (copied,) = run_probes([["pinned", str(scratch)]], seconds, CARD)
    message = (
        f"{copied['copy_gb_per_s']:.1f} GB/s from the GPU, {copied['write_gb_per_s']:.2f} GB/s to {scratch.parent}"
    )
    if not copied["right"]:
        remedy = "another file system for run.dir, and checkpoint.asynchronous=false; send in the JSON file"
        return [failed("pinned writes", f"the file is not what the GPU held; {message}", remedy)], copied
    return [passed("pinned writes", message)], copied


def machine() -> dict[str, Any]:
    found = {"time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "driver": driver()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"python": platform.python_version(), "system": platform.platform()}


def _stop(message: str) -> int:
    note(f"error: {message}")
    return 2


def _bounded(name: str, part: Part, seconds: float) -> tuple[str, list[Finding], Any]:
    """A part's findings and figures; a failure in its place where it raises or does not end."""
    figures: list[Any] = []

    def run() -> list[Finding]:
        found, measured = part()
        figures.append(measured)
        return found

    return name, bounded(name, run, seconds + 30), figures[0] if figures else None
