"""Three models trained for ``STEPS`` steps through the whole program, without a break and with a save and a resume half-way."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.doctor.check_install import ROOT
from trainer.doctor.finding import Finding, failed, passed, warned
from trainer.doctor.processes import CARD, ProbeError, run_probes
from trainer.report.run_record import RunRecord

MODELS = ("wide_deep", "deepfm", "din")
STEPS, BATCH, HELD_OUT = 200, 2048, 20_480
CHANCE = 0.5
KINDS = ("whole", "resumed")
SHOWN = ("samples_per_second", "seconds", "input_wait_fraction", "peak_memory_mb")


class TrainingError(Exception):
    """The last line of a run that failed, or that it did not end."""


def check(model: str, ranks: int, folder: Path, seconds: float) -> tuple[list[Finding], dict[str, Any]]:
    """What is found of one model on ``ranks`` GPUs, and the figures."""
    name = f"training {model}"
    remedy = f"look at {folder / model}-*; python -m trainer.train model={model} shows all its messages"
    try:
        whole = train(model, ranks, folder, f"{model}-{KINDS[0]}", [STEPS], seconds)
        halves = train(model, ranks, folder, f"{model}-{KINDS[1]}", [STEPS // 2, STEPS], seconds)
        (apart,) = run_probes([["difference", *(str(folder / f"{model}-{kind}") for kind in KINDS)]], seconds, CARD)
    except (TrainingError, ProbeError) as error:
        return [failed(name, str(error), remedy)], {}
    auc = whole["test"]["auc"]
    figures = {key: whole["train"].get(key) for key in SHOWN}
    measured = {**figures, "test": whole["test"], "test_resumed": halves["test"], "resumed_differs_by": apart}
    speed = f"{figures['samples_per_second'] or 0:,.0f} samples/s on {ranks} rank(s)"
    message = f"{STEPS} steps, {speed}, test AUC {auc if auc is None else round(auc, 4)}; resumed: {_shown(apart)}"
    if auc is None or not auc > CHANCE:
        return [failed(name, f"{message}: nothing was learnt", remedy)], measured
    if apart:
        why = "expected of DIN, whose gradients of repeated ids are added up atomically; elsewhere worth a report"
        return [warned(name, message, why)], measured
    return [passed(name, message)], measured


def train(model: str, ranks: int, folder: Path, name: str, stops: Sequence[int], seconds: float) -> dict[str, Any]:
    """Starts the program once for each of ``stops``, into one run folder. Returns ``metrics.json``. Raises
    ``TrainingError``."""
    run = folder / name
    for stop in stops:
        command = [sys.executable, "-m", "launch.run", "--nproc-per-node", str(ranks)]
        command += arguments(model, folder, run, stop)
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            raise TrainingError(f"not over after {seconds:.0f} s (step {stop} of {STEPS})") from None
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            named = [line for line in lines if line.startswith("error: ") or "Error" in line] or lines
            raise TrainingError(f"exit code {done.returncode} before step {stop}: {named[0][:300]}")
    return RunRecord(run).final


def arguments(model: str, folder: Path, run: Path, stop: int) -> list[str]:
    rows = {"train": STEPS * BATCH, "valid": HELD_OUT, "test": HELD_OUT}
    return [
        f"model={model}",
        "data=synthetic",
        f"data.root='{folder / 'data'}'",
        f"run.dir='{run}'",
        "device=cuda",
        f"batch_size={BATCH}",
        f"steps={stop}",
        "report=false",
        *(f"data.synthetic.{split}_rows={count}" for split, count in rows.items()),
    ]


def _shown(apart: float) -> str:
    return f"differs by up to {apart:.2g}" if apart else "the same bit by bit"
