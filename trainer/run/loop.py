"""The order of events in a step."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.profiler import record_function
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from data_loaders.batch import Batch
from data_loaders.loader import BatchIterator, Loader
from trainer.checkpoint.saving import Checkpoints
from trainer.monitoring.metrics_logger import Reporter
from trainer.monitoring.row_log import Ledger
from trainer.run.evaluator import Evaluator
from trainer.runtime import fault_injection
from trainer.runtime.distributed import Ranks
from trainer.runtime.progress import Progress
from trainer.runtime.step_guard import Guard


def run(
    pipeline: TrainPipelineSparseDist,
    batches: Iterator[Batch],
    progress: Progress,
    ledger: Ledger,
    reporter: Reporter,
    checkpoints: Checkpoints,
    evaluator: Evaluator,
    guard: Guard,
    before_step: Callable[[int], None],
    on_first_step: Callable[[], None],
) -> None:
    """Trains until ``batches`` end, or ``evaluator`` says so, or ``guard`` says that a rank was asked to stop: then all ranks
    return after the same step, without saving or evaluating. Every event keeps its own cadence. A checkpoint comes after
    the evaluation of its step, since it holds what that one has decided.

    ``before_step`` gets the number of steps made so far; ``on_first_step`` runs after the first step, when the pipeline
    has rewritten the model.
    """
    incoming = _read(batches, progress.step + 1)
    while True:
        guard.begin(progress.step + 1)
        before_step(progress.step)
        try:
            outputs = pipeline.progress(incoming)
        except StopIteration:
            guard.over(progress.step)
            return
        on_first_step()
        with record_function("## metrics ##"):  # a name in traces (trainer/monitoring/profiling)
            progress.advance(outputs.cursor)
            ledger.record(outputs.cursor, progress.step)
            reporter.update(outputs, progress)
            reporter.maybe_report(progress)
        guard.end()
        if guard.stop_requested:
            return
        with guard.watchdog.paused(), record_function("## evaluation and checkpoint ##"):
            waited = checkpoints.seconds
            over = evaluator.maybe_evaluate(progress)
            checkpoints.maybe_save(progress)
            reporter.outside(checkpoints.seconds - waited)
        if over:
            guard.over(progress.step)
            return


def _read(batches: Iterator[Batch], first_step: int) -> Iterator[Batch]:
    """``batches``, that of ``first_step`` first."""
    for step, batch in enumerate(batches, first_step):
        fault_injection.at("reader", step=step)
        yield batch


def seed_dropout(seed: int, ranks: Ranks, step: int) -> None:
    """Makes what a step draws a matter of (seed, rank, step) alone: a run that goes on draws what it would have drawn."""
    drawn = np.random.SeedSequence((seed, ranks.rank, step)).generate_state(1, np.uint64)
    # Not torch.manual_seed, which is slow: it asks every kind of device.
    on_gpu = ranks.device.type == "cuda"
    generator = torch.cuda.default_generators[ranks.device.index] if on_gpu else torch.default_generator
    generator.manual_seed(int(drawn[0]))


def batches_from(loader: Loader, progress: Progress, total_steps: int) -> BatchIterator:
    """The batches still to train, from ``progress`` on, over epochs, up to ``total_steps`` optimizer steps."""
    epoch, start = progress.epoch, progress.epoch_step
    if start >= loader.steps_per_epoch:
        epoch, start = epoch + 1, 0
    return loader.batches(epoch, start, total_steps - progress.step)
