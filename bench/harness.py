"""What the benchmarks share: sides that take turns in one run, medians of wall and CPU time, and results as JSON with the
command, the machine and its load.

Side by side in one run: whatever else slows the machine down slows all sides alike. A rate is the median of the passes, a ratio
the median of the ratios turn by turn; the ratio in CPU time is disturbed least.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from data_loaders.state_files import write_json
from trainer.report.run_record import RunRecord

RESULTS = Path("bench/results")
SHARED_WITH_PEERS = ("torch", "numpy", "pyarrow")  # packages of this environment that a peer's uses too

Result = TypeVar("Result")


# The command line


def parser(doc: str, output: str, *, overrides: bool = False) -> argparse.ArgumentParser:
    """``doc``: the benchmark's docstring. ``output``: the file in bench/results."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--output", type=Path, default=RESULTS / output)
    if overrides:
        made.add_argument("overrides", nargs="*", help="key=value of the trainer's configuration")
    return made


def sections_parser(doc: str, output: str, sections: Iterable[str], repeats: int) -> argparse.ArgumentParser:
    """Of a benchmark in sections, some of which compare with other libraries."""
    made = parser(doc, output)
    made.add_argument("--only", nargs="+", choices=list(sections), default=list(sections))
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--peers", type=Path, help="environment that --setup-peers made")
    made.add_argument("--setup-peers", type=Path, metavar="DIR", help="only install the peers into DIR")
    return made


def data_root(given: str | None, holds: str) -> str:
    """The folder of data that are not made here."""
    if given is None:
        sys.exit(f"error: --data-root is missing: give the folder that holds {holds}")
    return given


# Timing


@dataclass(frozen=True)
class Pass:
    """One timed pass over some rows; CPU seconds are those of all threads of the process, None where others work for it."""

    rows: int
    seconds: float
    cpu_seconds: float | None


@dataclass(frozen=True)
class Ratio:
    """The median over turns, each turn's, the ratio of rows by CPU second, and the least that was asked for."""

    value: float
    turns: list[float]
    in_cpu_time: float | None
    target: float | None = None


@dataclass(frozen=True)
class Rates:
    """Rows a second of wall time, the median and each pass; the CPU time they took."""

    rows_per_second: int
    passes: list[int]
    cpu_seconds_per_million_rows: float | None
    note: str = ""

    @classmethod
    def of(cls, passes: Iterable[Pass], note: str = "") -> "Rates":
        passes = list(passes)
        rates = [p.rows / p.seconds for p in passes]
        cpu = [1e6 * p.cpu_seconds / p.rows for p in passes if p.cpu_seconds is not None]
        return cls(
            round(statistics.median(rates)),
            [round(rate) for rate in rates],
            round(statistics.median(cpu), 3) if cpu else None,
            note,
        )

    def over(self, other: "Rates", target: float | None = None) -> Ratio:
        turns = [round(a / b, 3) for a, b in zip(self.passes, other.passes)]
        mine, theirs = self.cpu_seconds_per_million_rows, other.cpu_seconds_per_million_rows
        in_cpu_time = round(theirs / mine, 3) if mine and theirs else None
        return Ratio(round(statistics.median(turns), 3), turns, in_cpu_time, target)


def timed(work: Callable[[], int]) -> Pass:
    """``work`` returns how many rows it delivered."""
    began, cpu_began = time.perf_counter(), time.process_time()
    rows = work()
    return Pass(rows, time.perf_counter() - began, time.process_time() - cpu_began)


def take_turns(
    sides: Mapping[str, Callable[[int], Result]], repeats: int, *, warm_up: bool = True
) -> dict[str, list[Result]]:
    """``repeats`` passes of each side (a function of the number of the pass) in turns, after one that does not count."""
    if warm_up:
        for side in sides.values():
            side(0)
    passes: dict[str, list[Result]] = {name: [] for name in sides}
    for number in range(1, repeats + 1):
        for name, side in sides.items():
            print(f"{name}, {number} of {repeats} …", file=sys.stderr, flush=True)
            passes[name].append(side(number))
    return passes


# Results


@dataclass
class Section:
    """``facts``: what else one needs to know. ``rows``: further lines of numbers under the same column names."""

    rates: dict[str, Rates] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add_ratio(self, name: str, target: float | None = None) -> None:
        """``name``: ``<one side> / <another>``."""
        one, _, other = name.partition(" / ")
        self.ratios[name] = self.rates[one].over(self.rates[other], target)

    def table(self) -> str:
        """All of it as Markdown tables."""
        rates = {
            name: {
                "rows/s": f"{r.rows_per_second:,}",
                "slowest … fastest": f"{min(r.passes):,} … {max(r.passes):,}",
                "CPU s per million rows": r.cpu_seconds_per_million_rows or "",
                "note": r.note,
            }
            for name, r in self.rates.items()
        }
        ratios = {
            name: {
                "ratio": r.value,
                "turns": f"{min(r.turns)} … {max(r.turns)}",
                "in CPU time": r.in_cpu_time or "",
                "asked": r.target or "",
            }
            for name, r in self.ratios.items()
        }
        facts = "\n".join(f"{name}: {fact}" for name, fact in self.facts.items())
        return "\n\n".join(filter(None, (markdown(rates), markdown(ratios), markdown(self.rows), facts)))


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table, its columns named by the first row; nothing for no rows."""
    if not rows:
        return ""
    columns = ["", *next(iter(rows.values()))]
    cells = [columns, ["---"] * len(columns), *([name, *map(str, row.values())] for name, row in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def run_sections(
    sections: Mapping[str, Callable[[argparse.Namespace], Section]], options: argparse.Namespace, *packages: str
) -> None:
    """Those that ``--only`` names: each printed, and recorded in ``--output`` beside the others."""
    for name in options.only:
        section = sections[name](options)
        record(options.output, {key: value for key, value in asdict(section).items() if value}, name, *packages)
        print(f"\n## {name}\n\n{section.table()}", flush=True)


def record(path: Path, result: Mapping[str, Any], name: str | None = None, *packages: str) -> None:
    """Writes a result with where it comes from, and the versions of ``packages``: as the whole file, or as its entry
    ``name``."""
    described = {**result, **origin(*packages)}
    write(path, described if name is None else {**read(path), name: described})


def once(path: Path, group: str, name: str, make: Callable[[], Result]) -> Result:
    """Entry ``name`` of a ``group`` of the file, made and written where it is not there yet."""
    known = read(path) or origin()
    entries = known.setdefault(group, {})
    if name not in entries:
        entries[name] = make()
        write(path, known)
    return entries[name]


def write(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def origin(*packages: str) -> dict[str, Any]:
    versions = {package: version(package) for package in packages}
    return {"command": command(), "machine": machine() | versions, "load": os.getloadavg()}


def command() -> str:
    """As it was started; absolute paths, which are this machine's, as DIR."""
    ranks = dist.get_world_size() if dist.is_initialized() else 0
    program = f"torchrun --standalone --nproc_per_node={ranks} -m" if ranks else "python -m"
    arguments = [shlex.quote(re.sub(r"(^|=)/.*", r"\1DIR", argument)) for argument in sys.argv[1:]]
    spec = sys.modules["__main__"].__spec__  # None where it was not started by -m
    return " ".join([program, spec.name if spec is not None else Path(sys.argv[0]).name, *arguments])


def machine() -> dict[str, Any]:
    described = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in described if line.startswith("model name")]
    return {
        "cpu": next(iter(models), platform.processor()),
        "cores": os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


# Work


def made(folder: Path, write_into: Callable[[Path], None]) -> Path:
    """``folder``, made first if it is not there; it appears only when whole."""
    if not folder.exists():
        print(f"making {folder} …", file=sys.stderr, flush=True)
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_into(unfinished)
        unfinished.rename(folder)
    return folder


def trained(arguments: Sequence[str], num_ranks: int) -> dict[str, Any]:
    """The final metrics of one run of the trainer in processes of its own. Raises ``RuntimeError`` with its stderr."""
    with tempfile.TemporaryDirectory() as folder:
        started = [sys.executable, "-m", "launch.run", "--nproc-per-node", str(num_ranks), *arguments]
        started.append(f"run.dir={folder}/run")
        done = subprocess.run(started, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(started)} failed:\n{done.stderr}")
        return RunRecord(Path(folder, "run")).final


def status_bytes(key: str, pid: int | str = "self") -> int:
    """A line of /proc/PID/status; 0 where the process has ended. VmHWM is the most memory that it has had so far (wait4's
    ru_maxrss is at least what the process that started it has)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


# Other libraries, in an environment of their own


def set_up_peers(folder: Path, requirements: Iterable[str]) -> None:
    """Makes an environment with the peers that takes torch, NumPy and pyarrow from this one: pip finds them installed and
    is held to their versions, so no CUDA build of torch is fetched."""
    venv.create(folder, with_pip=True, clear=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "bench.pth").write_text(sysconfig.get_path("purelib") + "\n")
    held = folder / "constraints.txt"
    held.write_text("".join(f"{package}=={version(package)}\n" for package in SHARED_WITH_PEERS))
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "--constraint", held]
    subprocess.run([*pip, *requirements], check=True)


def peers_python(folder: Path | None) -> Path | None:
    """The interpreter of an environment that ``set_up_peers`` made."""
    path = None if folder is None else folder / "bin" / "python"
    return path if path is not None and path.exists() else None
