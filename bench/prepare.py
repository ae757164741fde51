"""Raw logs to training-ready Parquet: speed, memory and disk, as numbers.

    python -m bench.prepare --setup-peers DIR            # once: pandas and FuxiCTR, in an environment of their own
    python -m bench.prepare --folder DIR --peers DIR --only slice      # 1 M rows beside pandas and FuxiCTR
    python -m bench.prepare --folder DIR --only criteo                 # 45 M rows beside DuckDB's bare scan
    python -m bench.prepare --folder DIR --only histories              # 20 M events, the 50 before each
    python -m bench.prepare --folder DIR --only spark --spark PYTHON   # 1 M rows on local Spark, its shuffles counted
    python -m bench.prepare --folder DIR --only scale                  # no run: the above, for 4 billion rows

The logs are made once, from row numbers alone (see ``prepare_logs``), in ``--folder``; what is prepared from them lies there
too and is removed when measured. Disk: 45 M rows are 11 GB, and take about three times as much while being prepared. Results
go to bench/results/prepare.json, one entry a section.

What is timed is a whole command, from its start to its end: for a log of a size that matters the start is nothing, and on
the slice it counts against us, since of peers only the work counts, without imports and without the start of Ray. Sides
take turns (a b c a b c …); a rate is the median of the runs, a ratio the median of the ratios turn by turn. All sides have
two threads and the same memory limit, where they know one. The page cache is warm where the file fits into memory: a scan
comes before each of our runs.

Memory is the largest sum, over a command's processes, of what lies in memory (RSS, read every 50 ms), and the same without
pages shared or of files ("anonymous"). Ray's processes share a store that the first counts several times and the second not
at all: the truth is between.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow.parquet as pq

from bench import harness, prepare_logs, prepare_peers
from bench.harness import Pass, Rates, Section, made

ROOT = Path(__file__).parents[1]
EVENTS_RECIPE = Path(__file__).with_name("prepare_events.yaml")
HISTORY_LENGTH = 50
CHECKED_USERS = 20
TERABYTE_ROWS = 4_373_472_329  # of Criteo's 24 days
CORES, MACHINE_CORES = 2, 32  # of these measurements; of what one would use


def main() -> None:
    parser = harness.sections_parser(__doc__, "prepare.json", SECTIONS, repeats=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench-prepare")
    parser.add_argument("--rows", type=int, default=45_000_000, help="of the large Criteo log")
    parser.add_argument("--slice-rows", type=int, default=1_000_000, help="of the log that peers prepare, and Spark")
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--memory-limit", default="4GB")
    parser.add_argument("--spark", type=Path, help="Python of an environment with pyspark")
    parser.add_argument("--generate", action="store_true", help="only make the logs")
    options = parser.parse_args()
    if options.setup_peers:
        harness.set_up_peers(options.setup_peers, prepare_peers.REQUIREMENTS)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.generate:
        for log in (criteo_log(options.folder, options.rows), events_log(options.folder, options.events)):
            print(log)
        return
    harness.run_sections(SECTIONS, options, "duckdb", "ibis-framework", "pyarrow")


# What is measured of a command


@dataclass(frozen=True)
class Run:
    """One command. ``work_seconds``: what it says of itself, without its start. Disk: what it read and wrote in all; the
    most its folder held at a time."""

    rows: int
    seconds: float
    work_seconds: float
    cpu_seconds: float
    peak_mb: float
    peak_anonymous_mb: float
    largest_process_mb: float
    read_mb: float
    written_mb: float
    peak_disk_mb: float

    def line(self) -> dict[str, Any]:
        """Of the table of memory and disk."""
        return {
            "seconds": round(self.seconds, 1),
            "peak MB": round(self.peak_mb),
            "anonymous": round(self.peak_anonymous_mb),
            "largest process": round(self.largest_process_mb),
            "read from disk, MB": round(self.read_mb),
            "written, MB": round(self.written_mb),
            "peak disk, MB": round(self.peak_disk_mb),
        }


class Watched:
    """A command and its descendants, until it ends. ``folder``: where it writes. Raises ``RuntimeError`` (its last lines)
    where it fails."""

    def __init__(self, command: list[Any], folder: Path, environment: dict[str, str] | None = None) -> None:
        self.command, self.folder = [str(part) for part in command], folder
        self.environment = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
        self._peak = self._peak_anonymous = self._largest = self._peak_disk = 0
        self._ended = threading.Event()

    def run(self, log: Path) -> dict[str, float]:
        """All numbers of ``Run`` but those in the command's answer."""
        began = time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(
                self.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=self.environment
            )
        watchers = [threading.Thread(target=watch, args=(process.pid,)) for watch in (self._memory, self._disk)]
        for watcher in watchers:
            watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        self._ended.set()
        for watcher in watchers:
            watcher.join()
        if process.returncode:
            lines = log.read_text().strip().splitlines()[-5:]
            raise RuntimeError(f"{' '.join(self.command)} ended with {process.returncode}: {' | '.join(lines)}")
        return {
            "seconds": seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_mb": self._peak / 1e6,
            "peak_anonymous_mb": self._peak_anonymous / 1e6,
            "largest_process_mb": self._largest / 1e6,
            "read_mb": usage.ru_inblock * 512 / 1e6,
            "written_mb": usage.ru_oublock * 512 / 1e6,
            "peak_disk_mb": self._peak_disk / 1e6,
        }

    def _memory(self, pid: int) -> None:
        processes: list[psutil.Process] = []
        for tick in _ticks(self._ended, 0.05):
            if tick % 10 == 0:  # looking for descendants reads all of /proc
                processes = list(_family(pid))
            resident = shared = 0
            for process in processes:
                try:
                    memory = process.memory_info()
                    high_water = harness.status_bytes("VmHWM", process.pid)
                except (psutil.Error, OSError):
                    continue
                resident, shared = resident + memory.rss, shared + memory.shared
                self._largest = max(self._largest, high_water)
            self._peak = max(self._peak, resident)
            self._peak_anonymous = max(self._peak_anonymous, resident - shared)

    def _disk(self, _: int) -> None:
        for _ in _ticks(self._ended, 1.0):
            self._peak_disk = max(self._peak_disk, size_of(self.folder))


def _ticks(ended: threading.Event, seconds: float) -> Iterator[int]:
    tick = 0
    while not ended.wait(seconds):
        yield tick
        tick += 1


def _family(pid: int) -> Iterator[psutil.Process]:
    try:
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)
    except psutil.Error:
        return


def size_of(folder: Path) -> int:
    """Bytes on disk below a folder in which files come and go."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(Path(parent) / name, follow_symlinks=False).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


# Sides


@dataclass(frozen=True)
class Log:
    """A raw file, alone in its folder."""

    path: Path
    rows: int


@dataclass
class Side:
    """A command that prepares, or scans, a log into an output folder; ``run`` checks that it took all rows. ``answer``
    is what the latest run reported."""

    command: Callable[[Path], list[Any]]
    read_answer: Callable[[Path], dict[str, Any]]
    rows: int
    whole: bool  # whether the start of the process counts
    counts_cpu: bool = True  # Ray's workers and Spark's JVM are not waited for
    environment: dict[str, str] | None = None
    answer: dict[str, Any] | None = None

    def run(self, folder: Path) -> Run:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        output = folder / "output"
        found = Watched(self.command(output), folder, self.environment).run(folder.with_name("command.log"))
        self.answer = self.read_answer(output)
        if self.answer["rows"] != self.rows:
            raise RuntimeError(f"{folder.name}: {self.answer['rows']:,} rows came out of {self.rows:,}")
        return Run(self.rows, work_seconds=self.answer.get("seconds", found["seconds"]), **found)

    def passed(self, run: Run) -> Pass:
        seconds = run.seconds if self.whole else run.work_seconds
        return Pass(run.rows, seconds, run.cpu_seconds if self.counts_cpu else None)


def ours(
    log: Log, options: argparse.Namespace, *arguments: Any, python: Path | str = sys.executable, **settings: Any
) -> Side:
    def command(output: Path) -> list[Any]:
        return [
            *(python, "-m", "data_loaders.prepare", *arguments, f"input={log.path.parent}", f"output={output}"),
            *(f"memory_limit={options.memory_limit}", "threads=2"),
        ]

    return Side(command, our_answer, log.rows, whole=True, **settings)


def our_answer(output: Path) -> dict[str, Any]:
    """From the output folder: rows, values of each vocabulary, seconds of each step."""
    report = json.loads((output / "report.json").read_text())
    files = sorted((output / "vocabulary").glob("*.parquet"))
    written = sum(pq.read_metadata(path).num_rows for path in output.glob("t*/*.parquet"))
    written += sum(pq.read_metadata(path).num_rows for path in output.glob("valid/*.parquet"))
    return {
        "rows": written,
        "steps": report["seconds"],
        "values": {path.stem: pq.read_metadata(path).num_rows for path in files},
        "output_mb": size_of(output) / 1e6,
        "vocabulary_mb": size_of(output / "vocabulary") / 1e6,
    }


def peer(name: str, python: str | Path, path: Path, rows: int, **settings: Any) -> Side:
    """One of ``prepare_peers``; each leaves an answer in its output folder."""

    def command(output: Path) -> list[Any]:
        return [python, "-m", "bench.prepare_peers", name, path, output]

    def read_answer(output: Path) -> dict[str, Any]:
        return json.loads((output / prepare_peers.ANSWER).read_text())

    return Side(command, read_answer, rows, whole=False, **settings)


def compare(sides: dict[str, Side], folder: Path, repeats: int) -> Section:
    """The latest output of each side stays, in a folder of the side's name."""
    turns = {name: lambda _, name=name: sides[name].run(folder / name.replace(" ", "-")) for name in sides}
    section = Section()
    for name, found in harness.take_turns(turns, repeats, warm_up=False).items():
        side = sides[name]
        note = "the whole command" if side.whole else f"without its start; {found[-1].seconds:.1f} s with it"
        section.rates[name] = Rates.of(map(side.passed, found), note)
        section.rows[name] = max(found, key=lambda run: run.peak_mb).line()
        section.facts.update({f"versions, {name}": side.answer["versions"]} if "versions" in side.answer else {})
    if {"scan", "ours"} <= set(sides):  # how often our command could have scanned the file in its time
        section.ratios["passes: time of ours / scan"] = section.rates["scan"].over(section.rates["ours"])
    return section


# Sections


def slice_of(options: argparse.Namespace) -> Section:
    """A log that fits in memory: ours beside pandas and FuxiCTR, all rows train, all with the same vocabularies."""
    log = criteo_log(options.folder, options.slice_rows)
    sides = {
        "scan": peer("scan-criteo", sys.executable, log.path, log.rows),
        "ours": ours(log, options, "recipe=criteo_log2", "split.hash=null"),
    }
    python = harness.peers_python(options.peers)
    skipped = {}
    if python is None:
        skipped = {"skipped": "pandas and FuxiCTR: not installed; see --setup-peers and --peers"}
    else:
        sides["pandas"] = peer("pandas", python, log.path, log.rows)
        sides["FuxiCTR"] = peer("fuxictr", python, with_header(log), log.rows, counts_cpu=False)
    section = compare(sides, options.folder / "runs", options.repeats)
    check_values(sides)
    for name in sides:
        if name in ("pandas", "FuxiCTR"):
            section.add_ratio(f"ours / {name}", 5)
    section.facts.update(
        {**described(log), "asked": "at least 5 times their rows/s", **skipped, **reported(sides["ours"])}
    )
    shutil.rmtree(options.folder / "runs")
    return section


def criteo(options: argparse.Namespace) -> Section:
    """A log larger than the memory limit: ours, as the recipe says, beside DuckDB's bare scan."""
    log = criteo_log(options.folder, options.rows)
    sides = {
        "scan": peer("scan-criteo", sys.executable, log.path, log.rows),
        "ours": ours(log, options, "recipe=criteo_log2"),
    }
    section = compare(sides, options.folder / "runs", options.repeats)
    section.facts.update(
        {
            **described(log),
            "asked": f"peak memory within {options.memory_limit}, passes at most 4",
            **reported(sides["ours"]),
        }
    )
    shutil.rmtree(options.folder / "runs")
    return section


def histories(options: argparse.Namespace) -> Section:
    """Every event an example, with the 50 items of its user before it."""
    log = events_log(options.folder, options.events)
    sides = {
        "scan": peer("scan-events", sys.executable, log.path, log.rows),
        "ours": ours(log, options, f"recipe={EVENTS_RECIPE}"),
    }
    section = compare(sides, options.folder / "runs", options.repeats)
    section.facts.update(
        {
            **described(log),
            "asked": f"peak memory within {options.memory_limit}",
            **reported(sides["ours"]),
            **events_facts(log),
            "checked": check_histories(options.folder / "runs/ours/output"),
        }
    )
    shutil.rmtree(options.folder / "runs")
    return section


def spark(options: argparse.Namespace) -> Section:
    """The slice with engine=spark on this machine: what its tasks read, shuffled and spilled."""
    log = criteo_log(options.folder, options.slice_rows)
    if options.spark is None:
        raise SystemExit("--spark is missing: the Python of an environment with pyspark (and Java 17)")
    events = options.folder / "spark-events"
    shutil.rmtree(events, ignore_errors=True)
    events.mkdir()
    settings = {
        "spark.eventLog.enabled": "true",
        "spark.eventLog.dir": events.as_uri(),
        "spark.eventLog.compress": "false",
        "spark.eventLog.rolling.enabled": "false",
        "spark.local.dir": str(options.folder / "spark-local"),
    }
    arguments = [f"engine_options.{key}={value}" for key, value in settings.items()]
    sides = {
        "spark": ours(
            log, options, "recipe=criteo_log2", "engine=spark", *arguments, python=options.spark, counts_cpu=False
        )
    }
    section = compare(sides, options.folder / "runs", 1)
    (logged,) = [path for path in events.rglob("*") if path.is_file()]
    section.facts.update({**described(log), **reported(sides["spark"]), "bytes": task_totals(logged)})
    for folder in ("runs", "spark-events", "spark-local"):
        shutil.rmtree(options.folder / folder, ignore_errors=True)
    return section


def scale(options: argparse.Namespace) -> Section:
    """Criteo's 24 days, from what was measured: everything grows with the rows, but see docs/scale.md."""
    known = harness.read(options.output)
    values = one_machine(known["criteo"]) | (on_spark(known["spark"]) if "spark" in known else {})
    return Section(rows={name: {"value": value} for name, value in values.items()}, facts={"rows": TERABYTE_ROWS})


def one_machine(measured: dict[str, Any]) -> dict[str, float]:
    run = measured["rows"]["ours"]
    times = TERABYTE_ROWS / measured["facts"]["rows"]
    scan, hours = (TERABYTE_ROWS / measured["rates"][side]["rows_per_second"] / 3600 for side in ("scan", "ours"))
    values = sum(measured["facts"]["values"].values())
    output = measured["facts"]["output_mb"] - measured["facts"]["vocabulary_mb"]
    return {
        "text, TB": round(measured["facts"]["text_bytes"] * times / 1e12, 2),
        f"hours of a bare scan, {CORES} cores": round(scan, 1),
        f"hours of ours, {CORES} cores": round(hours, 1),
        f"hours of ours, {MACHINE_CORES} cores if all as quick": round(hours * CORES / MACHINE_CORES, 1),
        "written to disk in all, TB": round(run["written, MB"] * times / 1e6, 2),
        "most on disk at a time, TB": round(run["peak disk, MB"] * times / 1e6, 2),
        "rows of the output, TB": round(output * times / 1e6, 2),
        "values kept of the measured log, M (of more rows there are more, not in proportion)": round(values / 1e6, 2),
    }


def on_spark(measured: dict[str, Any]) -> dict[str, float]:
    """Bytes only: most of a slice's time is Spark's own, whatever its size."""
    times = TERABYTE_ROWS / measured["facts"]["rows"]
    return {f"Spark: {name}, TB": round(value * times / 1e12, 2) for name, value in measured["facts"]["bytes"].items()}


SECTIONS: dict[str, Callable[[argparse.Namespace], Section]] = {
    "slice": slice_of,
    "criteo": criteo,
    "histories": histories,
    "spark": spark,
    "scale": scale,
}


def described(log: Log) -> dict[str, int]:
    return {"rows": log.rows, "text_bytes": log.path.stat().st_size}


def reported(side: Side) -> dict[str, Any]:
    """Of the report of our latest run."""
    answer = dict(side.answer)
    vocabularies = sum(seconds for step, seconds in answer["steps"].items() if step.startswith("vocabulary "))
    steps = {step: seconds for step, seconds in answer["steps"].items() if not step.startswith("vocabulary ")}
    return {
        "seconds of steps": steps | {"vocabularies": round(vocabularies, 3)},
        "values": answer["values"],
        "output_mb": round(answer["output_mb"], 1),
        "vocabulary_mb": round(answer["vocabulary_mb"], 1),
    }


# That what is timed delivers what it should


def check_values(sides: dict[str, Side]) -> None:
    """Raises ``RuntimeError`` where two sides keep different numbers of values of a column."""
    expected = {name: sides["ours"].answer["values"][name] for name in prepare_logs.CATEGORIES}
    for name, side in sides.items():
        found = side.answer.get("values")
        if found and any(found[column] != expected[column] for column in expected):
            raise RuntimeError(f"{name} keeps {found}, ours {expected}")


def check_histories(output: Path) -> str:
    """Raises ``RuntimeError`` unless the histories of the most active user and of some others are what a loop over their
    events finds. The output has all events, in the log's order."""
    files = f"read_parquet('{output}/train/*.parquet', filename = true, file_row_number = true)"
    users = (
        f"(SELECT user FROM {files} GROUP BY user ORDER BY count(*) DESC, user LIMIT 1) UNION "
        f"(SELECT DISTINCT user FROM {files} ORDER BY md5(user::VARCHAR) LIMIT {CHECKED_USERS})"
    )
    found = duckdb.sql(
        f"SELECT user, time, item, items FROM {files} WHERE user IN ({users}) ORDER BY filename, file_row_number"
    ).fetchall()
    by_user = defaultdict(list)
    for user, *event in found:
        by_user[user].append(event)
    for user, events in by_user.items():
        for (moment, _, history), expected in zip(events, naive_histories(events)):
            if list(history) != expected:
                raise RuntimeError(f"user {user}, time {moment}: history {history}, expected {expected}")
    return f"{len(found):,} histories of {len(by_user)} users"


def naive_histories(events: list[list[Any]]) -> Iterator[list[int]]:
    """For each of a user's (time, item, …), in the log's order, the items before it, oldest first."""
    ordered = sorted(events, key=lambda event: event[0])  # stable: events of one time keep their order
    times = [moment for moment, *_ in ordered]
    for moment, *_ in events:
        end = bisect_left(times, moment)
        yield [item for _, item, *_ in ordered[max(end - HISTORY_LENGTH, 0) : end]]


def task_totals(path: Path) -> dict[str, int]:
    """Bytes over all tasks of a Spark event log."""
    totals: Counter[str] = Counter()
    for line in path.open():
        event = json.loads(line)
        metrics = event.get("Task Metrics")
        if event.get("Event") != "SparkListenerTaskEnd" or not metrics:
            continue
        totals["read"] += metrics["Input Metrics"]["Bytes Read"]
        totals["shuffled"] += metrics["Shuffle Write Metrics"]["Shuffle Bytes Written"]
        totals["spilled to disk"] += metrics["Disk Bytes Spilled"]
        totals["written"] += metrics["Output Metrics"]["Bytes Written"]
    return dict(totals)


# The logs


def criteo_log(folder: Path, rows: int) -> Log:
    target = folder / f"criteo-{rows}"
    made(target, lambda unfinished: prepare_logs.write_criteo(unfinished / "train.txt", rows))
    return Log(target / "train.txt", rows)


def events_log(folder: Path, rows: int) -> Log:
    target = folder / f"events-{rows}"
    made(target, lambda unfinished: prepare_logs.write_events(unfinished / "events.csv", rows))
    return Log(target / "events.csv", rows)


def with_header(log: Log) -> Path:
    """The log again, with the names of its columns in the first line."""

    def copy(unfinished: Path) -> None:
        unfinished.mkdir()
        with (unfinished / "train.csv").open("wb") as file, log.path.open("rb") as rows:
            file.write("\t".join(prepare_logs.CRITEO_COLUMNS).encode() + b"\n")
            shutil.copyfileobj(rows, file)

    return made(log.path.parent.with_name(f"{log.path.parent.name}-header"), copy) / "train.csv"


def events_facts(log: Log) -> dict[str, Any]:
    """How uneven the log is."""
    counts = f"SELECT user, count(*) AS events, count(DISTINCT time) AS times FROM read_csv('{log.path}') GROUP BY user"
    users, most, median, ties = duckdb.sql(
        f"SELECT count(*), max(events), median(events), 1 - sum(times) / sum(events) FROM ({counts})"
    ).fetchone()
    return {
        "users": users,
        "events of the most active user": most,
        "median events of a user": median,
        "share of events of a time that the user has had": round(float(ties), 4),
    }


if __name__ == "__main__":
    main()
