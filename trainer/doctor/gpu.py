"""`python -m trainer.doctor --gpu`: whether everything that training needs of a GPU is right, and how fast, in some minutes.

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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainer.doctor.finding import Finding, bounded, failed, passed, shown
from trainer.doctor.processes import MOST_RANKS, ProbeError, driver, gpus, run_probes

NAME = "doctor-gpu.json"
CARD = (sys.executable, "-m", "trainer.doctor.card")
PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "nvidia-nccl-cu13")
PROBE_SECONDS, TRAINING_SECONDS = 300.0, 600.0
Part = Callable[[], tuple[list[Finding], Any]]


def main(folder: Path, seconds: float, as_json: bool) -> int:
    """Exit code 0; 1 where anything fails; 2 without a GPU. ``folder``: where runs go, whose disk is written to."""
    missing = why_none(seconds)
    if missing is not None:
        print(f"error: {missing}", file=sys.stderr)
        return 2
    found: list[Finding] = []
    measured: dict[str, Any] = {"machine": machine()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="doctor-gpu-", dir=folder))
    except OSError as error:
        print(
            f"error: {folder} cannot be written ({error.strerror}): name another place, --folder DIR", file=sys.stderr
        )
        return 2
    for name, findings, figures in parts(scratch, seconds):
        found += findings
        measured[name] = figures
        if not as_json:
            for finding in findings:
                print(shown(finding, colour=sys.stdout.isatty()), flush=True)
    failures = sum(each.state == "fail" for each in found)
    if not failures:  # else what a run has left behind is looked at
        shutil.rmtree(scratch, ignore_errors=True)
    page = {"ok": not failures, "findings": [asdict(each) for each in found], "measured": measured}
    text = json.dumps(page, indent=1)
    (folder / NAME).write_text(text + "\n")
    print(text if as_json else f"{len(found)} looked at: {failures} failed; all figures: {folder / NAME}")
    return int(failures > 0)


def why_none(seconds: float) -> str | None:
    """Why no GPU can be looked at here, in one line; None where there is one."""
    try:
        (seen,) = run_probes([["gpus"]], seconds)
    except ProbeError as error:
        return f"--gpu: PyTorch cannot look for GPUs ({error}): `python -m trainer.doctor` says more"
    if seen["devices"] or seen["unusable"]:
        return None
    build = "a CPU build" if seen["build"] is None else f"built for CUDA {seen['build']}"
    there = driver()
    why = f"driver {there}" if there else "no NVIDIA driver"
    remedy = "start it on a machine with one, installed with DEVICE=cuda"
    return f"--gpu: PyTorch sees no GPU here ({why}, torch is {build}): {remedy}"


def parts(scratch: Path, seconds: float) -> Iterator[tuple[str, list[Finding], Any]]:
    """One part after the other; without a GPU that can train, the first alone."""
    counted: list[int] = []

    def cards() -> tuple[list[Finding], Any]:
        findings, count = gpus("cuda", seconds)
        counted.append(count)
        return findings, run_probes([["gpus"]], seconds)[0]

    yield _bounded("GPUs", cards, 3 * seconds)
    count = min(counted[0] if counted else 0, MOST_RANKS)
    if not count:
        return
    yield _bounded("lookups", lambda: lookups(PROBE_SECONDS), PROBE_SECONDS)
    yield _bounded("nccl", lambda: nccl(count, PROBE_SECONDS), PROBE_SECONDS)
    yield _bounded("pinned writes", lambda: pinned(scratch, seconds), seconds)
    yield from trainings(count, scratch)


def trainings(count: int, scratch: Path) -> Iterator[tuple[str, list[Finding], Any]]:
    from trainer.doctor import training  # PyTorch takes seconds to load

    for model in training.MODELS:
        part = lambda model=model: training.check(model, count, scratch, TRAINING_SECONDS)  # noqa: E731
        yield _bounded(f"training {model}", part, 3 * TRAINING_SECONDS)


def lookups(seconds: float) -> tuple[list[Finding], Any]:
    remedy = "the card, its driver or FBGEMM's build computes wrong values: send in the JSON file"
    cases = _ask([["lookups"]], seconds)[0]["cases"]
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
        told = _ask([["nccl", str(rank), str(count), store] for rank in range(count)], seconds)
    rates = {name: min(rank["gb_per_s"][name] for rank in told) for name in told[0]["gb_per_s"]}
    speed = ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items()) if count > 1 else "nothing leaves it"
    message = f"{count} GPU(s): {speed}"
    if not all(rank["right"] for rank in told):
        remedy = "NCCL_P2P_DISABLE=1 or NCCL_SHM_DISABLE=1 shows which way is wrong; see dmesg for errors of the links"
        return [failed("NCCL", f"wrong sums or parts on {message}", remedy)], told
    return [passed("NCCL", message)], told


def pinned(scratch: Path, seconds: float) -> tuple[list[Finding], Any]:
    (told,) = _ask([["pinned", str(scratch)]], seconds)
    message = f"{told['copy_gb_per_s']:.1f} GB/s from the GPU, {told['write_gb_per_s']:.2f} GB/s to {scratch.parent}"
    if not told["right"]:
        remedy = "another file system for run.dir, and checkpoint.asynchronous=false; send in the JSON file"
        return [failed("pinned writes", f"the file is not what the GPU held; {message}", remedy)], told
    return [passed("pinned writes", message)], told


def machine() -> dict[str, Any]:
    found = {"time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "driver": driver()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"python": platform.python_version(), "system": platform.platform()}


def _ask(arguments: list[list[str]], seconds: float) -> list[dict[str, Any]]:
    return run_probes(arguments, seconds, CARD)


def _bounded(name: str, part: Part, seconds: float) -> tuple[str, list[Finding], Any]:
    """A part's findings and figures; a failure in its place where it raises or does not end."""
    figures: list[Any] = []

    def run() -> list[Finding]:
        found, told = part()
        figures.append(told)
        return found

    return name, bounded(name, run, seconds + 30), figures[0] if figures else None
