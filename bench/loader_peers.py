"""The loaders that others use, each in a process of its own on one core, as ``bench.loader`` asks for.

Every process prepares its loader, then answers requests, one JSON object a line: a check of what an epoch over a small
set delivers, or a timed pass. A pass is an epoch, cut off after ``LIMIT_SECONDS``. Where it is cut off, only what came
after its first batch counts, which leaves out the filling of a shuffle buffer, in the peer's favour.

Libraries are called as their documentation or training scripts do, but for worker processes: on one core they only
add copies, so there are none. What is read into memory before the first pass is not timed, in the peers' favour too.

TorchEasyRec is not among them: it is not on PyPI, and needs closed wheels of feature generation and graph storage from its
makers' own server.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow.parquet as pq
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from bench.loader_data import BATCH_SIZE, DENSE, IDS, Data, criteo_schema
from data_loaders.schema import Layout

LIMIT_SECONDS = 3.0
# aiohttp: without it Ray's threads fail now and then, as they import what needs it at the same time.
REQUIREMENTS = ("torch-rechub==0.9.0", "fuxictr==2.3.10", "datasets==5.2.0", "aiohttp==3.14.5")
HF_BUFFER = 10_000  # rows; the library's default is 1000


@dataclass(frozen=True)
class Source:
    """``folder`` has the same rows three times: parquet/part-*.parquet, blocks/part-*.npz, one.npz."""

    folder: Path
    cache: Path

    @property
    def parquet(self) -> list[str]:
        return sorted(map(str, (self.folder / "parquet").glob("*.parquet")))


@dataclass(frozen=True)
class Peer:
    """``open(source)``: what a training script loops over, once an epoch. ``package``: None for our own. ``trainer``: the
    loader of a library that trains models like ours. ``limit``: seconds after which a pass is cut off."""

    open: Callable[[Source], Iterable[Any]]
    package: str | None
    shuffle: str
    shuffles: bool = True
    trainer: bool = False
    limit: float = LIMIT_SECONDS


# The loaders. Libraries are imported inside: each process has one.


def ours(source: Source, **changes: Any) -> Iterable[Any]:
    loader = Data(source.folder / "parquet", criteo_schema(), Layout(IDS)).loader(**changes)
    return Epochs(loader.epoch)


class Epochs:
    """A new epoch whenever it is looped over."""

    def __init__(self, epoch: Callable[[int], Iterable[Any]]) -> None:
        self._epoch = epoch
        self._next = 0

    def __iter__(self) -> Any:
        self._next += 1
        return iter(self._epoch(self._next - 1))


def arrow_batches(source: Source) -> Iterable[Any]:
    """What one writes without a library: pyarrow's record batches, each column a tensor over its memory."""

    def epoch(_: int) -> Iterable[Any]:
        for path in source.parquet:
            for batch in pq.ParquetFile(path, memory_map=True).iter_batches(BATCH_SIZE, use_threads=False):
                yield {name: torch.from_numpy(column.to_numpy()) for name, column in zip(batch.schema.names, batch)}

    return Epochs(epoch)


def rechub_generator(source: Source) -> Iterable[Any]:
    """torch-rechub's examples: all columns as arrays in memory, ``DataGenerator``."""
    from torch_rechub.utils.data import DataGenerator

    features = arrays(source)
    labels = features.pop("label")
    few = {name: column[:1] for name, column in features.items()}
    generator = DataGenerator(features, labels)
    return generator.generate_dataloader(
        x_val=few, y_val=labels[:1], x_test=few, y_test=labels[:1], batch_size=BATCH_SIZE, num_workers=0
    )[0]


def rechub_parquet(source: Source) -> Iterable[Any]:
    """torch-rechub's ``ParquetIterableDataset``, every column as float32."""
    from torch_rechub.data.dataset import ParquetIterableDataset

    return DataLoader(ParquetIterableDataset(source.parquet, batch_size=BATCH_SIZE), batch_size=None)


def fuxictr(path: Path, data_format: str) -> Iterable[Any]:
    """FuxiCTR's ``RankDataLoader`` as its run_expid.py calls it; which loader it takes depends on path and format."""
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.dataloaders import RankDataLoader

    features = FeatureMap("bench", str(path.parent))
    features.features.update({name: {"type": "numeric"} for name in DENSE})
    features.features.update({name: {"type": "categorical"} for name in IDS})
    features.labels = ["label"]
    features.set_column_index()
    settings = {"batch_size": BATCH_SIZE, "shuffle": True, "data_format": data_format, "num_workers": 0}
    return RankDataLoader(features, stage="train", train_data=str(path), **settings)[0]


def fuxictr_parquet(source: Source) -> Iterable[Any]:
    import ray

    if not ray.is_initialized():  # then the loader would start it, with a dashboard and on all network addresses
        ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="ERROR")
    return fuxictr(source.folder / "parquet", "parquet")


def hf(source: Source, **options: Any) -> Any:
    import datasets

    # Seconds that it sleeps at the end of an epoch: too much beside so few rows.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    files = {"train": source.parquet}
    cache = str(source.cache / "datasets")
    return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache, **options)


def hf_map(source: Source) -> Iterable[Any]:
    rows = hf(source).with_format("torch")
    return DataLoader(rows, sampler=BatchSampler(RandomSampler(rows), BATCH_SIZE, drop_last=False), batch_size=None)


def hf_streaming(source: Source) -> Iterable[Any]:
    rows = hf(source, streaming=True).with_format("torch").shuffle(seed=1, buffer_size=HF_BUFFER)
    return DataLoader(rows.batch(BATCH_SIZE), batch_size=None)


def hf_unshuffled(source: Source) -> Iterable[Any]:
    return DataLoader(hf(source, streaming=True).with_format("torch").batch(BATCH_SIZE), batch_size=None)


PEERS = {
    "ours": Peer(ours, None, "row groups, then rows in a buffer of 262,144, drawn from 64 places at once"),
    "ours, unshuffled": Peer(lambda source: ours(source, shuffle=False), None, "none", shuffles=False),
    "torch-rechub DataGenerator": Peer(
        rechub_generator, "torch-rechub", "full permutation, all data in memory", trainer=True
    ),
    "torch-rechub ParquetIterableDataset": Peer(
        rechub_parquet, "torch-rechub", "none (ids become float32)", shuffles=False, trainer=True
    ),
    "FuxiCTR npz": Peer(
        lambda source: fuxictr(source.folder / "one.npz", "npz"),
        "fuxictr",
        "full permutation, all data in memory",
        trainer=True,
    ),
    "FuxiCTR npz blocks": Peer(
        lambda source: fuxictr(source.folder / "blocks", "npz"),
        "fuxictr",
        "rows in a buffer of 100,000, files in order",
        trainer=True,
    ),
    "HF datasets, map": Peer(hf_map, "datasets", "full permutation, memory-mapped Arrow copy"),
    "HF datasets, streaming": Peer(hf_streaming, "datasets", f"files, then rows in a buffer of {HF_BUFFER:,}"),
    "HF datasets, streaming, unshuffled": Peer(hf_unshuffled, "datasets", "none", shuffles=False),
    "pyarrow iter_batches": Peer(arrow_batches, None, "none", shuffles=False),
    # Last and alone: Ray's services are never quite idle. Whole epochs: its buffer holds nearly all of these rows, so that
    # what comes after the first batch says nothing.
    "FuxiCTR parquet": Peer(
        fuxictr_parquet, "fuxictr", "blocks, then rows in a buffer of 1,000,000", trainer=True, limit=120.0
    ),
}
ALONE, ALONE_REPEATS = ("FuxiCTR parquet",), 3


def arrays(source: Source) -> dict[str, Any]:
    table = pq.read_table(source.folder / "parquet", use_threads=False)
    return {name: table[name].to_numpy() for name in table.column_names}


# The process of one peer


def serve() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(PEERS))
    for option in ("--folder", "--small", "--cache"):
        parser.add_argument(option, type=Path, required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    peer = PEERS[options.name]
    say(answers, {"version": version(peer.package) if peer.package else ""})
    loader = None
    for line in sys.stdin:
        request = json.loads(line)
        if request == "check":
            say(answers, sums(peer.open(Source(options.small, options.cache))))
        elif request == "prepare":
            began = time.perf_counter()
            loader = peer.open(Source(options.folder, options.cache))
            say(answers, {"seconds": time.perf_counter() - began})
        else:
            answer = one_pass(loader, peer.limit)
            say(answers, answer | {"cpu_seconds": None} if options.name in ALONE else answer)


def say(answers: Any, answer: Any) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def one_pass(loader: Iterable[Any], limit: float) -> dict[str, Any]:
    """Rows, seconds, CPU seconds of this process, and whether it was an epoch."""
    began, cpu_began = time.perf_counter(), time.process_time()
    rows = counted_from = 0
    for number, batch in enumerate(loader, 1):
        rows += num_rows(batch)
        if number == 1:
            first, cpu_first, counted_from = time.perf_counter(), time.process_time(), rows
        if number >= 3 and time.perf_counter() - began > limit:
            seconds, cpu_seconds = time.perf_counter() - first, time.process_time() - cpu_first
            return {"rows": rows - counted_from, "seconds": seconds, "cpu_seconds": cpu_seconds, "whole": False}
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return {"rows": rows, "seconds": seconds, "cpu_seconds": cpu_seconds, "whole": True}


def num_rows(batch: Any) -> int:
    return batch.cursor.local_rows if hasattr(batch, "cursor") else len(columns(batch)["label"])


def columns(batch: Any) -> dict[str, Any]:
    """A batch in any library's form as one tensor a column."""
    if hasattr(batch, "cursor"):
        assert batch.sparse.lengths().sum() == len(batch.sparse.values()) == 26 * batch.cursor.local_rows
        ids = {name: tensor.values() for name, tensor in batch.sparse.to_dict().items()}
        dense = {f"I{i}": column for i, column in enumerate(batch.dense[: batch.cursor.local_rows].t(), 1)}
        return ids | dense | {"label": batch.labels[: batch.cursor.local_rows]}
    if isinstance(batch, (tuple, list)):
        features, labels = batch
        return {**features, "label": labels}
    return batch


def sums(loader: Iterable[Any]) -> dict[str, int]:
    """What an epoch adds up to; label times value would change if rows were torn apart."""
    found = {"rows": 0, "columns": 0, "labels": 0, "labeled_values": 0}
    for batch in loader:
        named = {name: tensor.to(torch.int64) for name, tensor in columns(batch).items()}
        labels = named.pop("label")
        found["rows"] += len(labels)
        found["columns"] = len(named)
        found["labels"] += int(labels.sum())
        found["labeled_values"] += sum(int((labels * values).sum()) for values in named.values())
    return found


# The bench's side


@dataclass
class Found:
    """By peer: its passes, how long it took to be ready, its version; why others were skipped."""

    passes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    start_seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    checked: str = ""

    def add(self, process: "Process", delivered: str) -> None:
        """Raises ``RuntimeError`` where it delivers other rows than the rest."""
        if self.checked and self.checked != delivered:
            raise RuntimeError(f"'{process.name}' delivers {delivered} of the small set, others {self.checked}")
        self.checked, self.versions[process.name] = delivered, process.version


class Process:
    """One peer's process."""

    def __init__(self, name: str, python: Path | str, source: Source, small: Source, core: int) -> None:
        self.name = name
        self._log = source.cache / f"{name}.log"
        command = [python, "-m", "bench.loader_peers", name, "--folder", source.folder, "--small", small.folder]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*map(str, command), "--cache", str(source.cache)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **SETTINGS},
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # before any library starts its threads
            )
        self.version = self._answer()["version"]

    def ask(self, request: str) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError(self._last_words()) from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        return (self._log.read_text().strip().splitlines() or ["no output"])[-1]

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


SETTINGS = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def measure(source: Source, small: Source, peers_python: Path | None, repeats: int) -> Found:
    """All peers in turns; those that Ray would disturb, or be disturbed by, afterwards. Raises ``RuntimeError`` where one
    delivers other rows than the rest."""
    source.cache.mkdir(parents=True, exist_ok=True)
    found = Found()
    core = min(os.sched_getaffinity(0))
    for names in ([name for name in PEERS if name not in ALONE], *([name] for name in ALONE)):
        with ExitStack() as stack:
            processes = []
            for name in names:
                python = peers_python if PEERS[name].package else sys.executable
                process = prepare(name, python, source, small, core, found, stack)
                processes += [process] if process else []
            for _ in range(min(repeats, ALONE_REPEATS) if names[0] in ALONE else repeats):
                for process in processes:
                    found.passes.setdefault(process.name, []).append(process.ask("time"))
    return found


def prepare(
    name: str, python: Path | str | None, source: Source, small: Source, core: int, found: Found, stack: ExitStack
) -> Process | None:
    """A process whose loader is ready and has made one pass; None, with the reason in ``found``, where that fails."""
    if python is None:
        found.skipped[name] = "not installed: see --setup-peers and --peers"
        return None
    try:
        process = stack.enter_context(Process(name, python, source, small, core))
        delivered = json.dumps(process.ask("check"))
        found.start_seconds[name] = process.ask("prepare")["seconds"]
        process.ask("time")
    except RuntimeError as error:
        found.skipped[name] = str(error)
        return None
    found.add(process, delivered)
    return process


if __name__ == "__main__":
    serve()
