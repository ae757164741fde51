"""What checkpoints cost training: the same steps with and without a save among them, in turn, in one process.

    torchrun --standalone --nproc_per_node=2 -m bench.checkpoint [--steps 150] [--repeats 5] [--user-rows 31_000_000] [overrides]

Half of the windows of so many steps begin with a save, which must end within its window. What such a window takes longer
(median over the repeats) is the training time that a checkpoint costs; at one a minute its share of the minute is the
result. ``data=synthetic`` is read from Parquet as in training; table ``user`` is made large, 2 GB of weights by default.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bench import harness
from bench.train import Ours
from trainer.checkpoint.saving import Checkpoints
from trainer.checkpoint.snapshot import bytes_of
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.compose import compose
from trainer.config.job import TrainConfig
from trainer.monitoring.metrics_logger import MetricsLogger
from trainer.run import build
from trainer.run.training_state import TrainingState
from trainer.runtime.distributed import Ranks, choose_device, from_first, peak_memory_mb
from trainer.runtime.process import guarded
from trainer.runtime.progress import Progress
from trainer.runtime.rendezvous import process_group

MINUTE = 60.0


def main() -> None:
    parser = harness.parser(__doc__, "checkpoint.json", overrides=True)
    parser.add_argument("--model", default="deepfm")
    parser.add_argument("--user-rows", type=int, default=31_000_000)
    parser.add_argument("--steps", type=int, default=150, help="steps of a window")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints go; default: a temporary folder")
    options = parser.parse_args()
    guarded(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    rows = f"data.schema.tables.user.num_embeddings={options.user_rows}"
    config = compose([f"model={options.model}", rows, *options.overrides]).config
    with process_group(choose_device(config.device), config.timeout_seconds) as ranks:
        folder = Path(from_first(lambda: tempfile.mkdtemp(prefix="bench-checkpoint-", dir=options.folder)))
        try:
            result = measure(config, ranks, folder, options.steps, options.repeats)
        finally:
            if ranks.is_first:
                shutil.rmtree(folder, ignore_errors=True)
        if ranks.is_first:
            harness.record(options.output, result)
            print(json.dumps(result, indent=2))


def measure(config: TrainConfig, ranks: Ranks, folder: Path, steps: int, repeats: int) -> dict[str, Any]:
    build.ensure_synthetic(config.data)
    ours = Ours(config, ranks, steps)
    ours(0)  # warm-up
    before = peak_memory_mb(ranks.device)
    reporter = MetricsLogger(folder, ours.loader, 1, 10**9, ranks)
    reporter.close()
    state = TrainingState(ours.built, reporter)
    checkpoints = Checkpoints(folder, CheckpointConfig(every_minutes=None), state, {}, ranks)
    window = _Window(ours, checkpoints, steps)
    sides = {"plain": lambda _: window(saves=False), "saving": lambda _: window(saves=True)}
    plain, saving = harness.take_turns(sides, repeats).values()  # the warm-up takes the snapshot's memory
    lost = [b - a for a, b in zip(plain, saving)]
    return {
        "seconds_lost_per_checkpoint": round(statistics.median(lost), 3),
        "share_at_one_a_minute": round(statistics.median(lost) / MINUTE, 4),
        "asked": 0.03,
        "lost_by_repeat": [round(value, 3) for value in lost],
        "seconds_of_a_window": round(statistics.median(plain), 2),
        "seconds_from_snapshot_to_commit": [round(value, 2) for value in window.durations],
        "seconds_of_snapshots_and_questions": round(checkpoints.seconds, 3),
        "bytes_per_rank": bytes_of(state.pieces),
        "peak_memory_mb": {"before": before, "after": peak_memory_mb(ranks.device)},
        "asynchronous": checkpoints.asynchronous,
        "world_size": ranks.world_size,
        "batch_size": config.batch_size,
        "steps": steps,
        "repeats": repeats,
    }


class _Window:
    """Trains some steps; returns the seconds they took."""

    def __init__(self, ours: Ours, checkpoints: Checkpoints, steps: int) -> None:
        self.ours, self.checkpoints, self.steps, self.step = ours, checkpoints, steps, 0
        self.durations: list[float] = []

    def __call__(self, *, saves: bool) -> float:
        dist.barrier()
        started = time.perf_counter()
        for number in range(self.steps):
            self.ours.built.pipeline.progress(self.ours.batches)
            self.step += 1
            if saves:
                self._save(number, started)
        dist.barrier()
        assert not self.checkpoints.under_way, "the save takes longer than the window: give more --steps"
        return time.perf_counter() - started

    def _save(self, number: int, started: float) -> None:
        if number == 0:
            self.checkpoints.begin(Progress(step=self.step))
        elif self.checkpoints.under_way:
            self.checkpoints.maybe_save(Progress(step=self.step))
            if not self.checkpoints.under_way:
                self.durations.append(time.perf_counter() - started)


if __name__ == "__main__":
    main()
