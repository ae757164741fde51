"""What only the run itself knows of what its report shows, written down by rank 0: ``environment.json`` when it starts,
``distributions.json`` at each evaluation, ``tables.json`` at its end."""

import importlib.metadata
import os
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from data_loaders.messages import warn
from data_loaders.schema import Schema
from data_loaders.state_files import write_json
from trainer.checkpoint.piece import Piece
from trainer.report.table_statistics import table_statistics
from trainer.runtime import run_folder
from trainer.runtime.distributed import Ranks
from trainer.sharding.table_plan import TablePlan

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy", "pyarrow", "hydra-core", "bokeh")
CPU_MODEL = Path("/proc/cpuinfo")


class Record:
    """Of a run in ``folder``. Every rank may call its methods."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self._scores: dict[str, Any] = {}

    def environment(self) -> None:
        self._write(run_folder.ENVIRONMENT, environment(self.ranks))

    def scores(self, split: str, step: int, distribution: Mapping[str, Any]) -> None:
        """How the model of ``step`` scores ``split`` (``trainer.metrics.histograms``); what was known of it before is
        forgotten."""
        self._scores[split] = {"step": step, **distribution}
        self._write(run_folder.SCORES, self._scores)

    def tables(self, step: int, tables: Sequence[TablePlan], pieces: Sequence[Piece], schema: Schema) -> None:
        """A pass over all tables. ``pieces``: of the model and its optimizers. All ranks together."""
        statistics = table_statistics(tables, pieces, schema, self.ranks)
        self._write(run_folder.TABLES, {"step": step, "tables": statistics})

    def _write(self, name: str, facts: Any) -> None:
        """By rank 0. A full disk is no reason to end a run: the report will lack it, and that is said."""
        if not self.ranks.is_first:
            return
        try:
            write_json(self.folder / name, facts)
        except OSError as error:
            warn(f"{self.folder / name} was not written ({error.strerror})")


def environment(ranks: Ranks) -> dict[str, Any]:
    """Of rank 0's machine, by the names that the report shows."""
    facts: dict[str, Any] = {
        "ranks": f"{ranks.world_size} ({ranks.local_world_size} a machine)",
        "device": str(ranks.device),
        "machine": f"{socket.gethostname()}, {platform.platform()}",
        "processor": f"{os.cpu_count()} cores, {_cpu_model()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
    }
    if ranks.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(ranks.device)
        facts["GPU"] = f"{ranks.local_world_size} x {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB"
        facts["CUDA"] = torch.version.cuda
    return facts | {"Python": sys.version.split()[0]} | _versions()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    lines = CPU_MODEL.read_text().splitlines() if CPU_MODEL.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
