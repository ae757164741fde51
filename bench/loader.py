"""The loader's speed, memory and shuffle, as numbers.

    python -m bench.loader --setup-peers DIR              # once: the other libraries, in an environment of their own
    python -m bench.loader --peers DIR [--data DIR] [--only criteo sequence peers memory shuffle] [--repeats 5]

* criteo: rows/s of a Criteo-like log beside those at which pyarrow alone reads the same row groups;
* sequence: the same for rows with two lists;
* peers: rows/s on one core beside the loaders that others use (see ``loader_peers``);
* memory: peak over one epoch, ten epochs, and data 4 and 16 times as large;
* shuffle: how far the order of training is from the order in the files, beside a full permutation.

The data are made once, from fixed seeds, in ``--data`` (about 2.5 GB, not part of the repository). Results go to
bench/results/loader.json, one entry a section.

What is timed: of our loader 256 batches of 8192 in mid-stream, behind the first 64, of a data set of 512 row groups (each
file linked 16 times), so that several row groups belong to each logical shard; in the lines "whole epochs" all of a small
data set instead, from asking for the iterator to the end of its threads. Of pyarrow, the files read once. Opening the
manifest and a first pass, which brings the files into the page cache, do not count. Whatever is compared takes turns (a b c
a b c …); a rate is the median of the passes, a ratio the median of the ratios turn by turn. One thread decodes
(``threads=1``); a second assembles batches, as in training.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from bench import loader_peers
from data_loaders.batch import Batch
from data_loaders.loader import Loader
from data_loaders.manifest import Manifest
from data_loaders.schema import Feature, Layout, Schema, Table

BATCH_SIZE = 8192
ROW_GROUP = 1 << 17
LINKS, SKIPPED_STEPS, TIMED_STEPS = 16, 64, 256
# The trainer's defaults (``trainer.config.StreamConfig``).
STREAM = {"shards": 64, "shuffle": True, "shuffle_rows": 1 << 18, "threads": 1, "prefetch_batches": 4}

# Distinct values of the columns of the Criteo display advertising log (Kaggle).
CARDINALITIES = (
    *(1460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5683, 8_351_593, 3194),
    *(27, 14_992, 5_461_306, 10, 5652, 2173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
DENSE = tuple(f"I{i}" for i in range(1, 14))
IDS = tuple(f"C{i}" for i in range(1, 27))
CRITEO_FILES, CRITEO_NULLS_FILES, SEQUENCE_FILES, PEERS_FILES = 8, 4, 4, 2
ITEMS, CATEGORIES, MEAN_LENGTH = 1_000_000, 1000, 50

# The shuffle section: everything 1/32 of the criteo section's.
SMALL_ROW_GROUP, SMALL_BATCH, SMALL_BUFFER = ROW_GROUP // 32, BATCH_SIZE // 32, (1 << 18) // 32
SHUFFLED_ROW_GROUPS = (8, 64, 640)
SHUFFLED_EPOCHS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "bench-loader")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="environment that --setup-peers made")
    parser.add_argument("--setup-peers", type=Path, metavar="DIR", help="only install the peers into DIR")
    parser.add_argument("--output", type=Path, default=Path("bench/results/loader.json"))
    options = parser.parse_args()
    if options.setup_peers:
        loader_peers.set_up(options.setup_peers)
        return
    torch.set_num_threads(1)
    options.data.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        section = SECTIONS[name](options)
        record(options.output, name, section, options.repeats)
        print(f"\n## {name}\n\n{section.table()}", flush=True)


# What is measured


@dataclass(frozen=True)
class Pass:
    """One timed pass over some rows; CPU seconds are those of all threads of the process, None where others work for it."""

    rows: int
    seconds: float
    cpu_seconds: float | None


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

    def over(self, other: "Rates", target: float | None = None) -> "Ratio":
        turns = [round(a / b, 3) for a, b in zip(self.passes, other.passes)]
        mine, theirs = self.cpu_seconds_per_million_rows, other.cpu_seconds_per_million_rows
        in_cpu_time = round(theirs / mine, 3) if mine and theirs else None
        return Ratio(round(statistics.median(turns), 3), turns, in_cpu_time, target)


@dataclass(frozen=True)
class Ratio:
    """The median over turns, each turn's, the ratio of rows by CPU second, which other work on the machine disturbs less,
    and the least that was asked for."""

    value: float
    turns: list[float]
    in_cpu_time: float | None
    target: float | None = None


@dataclass
class Section:
    """``facts``: what else one needs to know. ``rows``: further lines of numbers under the same column names."""

    rates: dict[str, Rates] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

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


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """A table, its columns named by the first row; nothing for no rows."""
    if not rows:
        return ""
    columns = ["", *next(iter(rows.values()))]
    cells = [columns, ["---"] * len(columns), *([name, *map(str, row.values())] for name, row in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


Side = Callable[[int], Pass]  # of the number of the pass


def take_turns(sides: dict[str, Side], repeats: int) -> dict[str, list[Pass]]:
    """Times ``repeats`` passes of each side, in turns, after one that does not count."""
    for side in sides.values():
        side(0)
    passes: dict[str, list[Pass]] = {name: [] for name in sides}
    for number in range(1, repeats + 1):
        for name, side in sides.items():
            passes[name].append(side(number))
    return passes


def timed(work: Callable[[], int]) -> Pass:
    """``work`` returns how many rows it delivered."""
    began, cpu_began = time.perf_counter(), time.process_time()
    rows = work()
    return Pass(rows, time.perf_counter() - began, time.process_time() - cpu_began)


@contextmanager
def counting_disk(facts: dict[str, Any]) -> Iterator[None]:
    """Adds how much this process read from disk meanwhile: nothing, where the page cache held it all."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    yield
    blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before
    facts["MB read from disk, warm-up and timed passes"] = round(blocks * 512 / 1e6, 1)


# Sections


def criteo(options: argparse.Namespace) -> Section:
    """40 columns: pyarrow, our loader shuffled and not, the prepared format, and the same with nulls."""
    kinds = {kind: criteo_data(options.data, kind) for kind in ("int64", "prepared", "nulls")}
    plain, prepared, nulls = kinds.values()
    sides = {
        "pyarrow": read_row_groups(plain),
        "shuffled": steady(plain),
        "unshuffled": steady(plain, shuffle=False),
        "prepared, pyarrow": read_row_groups(prepared),
        "prepared, shuffled": steady(prepared),
        "prepared, unshuffled": steady(prepared, shuffle=False),
        "nulls, pyarrow": read_row_groups(nulls),
        "nulls, shuffled": steady(nulls),
        "shuffled, whole epochs": epochs(plain),
        "shuffled, all threads on one core": on_one_core(steady(plain)),
    }
    facts = {f"checked, {kind}": check(data) for kind, data in kinds.items()}
    section = compare(sides, options.repeats, facts | described(plain))
    rates = section.rates
    section.ratios = {
        "shuffled / pyarrow": rates["shuffled"].over(rates["pyarrow"], 0.6),
        "unshuffled / pyarrow": rates["unshuffled"].over(rates["pyarrow"], 0.8),
        "prepared, shuffled / shuffled": rates["prepared, shuffled"].over(rates["shuffled"], 2),
        "prepared, shuffled / prepared, pyarrow": rates["prepared, shuffled"].over(rates["prepared, pyarrow"]),
        "prepared, unshuffled / unshuffled": rates["prepared, unshuffled"].over(rates["unshuffled"]),
        "nulls, shuffled / nulls, pyarrow": rates["nulls, shuffled"].over(rates["nulls, pyarrow"]),
        "shuffled, whole epochs / pyarrow": rates["shuffled, whole epochs"].over(rates["pyarrow"]),
        "shuffled, all threads on one core / pyarrow": rates["shuffled, all threads on one core"].over(
            rates["pyarrow"]
        ),
    }
    return section


def sequence(options: argparse.Namespace) -> Section:
    """Two histories of mean length 50 beside their targets."""
    data = sequence_data(options.data)
    sides = {
        "pyarrow": read_row_groups(data),
        "shuffled": steady(data),
        "unshuffled": steady(data, shuffle=False),
        "shuffled, whole epochs": epochs(data),
    }
    section = compare(sides, options.repeats, {"checked": check(data)} | described(data))
    rates = section.rates
    section.ratios = {
        "shuffled / pyarrow": rates["shuffled"].over(rates["pyarrow"], 0.6),
        "unshuffled / pyarrow": rates["unshuffled"].over(rates["pyarrow"]),
        "shuffled, whole epochs / pyarrow": rates["shuffled, whole epochs"].over(rates["pyarrow"]),
    }
    return section


def compare(sides: dict[str, Side], repeats: int, facts: dict[str, Any]) -> Section:
    with counting_disk(facts):
        passes = take_turns(sides, repeats)
    return Section({name: Rates.of(found) for name, found in passes.items()}, facts=facts)


def peers(options: argparse.Namespace) -> Section:
    """One core for all: ours beside the loaders of other trainers and libraries."""
    source = loader_peers.Source(peers_files(options.data, ROW_GROUP, CRITEO_ROWS // ROW_GROUP), options.data / "cache")
    small = loader_peers.Source(peers_files(options.data, 5000, 4), options.data / "cache")
    found = loader_peers.measure(source, small, loader_peers.python(options.peers), options.repeats)
    section = Section(facts={"skipped": found.skipped, "checked": found.checked, "versions": found.versions})
    for name, passes in found.passes.items():
        peer = loader_peers.PEERS[name]
        whole = "" if all(p["whole"] for p in passes) else "; part of an epoch"
        note = f"shuffle: {peer.shuffle}; ready after {found.start_seconds[name]:.1f} s{whole}"
        rates = Rates.of((Pass(p["rows"], p["seconds"], p["cpu_seconds"]) for p in passes), note)
        section.rates[name] = rates
    section.ratios = peer_ratios(section.rates)
    return section


def peer_ratios(rates: dict[str, Rates]) -> dict[str, Ratio]:
    """Ours over the best trainer's loader that shuffles and, unshuffled, over the best that does not; over all others."""
    kinds = {
        "shuffled": ("ours", lambda peer: peer.shuffles),
        "unshuffled": ("ours, unshuffled", lambda peer: not peer.shuffles),
    }
    ratios = {}
    for kind, (ours, belongs) in kinds.items():
        others = {n: r for n, r in rates.items() if not n.startswith("ours") and belongs(loader_peers.PEERS[n])}
        trainers = {n: r for n, r in others.items() if loader_peers.PEERS[n].trainer}
        if trainers:
            best = max(trainers, key=lambda name: trainers[name].rows_per_second)
            ratios[f"{kind}: ours / the trainers' best, {best}"] = rates[ours].over(rates[best], 3)
        ratios.update({f"{kind}: ours / {name}": rates[ours].over(rate) for name, rate in others.items()})
    return ratios


def memory(options: argparse.Namespace) -> Section:
    """Anonymous memory (heap, Arrow's and PyTorch's buffers): pages of memory-mapped files are the kernel's to take back."""
    data = criteo_data(options.data, "int64")
    probes = {}
    for times, num_epochs in ((1, 10), (4, 1), (16, 1)):
        larger = data if times == 1 else replace(data, folder=several_times(data.folder, times))
        probes[f"{larger.num_rows / 1e6:.1f} M rows"] = apart(probe_memory, larger, num_epochs)
    once, four, sixteen = (probe["peak, first epoch"] for probe in probes.values())
    growth = next(iter(probes.values()))["peak, all epochs"] / once
    facts = {
        "unit": "MB; anonymous memory (RssAnon of /proc/self/status, read every 5 ms); memory-mapped pages of the "
        "data files are left out, but are part of the high-water mark (VmHWM)",
        "peak over 10 epochs / over 1": round(growth, 3),
        "peak of 4 times the data / of the data": round(four / once, 3),
        "peak of 16 times the data / of 4 times": round(sixteen / four, 3),
        "asked": "over 10 epochs at most 1.05; independent of the data's size",
    }
    return Section(rows=probes, facts=facts)


def shuffle(options: argparse.Namespace) -> Section:
    """The order of training against the order in the file, for data of three sizes and several shuffle buffers."""
    section = Section()
    for row_groups in SHUFFLED_ROW_GROUPS:
        data = numbered_data(options.data, row_groups)
        ways = {"none": {"shuffle": False}}
        ways |= {f"buffer of {n} row groups": {"shuffle_rows": n * SMALL_ROW_GROUP} for n in (2, 8, 32)}
        rng = np.random.default_rng(0)
        full = mean_quality(rng.permutation(data.num_rows) for _ in range(SHUFFLED_EPOCHS))
        for way, changes in ways.items():
            settings = {"batch_size": SMALL_BATCH, "shuffle_rows": SMALL_BUFFER} | changes
            found = mean_quality(training_orders(data, settings))
            section.rows[f"{row_groups} row groups, {way}"] = found.beside(full)
        section.rows[f"{row_groups} row groups, full permutation"] = full.beside(full)
    section.facts = {
        "scale": f"row groups of {SMALL_ROW_GROUP} rows, batches of {SMALL_BATCH}, 64 logical shards, default buffer "
        f"{SMALL_BUFFER} rows (2 row groups): 1/32 of row groups of 131,072, batches of 8192 and a buffer of 262,144; "
        f"means over {SHUFFLED_EPOCHS} epochs",
        "rank correlation": "of place in the file and place in training (Spearman), absolute value",
        "batches": "share of an epoch's batches that hold a row of a given row group (a batch of this scale has few rows: "
        "8192 would hold one of each of 640 row groups in a full permutation)",
        "spread": "standard deviation of the places of a row group's rows in training, over a full permutation's",
        "displacement": "mean distance of place in training from place in the file, over a full permutation's",
        "neighbours": "share of rows trained in one batch with the next row of the file; then, over a full permutation's",
    }
    return section


SECTIONS: dict[str, Callable[[argparse.Namespace], Section]] = {
    "criteo": criteo,
    "sequence": sequence,
    "peers": peers,
    "memory": memory,
    "shuffle": shuffle,
}


# Sides


def read_row_groups(data: "Data") -> Side:
    """pyarrow alone: all columns of all row groups in order, one thread, memory-mapped."""

    def read() -> int:
        rows = 0
        for path in data.files:
            with pq.ParquetFile(path, memory_map=True) as file:
                for index in range(file.num_row_groups):
                    rows += file.read_row_group(index, use_threads=False).num_rows
        return rows

    return lambda _: timed(read)


def steady(data: "Data", **changes: Any) -> Side:
    """Our loader in mid-stream: pass k is of epoch k of a loader of its own, which leaves no memory behind."""
    larger = replace(data, folder=several_times(data.folder, LINKS))

    def one_pass(number: int) -> Pass:
        batches = larger.loader(**changes).batches(number, 0, SKIPPED_STEPS + TIMED_STEPS)
        for _ in islice(batches, SKIPPED_STEPS):
            pass
        return timed(lambda: sum(batch.cursor.local_rows for batch in batches))

    return one_pass


def epochs(data: "Data", **changes: Any) -> Side:
    """Our loader: pass k is epoch k of one loader."""
    loader = data.loader(**changes)
    return lambda epoch: timed(lambda: sum(batch.cursor.local_rows for batch in loader.epoch(epoch)))


def on_one_core(side: Side) -> Side:
    """The threads that a side starts keep to the core of the thread that starts them."""

    def pinned(number: int) -> Pass:
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        try:
            return side(number)
        finally:
            os.sched_setaffinity(0, allowed)

    return pinned


# That what is timed delivers what it should


def check(data: "Data") -> str:
    """Raises ``RuntimeError`` unless a shuffled and an unshuffled epoch deliver what pyarrow finds in the files."""
    expected = Sums.of_files(data)
    for changes in ({}, {"shuffle": False}):
        found = Sums.of_batches(data.loader(**changes).epoch(0))
        if found != expected:
            raise RuntimeError(f"{data.folder}: the files hold {expected}, the loader delivered {found} ({changes})")
    return f"{expected.rows:,} rows, shuffled and unshuffled epoch: {expected}"


@dataclass
class Sums:
    """What an epoch must add up to. ``labeled_ids``: sum of label times id, which rows torn apart would change."""

    rows: int = 0
    labels: int = 0
    dense: float = 0.0
    num_ids: int = 0
    ids: int = 0
    labeled_ids: int = 0

    @classmethod
    def of_batches(cls, batches: Iterable[Batch]) -> "Sums":
        sums = cls()
        for batch in batches:
            labels = batch.labels.to(torch.int64)
            sums.rows += int((batch.weights > 0).sum())
            sums.labels += int(labels.sum())
            sums.dense += float(batch.dense.sum(dtype=torch.float64))
            for tensor in filter(None, (batch.sparse, batch.sequence)):
                values, lengths = tensor.values(), tensor.lengths().to(torch.int64)
                sums.num_ids += len(values)
                sums.ids += int(values.sum())
                labels_of_ids = labels.repeat(len(tensor.keys())).repeat_interleave(lengths)
                sums.labeled_ids += int((values * labels_of_ids).sum())
        return sums

    @classmethod
    def of_files(cls, data: "Data") -> "Sums":
        sums = cls()
        for path in data.files:
            for batch in pq.ParquetFile(path).iter_batches(ROW_GROUP):
                labels = batch.column(data.schema.label).to_numpy(zero_copy_only=False).astype(np.int64)
                sums.rows += batch.num_rows
                sums.labels += int(labels.sum())
                for name in data.schema.dense:
                    sums.dense += float(np.nansum(batch.column(name).to_numpy(zero_copy_only=False), dtype=np.float64))
                for key in (*data.layout.pooled, *data.layout.unpooled):
                    sums._add_ids(batch.column(key), labels)
        return sums

    def _add_ids(self, column: pa.Array, labels: NDArray[np.int64]) -> None:
        if pa.types.is_list(column.type):
            labels = np.repeat(labels, np.diff(column.offsets.to_numpy()))
            column = column.flatten()
        elif column.null_count:
            labels = labels[column.is_valid().to_numpy(zero_copy_only=False)]
            column = column.drop_null()
        ids = column.to_numpy().astype(np.int64)
        self.num_ids += len(ids)
        self.ids += int(ids.sum())
        self.labeled_ids += int((ids * labels).sum())


# Memory


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, which begins with nothing of this one's memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def probe_memory(data: "Data", num_epochs: int) -> dict[str, float]:
    """MB of anonymous memory before the loader, at the peak of the first epoch and of all, and after each."""
    torch.set_num_threads(1)
    before = status_mb("RssAnon")
    side = epochs(data)
    peaks, after = [], []
    with PeakMemory() as peak:
        for epoch in range(num_epochs):
            side(epoch)
            peaks.append(peak.mb)
            after.append(status_mb("RssAnon"))
    return {
        "before": before,
        "peak, first epoch": peaks[0],
        "peak, all epochs": peaks[-1],
        "epochs": num_epochs,
        "after the first": after[0],
        "after the last": after[-1],
        "mapped file pages": status_mb("RssFile"),
        "VmHWM": status_mb("VmHWM"),
    }


class PeakMemory:
    """The largest RssAnon while in the ``with`` block; the kernel keeps a high-water mark only with file pages in it."""

    def __init__(self) -> None:
        self.mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.mb = max(self.mb, status_mb("RssAnon"))


def status_mb(key: str) -> float:
    """A line of /proc/self/status, which counts in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024 / 1e6, 1)


# Shuffle


@dataclass(frozen=True)
class Quality:
    """See the facts of the section; places count rows."""

    rank_correlation: float
    batches: float
    spread: float
    displacement: float
    neighbours: float

    @classmethod
    def of(cls, order: NDArray[np.int64]) -> "Quality":
        """``order`` [N]: the row of the file that is trained k-th."""
        places = np.arange(len(order))
        row_groups, steps = order // SMALL_ROW_GROUP, places // SMALL_BATCH
        num_steps = int(steps[-1]) + 1
        counts = np.bincount(row_groups)
        mean = np.bincount(row_groups, places) / counts
        variance = np.bincount(row_groups, (places - mean[row_groups]) ** 2) / counts
        step_of_row = np.empty_like(steps)
        step_of_row[order] = steps
        return cls(
            rank_correlation=abs(float(np.corrcoef(places, order)[0, 1])),
            batches=len(np.unique(row_groups * num_steps + steps)) / (len(counts) * num_steps),
            spread=float(np.sqrt(variance).mean()),
            displacement=float(np.abs(order - places).mean()),
            neighbours=float((np.diff(step_of_row) == 0).mean()),
        )

    def beside(self, full: "Quality") -> dict[str, float]:
        """A line of the table: some as multiples of a full permutation's."""
        return {
            "rank correlation": round(self.rank_correlation, 4),
            "batches": round(self.batches, 3),
            "spread": round(self.spread / full.spread, 3),
            "displacement": round(self.displacement / full.displacement, 3),
            "neighbours": round(self.neighbours, 5),
            "neighbours, ratio": round(self.neighbours / full.neighbours, 2),
        }


def mean_quality(orders: Iterable[NDArray[np.int64]]) -> Quality:
    found = [astuple(Quality.of(order)) for order in orders]
    return Quality(*map(statistics.mean, zip(*found)))


def training_orders(data: "Data", settings: dict[str, Any]) -> Iterator[NDArray[np.int64]]:
    """What some epochs of the loader deliver of rows numbered 0 … N-1, checked to be each once."""
    loader = data.loader(**settings)
    for epoch in range(SHUFFLED_EPOCHS):
        order = torch.cat([batch.sparse.values() for batch in loader.epoch(epoch)]).numpy()
        assert np.array_equal(np.sort(order), np.arange(data.num_rows))
        yield order


# Data


@dataclass(frozen=True)
class Data:
    """Parquet files of one folder, and what their columns mean."""

    folder: Path
    schema: Schema
    layout: Layout

    @property
    def files(self) -> list[str]:
        return sorted(map(str, self.folder.glob("*.parquet")))

    @property
    def num_rows(self) -> int:
        return sum(pq.read_metadata(path).num_rows for path in self.files)

    def loader(self, **changes: Any) -> Loader:
        """One rank of one, with the trainer's defaults but for ``changes``."""
        columns = (self.schema.label, *self.schema.columns(self.layout))
        manifest = Manifest.scan([str(self.folder)], str(self.folder), columns)
        settings = {"batch_size": BATCH_SIZE, "rank": 0, "world_size": 1, "seed": 1} | STREAM | changes
        return Loader(manifest, self.schema, self.layout, **settings)


def described(data: Data) -> dict[str, Any]:
    footers = [pq.read_metadata(path) for path in data.files]
    mb = sum(os.path.getsize(path) for path in data.files) / 1e6
    groups = sum(footer.num_row_groups for footer in footers)
    return {"data": f"{data.num_rows:,} rows, {len(footers)} files, {groups} row groups, {mb:,.0f} MB", **STREAM}


CRITEO_ROWS = 4 * ROW_GROUP  # of a file


def criteo_data(root: Path, kind: str) -> Data:
    """``kind``: int64 (nullable columns, snappy, dictionaries: pyarrow's defaults), prepared (int32, NOT NULL, plain,
    uncompressed; the same values) or nulls (int64 with 0 to 75 % nulls in each feature; half as many rows)."""
    made(root / "criteo", write_criteo)
    return Data(root / "criteo" / kind, criteo_schema(fill=0.0 if kind == "nulls" else None), Layout(IDS))


def criteo_schema(fill: float | None = None) -> Schema:
    tables = {name: Table(num_embeddings=max(size, 2)) for name, size in zip(IDS, CARDINALITIES)}
    dense = {name: Feature(kind="dense", fill=fill) for name in DENSE}
    ids = {name: Feature(kind="sparse", table=name) for name in IDS}
    return Schema(tables=tables, features={**dense, **ids})


def write_criteo(folder: Path) -> None:
    for number in range(CRITEO_FILES):
        rng = np.random.default_rng([1, number])
        table = criteo_table(rng, CRITEO_ROWS)
        name = f"part-{number}.parquet"
        write(table, folder / "int64" / name)
        narrow = pa.schema([pa.field(column, pa.int32(), nullable=False) for column in table.column_names])
        write(table.cast(narrow), folder / "prepared" / name, use_dictionary=False, compression="none")
        if number < CRITEO_NULLS_FILES:
            write(with_nulls(table, rng), folder / "nulls" / name)


def criteo_table(rng: np.random.Generator, rows: int) -> pa.Table:
    columns: dict[str, NDArray[np.int64]] = {"label": (rng.random(rows) < 0.25).astype(np.int64)}
    for index, name in enumerate(DENSE):
        columns[name] = np.exp(rng.normal(index / 2, 1.5, rows)).astype(np.int64)  # counts with a long tail
    for name, cardinality in zip(IDS, CARDINALITIES):
        columns[name] = zipf(rng, rows, cardinality)
    return pa.table(columns)


def zipf(rng: np.random.Generator, rows: int, cardinality: int) -> NDArray[np.int64]:
    """Ids of which the k-th most frequent has a probability of about 1/k; frequent ones lie anywhere in the table."""
    rank = (cardinality ** rng.random(rows)).astype(np.int64) - 1
    return rank * 2_654_435_761 % cardinality  # a prime: no two ranks meet


def with_nulls(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    columns = {}
    for index, name in enumerate(table.column_names):
        share = 0 if name == "label" else index % 4 / 4
        columns[name] = pa.array(table[name].to_numpy(), mask=rng.random(table.num_rows) < share)
    return pa.table(columns)


def sequence_data(root: Path) -> Data:
    """Label, an item and its category, and the histories of both: 0 to 100 events."""
    schema = Schema(
        tables={"item": Table(num_embeddings=ITEMS), "category": Table(num_embeddings=CATEGORIES)},
        features={
            "item": Feature(kind="sparse", table="item"),
            "category": Feature(kind="sparse", table="category"),
            "items": history("item"),
            "categories": history("category"),
        },
    )
    return Data(made(root / "sequence", write_sequences), schema, schema.layout(attention=True))


def history(target: str) -> Feature:
    return Feature(kind="sequence", table=target, target=target, history="events", max_length=2 * MEAN_LENGTH)


def write_sequences(folder: Path) -> None:
    rows = 2 * ROW_GROUP
    for number in range(SEQUENCE_FILES):
        rng = np.random.default_rng([2, number])
        offsets = np.zeros(rows + 1, np.int32)
        offsets[1:] = np.cumsum(rng.integers(0, 2 * MEAN_LENGTH + 1, rows))
        columns = {
            "label": rng.integers(0, 2, rows),
            "item": zipf(rng, rows, ITEMS),
            "category": zipf(rng, rows, CATEGORIES),
            "items": pa.ListArray.from_arrays(offsets, zipf(rng, int(offsets[-1]), ITEMS)),
            "categories": pa.ListArray.from_arrays(offsets, zipf(rng, int(offsets[-1]), CATEGORIES)),
        }
        write(pa.table(columns), folder / f"part-{number}.parquet")


def numbered_data(root: Path, row_groups: int) -> Data:
    """One file whose rows are numbered from 0, in small row groups."""

    def write_numbers(folder: Path) -> None:
        numbers = np.arange(row_groups * SMALL_ROW_GROUP)
        table = pa.table({"label": numbers % 2, "row": numbers})
        write(table, folder / "part-0.parquet", row_group_size=SMALL_ROW_GROUP)

    schema = Schema(
        tables={"row": Table(num_embeddings=row_groups * SMALL_ROW_GROUP)},
        features={"row": Feature(kind="sparse", table="row")},
    )
    return Data(made(root / f"numbered-{row_groups}", write_numbers), schema, Layout(("row",)))


def peers_files(root: Path, rows: int, row_groups: int) -> Path:
    """A folder with the first row groups of the first files of criteo's int64 data, again as Parquet and as NumPy's npz,
    which one of the peers reads: parquet/, blocks/ (a file each) and one.npz (all rows)."""
    source = criteo_data(root, "int64")

    def write_peers(folder: Path) -> None:
        tables = [pq.read_table(path).slice(0, rows * row_groups) for path in source.files[:PEERS_FILES]]
        for number, table in enumerate(tables):
            write(table, folder / "parquet" / f"part-{number}.parquet", row_group_size=rows)
            write_npz(table, folder / "blocks" / f"part-{number}.npz")
        write_npz(pa.concat_tables(tables), folder / "one.npz")

    return made(root / f"peers-{rows}x{row_groups}", write_peers)


def write_npz(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: table[name].to_numpy() for name in table.column_names})


def several_times(folder: Path, times: int) -> Path:
    """The files of a folder under several names each: as many times the data, on no more of the disk."""

    def link(target: Path) -> None:
        target.mkdir(parents=True)
        for path in folder.glob("*.parquet"):
            for copy in range(times):
                os.link(path, target / f"{path.stem}-{copy}.parquet")

    return made(folder.parent / f"{folder.name}-{times}-times", link)


def made(folder: Path, write_into: Callable[[Path], None]) -> Path:
    """``folder``, made first if it is not there; it appears only when whole."""
    if not folder.exists():
        print(f"making {folder} …", file=sys.stderr, flush=True)
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_into(unfinished)
        unfinished.rename(folder)
    return folder


def write(table: pa.Table, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **({"row_group_size": ROW_GROUP} | options))


# The results file


def record(path: Path, name: str, section: Section, repeats: int) -> None:
    """Writes one section's result, with the command (but for its folders) and the machine, beside what other sections
    have written."""
    # Here, since it brings all of the trainer's memory with it, which is not the loader's.
    from bench.train import machine

    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    versions = {package: version(package) for package in ("pyarrow", "numpy", "torchrec")}
    known[name] = {
        **{key: value for key, value in asdict(section).items() if value},
        "command": f"python -m bench.loader --only {name} --repeats {repeats}",
        "machine": machine() | versions,
    }
    path.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
