"""The loader's speed, memory and shuffle, as numbers.

    python -m bench.loader --setup-peers DIR              # once: the other libraries, in an environment of their own
    python -m bench.loader --peers DIR [--data DIR] [--only criteo sequence peers memory shuffle] [--repeats 5]

* criteo: rows/s of a Criteo-like log beside those at which pyarrow alone reads the same row groups;
* sequence: the same for rows with two lists;
* peers: rows/s on one core beside the loaders that others use (see ``loader_peers``);
* memory: peak over one epoch, ten epochs, and data 4 and 16 times as large;
* shuffle: how far the order of training is from the order in the files, beside a full permutation; of data that prepare has
  shuffled, from the order in the raw files.

The data are made once, from fixed seeds, in ``--data`` (about 3.2 GB, not part of the repository). Results go to
bench/results/loader.json, one entry a section.

What is timed: of our loader 256 batches of 8192 in mid-stream, behind the first 64, of a data set of 512 row groups (each
file linked 16 times), so that several row groups belong to each logical shard; in the lines "whole epochs" all of a small
data set instead, from asking for the iterator to the end of its threads. Of pyarrow, the files read once. Opening the
manifest and a first pass, which brings the files into the page cache, do not count. Whatever is compared takes turns (a b c
a b c …); a rate is the median of the passes, a ratio the median of the ratios turn by turn. One thread decodes
and shuffles (``threads=1``); one more copies rows into batches, as in training.
"""

import argparse
import os
import resource
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from bench import harness, loader_peers
from bench.harness import Pass, Rates, Ratio, Section, take_turns, timed
from bench.loader_data import (
    BATCH_SIZE,
    CRITEO_ROWS,
    ROW_GROUP,
    SMALL_ROW_GROUP,
    STREAM,
    Data,
    criteo_data,
    described,
    numbered_data,
    peers_files,
    sequence_data,
    several_times,
)
from data_loaders.batch import Batch

Side = Callable[[int], Pass]  # of the number of the pass

LINKS, SKIPPED_STEPS, TIMED_STEPS = 16, 64, 256
SMALL_BATCH, SMALL_BUFFER = BATCH_SIZE // 32, STREAM["shuffle_rows"] // 32  # of the shuffle section
SHUFFLED_ROW_GROUPS = (8, 64, 640)
SHUFFLED_EPOCHS = 3


def main() -> None:
    parser = harness.sections_parser(__doc__, "loader.json", SECTIONS, repeats=5)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "bench-loader")
    options = parser.parse_args()
    if options.setup_peers:
        harness.set_up_peers(options.setup_peers, loader_peers.REQUIREMENTS)
        return
    torch.set_num_threads(1)
    options.data.mkdir(parents=True, exist_ok=True)
    harness.run_sections(SECTIONS, options, "pyarrow", "numpy", "torchrec")


# Sections


def criteo(options: argparse.Namespace) -> Section:
    """40 columns: pyarrow, our loader shuffled and not, the prepared format, the same shuffled by ``prepare``, with one thread
    and two, and with nulls."""
    kinds = {kind: criteo_data(options.data, kind) for kind in ("int64", "prepared", "preshuffled", "nulls")}
    plain, prepared, preshuffled, nulls = kinds.values()
    sides = {
        "pyarrow": read_row_groups(plain),
        "shuffled": steady(plain),
        "unshuffled": steady(plain, shuffle=False),
        "prepared, pyarrow": read_row_groups(prepared),
        "prepared, shuffled": steady(prepared),
        "prepared, unshuffled": steady(prepared, shuffle=False),
        "pre-shuffled": steady(preshuffled),
        "pre-shuffled, 2 threads": steady(preshuffled, threads=2),
        "nulls, pyarrow": read_row_groups(nulls),
        "nulls, shuffled": steady(nulls),
        "shuffled, whole epochs": epochs(plain),
        "shuffled, all threads on one core": on_one_core(steady(plain)),
    }
    facts = {f"checked, {kind}": check(data) for kind, data in kinds.items()}
    section = compare(sides, options.repeats, facts | described(plain))
    section.add_ratio("shuffled / pyarrow", 0.62)
    section.add_ratio("unshuffled / pyarrow", 0.75)
    section.add_ratio("pre-shuffled / shuffled", 2.5)
    section.add_ratio("pre-shuffled, 2 threads / pre-shuffled", 1.7)
    section.add_ratio("prepared, shuffled / shuffled")
    section.add_ratio("prepared, shuffled / prepared, pyarrow")
    section.add_ratio("prepared, unshuffled / unshuffled")
    section.add_ratio("nulls, shuffled / nulls, pyarrow")
    section.add_ratio("shuffled, whole epochs / pyarrow")
    section.add_ratio("shuffled, all threads on one core / pyarrow")
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
    section.add_ratio("shuffled / pyarrow", 0.6)
    section.add_ratio("unshuffled / pyarrow")
    section.add_ratio("shuffled, whole epochs / pyarrow")
    return section


def compare(sides: dict[str, Side], repeats: int, facts: dict[str, Any]) -> Section:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    passes = take_turns(sides, repeats)
    blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before  # none, where the page cache held it all
    facts["MB read from disk, warm-up and timed passes"] = round(blocks * 512 / 1e6, 1)
    return Section({name: Rates.of(found) for name, found in passes.items()}, facts=facts)


def peers(options: argparse.Namespace) -> Section:
    """One core for all: ours beside the loaders of other trainers and libraries."""
    source = loader_peers.Source(peers_files(options.data, ROW_GROUP, CRITEO_ROWS // ROW_GROUP), options.data / "cache")
    small = loader_peers.Source(peers_files(options.data, 5000, 4), options.data / "cache")
    found = loader_peers.measure(source, small, harness.peers_python(options.peers), options.repeats)
    section = Section(facts={"skipped": found.skipped, "checked": found.checked, "versions": found.versions})
    for name, passes in found.passes.items():
        peer = loader_peers.PEERS[name]
        whole = "" if all(p["whole"] for p in passes) else "; part of an epoch"
        note = f"shuffle: {peer.shuffle}; ready after {found.start_seconds[name]:.1f} s{whole}"
        rates = Rates.of((Pass(p["rows"], p["seconds"], p["cpu_seconds"]) for p in passes), note)
        section.rates[name] = rates
    section.ratios.update(peer_ratios(section.rates))
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
        by_prepare = numbered_data(options.data, row_groups, shuffled=True)
        ways = {"none": {"shuffle": False}}
        ways |= {f"buffer of {n} row groups": {"shuffle_rows": n * SMALL_ROW_GROUP} for n in (2, 8, 32)}
        rng = np.random.default_rng(0)
        full = mean_quality(rng.permutation(data.num_rows) for _ in range(SHUFFLED_EPOCHS))
        for way, changes in ways.items():
            settings = {"batch_size": SMALL_BATCH, "shuffle_rows": SMALL_BUFFER} | changes
            found = mean_quality(training_orders(data, settings))
            section.rows[f"{row_groups} row groups, {way}"] = found.beside(full)
        settings = {"batch_size": SMALL_BATCH, "shuffle_rows": SMALL_BUFFER}
        found = mean_quality(training_orders(by_prepare, settings))
        section.rows[f"{row_groups} row groups, shuffled by prepare"] = found.beside(full)
        section.rows[f"{row_groups} row groups, full permutation"] = full.beside(full)
    section.facts.update(
        {
            "scale": f"row groups of {SMALL_ROW_GROUP} rows, batches of {SMALL_BATCH}, 64 logical shards, default buffer "
            f"{SMALL_BUFFER} rows (2 row groups): 1/32 of row groups of 131,072, batches of 8192 and a buffer of 262,144; "
            f"means over {SHUFFLED_EPOCHS} epochs",
            "rank correlation": "of place in the file and place in training (Spearman), absolute value",
            "batches": "share of an epoch's batches that hold a row of a given row group (a batch of this scale has few rows: "
            "8192 would hold one of each of 640 row groups in a full permutation)",
            "spread": "standard deviation of the places of a row group's rows in training, over a full permutation's",
            "displacement": "mean distance of place in training from place in the file, over a full permutation's",
            "runs": "changes between the halves of the file (as of labels that drift) from one trained row to the next, over a "
            "full permutation's",
            "together again": "share of pairs of rows, one trained behind the other, that the next epoch has in one batch too",
            "neighbours": "share of rows trained in one batch with the next row of the file; then, over a full permutation's",
        }
    )
    return section


SECTIONS: dict[str, Callable[[argparse.Namespace], Section]] = {
    "criteo": criteo,
    "sequence": sequence,
    "peers": peers,
    "memory": memory,
    "shuffle": shuffle,
}


# Sides


def read_row_groups(data: Data) -> Side:
    """pyarrow alone: all columns of all row groups in order, one thread, memory-mapped."""

    def read() -> int:
        rows = 0
        for path in data.files:
            with pq.ParquetFile(path, memory_map=True) as file:
                for index in range(file.num_row_groups):
                    rows += file.read_row_group(index, use_threads=False).num_rows
        return rows

    return lambda _: timed(read)


def steady(data: Data, **changes: Any) -> Side:
    """Our loader in mid-stream: pass k is of epoch k of a loader of its own, which leaves no memory behind."""
    larger = replace(data, folder=several_times(data.folder, LINKS))

    def one_pass(number: int) -> Pass:
        batches = larger.loader(**changes).batches(number, 0, SKIPPED_STEPS + TIMED_STEPS)
        for _ in islice(batches, SKIPPED_STEPS):
            pass
        return timed(lambda: sum(batch.cursor.local_rows for batch in batches))

    return one_pass


def epochs(data: Data, **changes: Any) -> Side:
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


def check(data: Data) -> str:
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
            dense = float(batch.dense.sum(dtype=torch.float64))
            sums.add_rows(int((batch.weights > 0).sum()), int(labels.sum()), dense)
            for tensor in filter(None, (batch.sparse, batch.sequence)):
                values, lengths = tensor.values(), tensor.lengths().to(torch.int64)
                labels_of_ids = labels.repeat(len(tensor.keys())).repeat_interleave(lengths)
                sums.add_ids(len(values), int(values.sum()), int((values * labels_of_ids).sum()))
        return sums

    @classmethod
    def of_files(cls, data: Data) -> "Sums":
        sums = cls()
        for path in data.files:
            for batch in pq.ParquetFile(path).iter_batches(ROW_GROUP):
                labels = batch.column(data.schema.label).to_numpy(zero_copy_only=False).astype(np.int64)
                numbers = (batch.column(name).to_numpy(zero_copy_only=False) for name in data.schema.dense)
                dense = sum(float(np.nansum(column, dtype=np.float64)) for column in numbers)
                sums.add_rows(batch.num_rows, int(labels.sum()), dense)
                for key in (*data.layout.pooled, *data.layout.unpooled):
                    sums.add_column(batch.column(key), labels)
        return sums

    def add_rows(self, rows: int, labels: int, dense: float) -> None:
        self.rows, self.labels, self.dense = self.rows + rows, self.labels + labels, self.dense + dense

    def add_ids(self, num_ids: int, ids: int, labeled_ids: int) -> None:
        self.num_ids, self.ids, self.labeled_ids = (
            self.num_ids + num_ids,
            self.ids + ids,
            self.labeled_ids + labeled_ids,
        )

    def add_column(self, column: pa.Array, labels: NDArray[np.int64]) -> None:
        if pa.types.is_list(column.type):
            labels = np.repeat(labels, np.diff(column.offsets.to_numpy()))
            column = column.flatten()
        elif column.null_count:
            labels = labels[column.is_valid().to_numpy(zero_copy_only=False)]
            column = column.drop_null()
        ids = column.to_numpy().astype(np.int64)
        self.add_ids(len(ids), int(ids.sum()), int((ids * labels).sum()))


# Memory


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, which begins with nothing of this one's memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def probe_memory(data: Data, num_epochs: int) -> dict[str, float]:
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
    return round(harness.status_bytes(key) / 1e6, 1)


# Shuffle


@dataclass(frozen=True)
class Quality:
    """See the facts of the section; places count rows."""

    rank_correlation: float
    batches: float
    spread: float
    displacement: float
    neighbours: float
    runs: float
    again: float = 0.0

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
            runs=float((np.diff(order < len(order) // 2) != 0).mean()),
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
            "runs": round(self.runs / full.runs, 3),
            "together again": round(self.again, 4),
        }


def mean_quality(orders: Iterable[NDArray[np.int64]]) -> Quality:
    """Means over epochs."""
    orders = list(orders)
    found = Quality(*map(statistics.mean, zip(*(astuple(Quality.of(order)) for order in orders))))
    pairs = list(zip(orders, orders[1:]))
    return replace(found, again=statistics.mean(together_again(*pair) for pair in pairs)) if pairs else found


def together_again(order: NDArray[np.int64], following: NDArray[np.int64]) -> float:
    """Share of the pairs of rows trained one behind the other in a batch that the next epoch has in one batch too."""
    step_of_row = np.empty_like(following)
    step_of_row[following] = np.arange(len(following)) // SMALL_BATCH
    first, second = step_of_row[order[:-1]], step_of_row[order[1:]]
    inside = np.arange(1, len(order)) % SMALL_BATCH != 0
    return float((first == second)[inside].mean())


def training_orders(data: Data, settings: dict[str, Any]) -> Iterator[NDArray[np.int64]]:
    """What some epochs of the loader deliver of rows numbered 0 … N-1, checked to be each once."""
    loader = data.loader(**settings)
    for epoch in range(SHUFFLED_EPOCHS):
        order = torch.cat([batch.sparse.values() for batch in loader.epoch(epoch)]).numpy()
        assert np.array_equal(np.sort(order), np.arange(data.num_rows))
        yield order


if __name__ == "__main__":
    main()
